"""What diffusers' training scripts do between batch and step, without SpeeD: the baseline of other trainers.

Only statements that touch the scheduler, and what surrounds them, are here; those that docs/other_trainers.md takes
out are written as in the scripts. Autoencoder, text encoder and accelerate are left out: batches hold latents and
embeddings.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor, nn


@dataclass
class Trace:
    """What a loop leaves behind."""

    losses: list[float] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    scheduler: Any = None
    pipeline: Any = None

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, timesteps: Tensor, prediction: Tensor) -> None:
        """One optimizer step, noted."""
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(loss.item())
        self.timesteps.append(timesteps)
        self.predictions.append(prediction.detach())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what is to be trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def unconditional(model: Any, batches: Any, args: Any) -> Trace:
    """As train_unconditional.py."""
    trace = Trace()
    noise_scheduler: Any = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
    )
    # Initialize the optimizer
    optimizer = optimizer_of(model)
    for clean_images in batches:
        noise = torch.randn(clean_images.shape, device=clean_images.device)
        bsz = clean_images.shape[0]
        timesteps = torch.randint(
            0, noise_scheduler.config.num_train_timesteps, (bsz,), device=clean_images.device
        ).long()
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
        model_output = model(noisy_images, timesteps).sample
        if args.prediction_type == "epsilon":
            loss = F.mse_loss(model_output.float(), noise.float())  # this could have different weights!
        else:
            alpha_t = noise_scheduler.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
            snr_weights = alpha_t / (1 - alpha_t)
            loss = snr_weights * F.mse_loss(model_output.float(), clean_images.float(), reduction="none")
            loss = loss.mean()
        trace.step(optimizer, loss, timesteps, model_output)
    trace.scheduler = noise_scheduler
    trace.pipeline = DDPMPipeline(
        unet=model,
        scheduler=noise_scheduler,
    )
    return trace


def text_to_image(unet: Any, batches: Any, args: Any) -> Trace:
    """As train_text_to_image.py and train_text_to_image_lora.py."""
    trace = Trace()
    noise_scheduler: Any
    noise_scheduler = DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    optimizer = optimizer_of(unet)
    for latents, encoder_hidden_states in batches:
        noise = torch.randn_like(latents)
        bsz = latents.shape[0]
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,), device=latents.device)
        timesteps = timesteps.long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        if args.prediction_type is not None:
            noise_scheduler.register_to_config(prediction_type=args.prediction_type)
        v_prediction = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        if args.snr_gamma is None:
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        else:
            snr = compute_snr(noise_scheduler, timesteps)
            mse_loss_weights = snr.clamp_max(args.snr_gamma) / (snr + 1 if v_prediction else snr)
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
            loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights).mean()
        trace.step(optimizer, loss, timesteps, model_pred)
    trace.scheduler = noise_scheduler
    return trace


def dreambooth(unet: Any, batches: Any, args: Any) -> Trace:
    """As train_dreambooth.py and train_dreambooth_lora.py: the second half of a batch is that of the prior."""
    trace = Trace()
    noise_scheduler: Any
    noise_scheduler = DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    optimizer = optimizer_of(unet)
    for model_input, encoder_hidden_states in batches:
        noise = torch.randn_like(model_input)
        bsz = model_input.shape[0]
        # fmt: off
        timesteps = torch.randint(
            0, noise_scheduler.config.num_train_timesteps, (bsz,), device=model_input.device
        )
        # fmt: on
        timesteps = timesteps.long()
        noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)
        v_prediction = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(model_input, noise, timesteps) if v_prediction else noise
        prediction = unet(noisy_model_input, timesteps, encoder_hidden_states, return_dict=False)[0]
        model_pred = prediction
        if args.with_prior_preservation:
            model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
            target, target_prior = torch.chunk(target, 2, dim=0)
            prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        if args.with_prior_preservation:
            loss = loss + args.prior_loss_weight * prior_loss
        trace.step(optimizer, loss, timesteps, prediction)
    trace.scheduler = noise_scheduler
    return trace


def flow_matching(transformer: Any, batches: Any, args: Any) -> Trace:
    """As train_dreambooth_sd3.py; train_dreambooth_flux.py differs in how the model is called."""
    trace = Trace()
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler"
    )
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)

    def get_sigmas(timesteps: Tensor, n_dim: int) -> Tensor:
        table = noise_scheduler_copy.timesteps
        # Exactly one entry must equal each timestep, bit for bit; `.item()` fails otherwise.
        step_indices = [(table == t).nonzero().item() for t in timesteps]
        return noise_scheduler_copy.sigmas[step_indices].reshape(-1, *[1] * (n_dim - 1))

    optimizer = optimizer_of(transformer)
    for model_input, prompt_embeds, pooled_prompt_embeds in batches:
        noise = torch.randn_like(model_input)
        bsz = model_input.shape[0]
        u = compute_density_for_timestep_sampling(
            weighting_scheme=args.weighting_scheme,
            batch_size=bsz,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
        )
        indices = (u * noise_scheduler_copy.config.num_train_timesteps).long()
        timesteps = noise_scheduler_copy.timesteps[indices].to(device=model_input.device)
        sigmas = get_sigmas(timesteps, n_dim=model_input.ndim)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
        prediction = transformer(
            hidden_states=noisy_model_input,
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
        model_pred = prediction * (-sigmas) + noisy_model_input if args.precondition_outputs else prediction
        weighting = compute_loss_weighting_for_sd3(weighting_scheme=args.weighting_scheme, sigmas=sigmas)
        target = model_input if args.precondition_outputs else noise - model_input
        if args.with_prior_preservation:
            model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
            target, target_prior = torch.chunk(target, 2, dim=0)
            prior_loss = torch.mean(
                (weighting.float() * (model_pred_prior.float() - target_prior.float()) ** 2).reshape(
                    target_prior.shape[0], -1
                ),
                1,
            )
            prior_loss = prior_loss.mean()
        loss = torch.mean(
            (weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1),
            1,
        )
        loss = loss.mean()
        if args.with_prior_preservation:
            loss = loss + args.prior_loss_weight * prior_loss
        trace.step(optimizer, loss, timesteps, prediction)
    trace.scheduler = noise_scheduler_copy
    return trace
