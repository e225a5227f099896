"""Small scripts, written for the tests, with the forms that training scripts of diffusers have.

Each has what its kind of script does between scheduler and loss, and nothing else. `HANDLED` holds scripts with lines
that must be in the result, `REFUSED` scripts with words of the refusal. Those that are run are in diffusers_loops.py.
"""

SCHEDULER = 'noise_scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")'
FLOW = (
    'noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(args.model, subfolder="scheduler")\n'
    "noise_scheduler_copy = copy.deepcopy(noise_scheduler)"
)
DENSITY = """u = compute_density_for_timestep_sampling(
    weighting_scheme=args.weighting_scheme,
    batch_size=bsz,
    logit_mean=args.logit_mean,
    logit_std=args.logit_std,
    mode_scale=args.mode_scale,
)
indices = (u * noise_scheduler_copy.config.num_train_timesteps).long()
timesteps = noise_scheduler_copy.timesteps[indices].to(device=latents.device)"""
RANDINT = "timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,), device=latents.device)"
MEAN = 'loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")'
WEIGHTED = "loss = (noise_scheduler.loss_weights(timesteps).view(-1, *[1] * (loss.ndim - 1)) * loss).mean()"


def script(scheduler: str, *steps: str) -> str:
    """A script that makes a scheduler and has these steps in its loop."""
    body = "\n".join(scheduler.splitlines())
    loop = "\n".join(line for step in steps for line in step.splitlines())
    lines = [
        "import copy",
        "import torch",
        "import torch.nn.functional as F",
        "from diffusers import (",
        "    DDPMScheduler,",
        "    EulerDiscreteScheduler,",
        "    FlowMatchEulerDiscreteScheduler,",
        ")",
        "from transformers import CLIPTextModel",
        "",
        "",
        "def main(args, dataloader, accelerator):",
        *("    " + line for line in body.splitlines()),
        "    for batch in dataloader:",
        "        with accelerator.accumulate(unet):",
        *("            " + line for line in loop.splitlines()),
        "            accelerator.backward(loss)",
    ]
    return "\n".join(lines) + "\n"


HANDLED = {
    "one line": (
        script(SCHEDULER, RANDINT, "timesteps = timesteps.long()", MEAN),
        [
            "from speed_diffusers import speed_scheduler",
            "noise_scheduler = speed_scheduler(noise_scheduler)",
            "timesteps = noise_scheduler.sample_timesteps(bsz, device=latents.device)",
            'loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")',
            WEIGHTED,
        ],
    ),
    "a generator": (
        script(SCHEDULER, RANDINT.replace("device=", "generator=rng, device="), MEAN),
        ["timesteps = noise_scheduler.sample_timesteps(bsz, device=latents.device, generator=rng)"],
    ),
    "broken lines, .long(), a comment": (
        script(
            SCHEDULER,
            "time_steps = torch.randint(\n    0, noise_scheduler.config.num_train_timesteps, (bsz,),\n"
            "    device=images.device,\n).long()",
            "loss = F.mse_loss(\n    model_pred,\n    target,\n)  # this may get weights",
        ),
        [
            "time_steps = noise_scheduler.sample_timesteps(bsz, device=images.device)",
            'target, reduction="none",',
            ")  # this may get weights",
            "loss = (noise_scheduler.loss_weights(time_steps).view(-1, *[1] * (loss.ndim - 1)) * loss).mean()",
        ],
    ),
    "either of two makers, and a pipeline": (
        script(
            "if args.new:\n    noise_scheduler = DDPMScheduler(prediction_type=args.kind)\n"
            "else:\n    noise_scheduler = DDPMScheduler()",
            RANDINT,
            "if args.kind == 'epsilon':\n    " + MEAN + "\nelse:\n"
            '    loss = snr_weights * F.mse_loss(model_output.float(), clean.float(), reduction="none")\n'
            "    loss = loss.mean()",
            "pipeline = DDPMPipeline(\n    unet=unet,\n    scheduler=noise_scheduler,\n)",
        ),
        [
            "noise_scheduler = speed_scheduler(noise_scheduler)",
            WEIGHTED,
            "loss = snr_weights * noise_scheduler.loss_weights(timesteps).view(-1, *[1] * (model_output.ndim - 1))"
            ' * F.mse_loss(model_output.float(), clean.float(), reduction="none")',
            "scheduler=noise_scheduler.to_inference(),",
        ],
    ),
    "snr_gamma's branch": (
        script(
            SCHEDULER,
            RANDINT,
            "if args.snr_gamma is None:\n    " + MEAN + "\nelse:\n"
            "    snr = compute_snr(noise_scheduler, timesteps)\n"
            '    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")\n'
            "    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights\n"
            "    loss = loss.mean()",
        ),
        [WEIGHTED, "loss = loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights"],
    ),
    "a bias of the script's own in the other branch": (
        script(
            SCHEDULER,
            "if args.timestep_bias_strategy == 'none':\n    " + RANDINT + "\nelse:\n"
            "    timesteps = torch.multinomial(bias, bsz, replacement=True).long()",
            MEAN,
        ),
        ["timesteps = torch.multinomial(bias, bsz, replacement=True).long()", WEIGHTED],
    ),
    "prior preservation": (
        script(
            SCHEDULER,
            RANDINT,
            "if args.with_prior_preservation:\n"
            "    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)\n"
            "    target, target_prior = torch.chunk(target, 2, dim=0)\n"
            '    prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")',
            MEAN,
            "if args.with_prior_preservation:\n    loss = loss + args.prior_loss_weight * prior_loss",
        ),
        [
            "speed_weights = noise_scheduler.loss_weights(timesteps)",
            "speed_weights, speed_weights_prior = torch.chunk(speed_weights, 2, dim=0)",
            "prior_loss = (speed_weights_prior.view(-1, *[1] * (prior_loss.ndim - 1)) * prior_loss).mean()",
            "loss = (speed_weights.view(-1, *[1] * (loss.ndim - 1)) * loss).mean()",
        ],
    ),
    "a branch for EDM's preconditioning": (
        script(
            "if args.edm:\n    noise_scheduler = EulerDiscreteScheduler.from_pretrained(args.model)\n"
            "else:\n    noise_scheduler = DDPMScheduler.from_pretrained(args.model)",
            "if not args.edm:\n    " + RANDINT + "\nelse:\n"
            "    indices = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,))\n"
            "    timesteps = noise_scheduler.timesteps[indices].to(device=latents.device)",
            "if weighting is not None:\n"
            "    loss = torch.mean((weighting * (model_pred - target) ** 2).reshape(target.shape[0], -1), 1)\n"
            "    loss = loss.mean()\nelse:\n    " + MEAN,
        ),
        ["timesteps = noise_scheduler.timesteps[indices].to(device=latents.device)", WEIGHTED],
    ),
    "a mean per image": (
        script(
            SCHEDULER,
            RANDINT,
            'loss = F.mse_loss(noise_pred.float(), target.float(), reduction="none").mean([1, 2, 3]).mean()',
        ),
        [
            "loss = (noise_scheduler.loss_weights(timesteps) * "
            'F.mse_loss(noise_pred.float(), target.float(), reduction="none").mean([1, 2, 3])).mean()'
        ],
    ),
    "a mask": (
        script(
            SCHEDULER,
            RANDINT,
            'loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")\n'
            "loss = ((loss * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()",
        ),
        [
            "loss = (noise_scheduler.loss_weights(timesteps) * "
            "((loss * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3]))).mean()"
        ],
    ),
    "Huber, one timestep for the batch": (
        script(
            SCHEDULER,
            "timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (1,), device='cpu')\n"
            "timesteps = timesteps.repeat(bsz).to(latents.device)",
            'loss = conditional_loss(model_pred.float(), target.float(), reduction="mean", huber_c=c)',
        ),
        [
            "timesteps = noise_scheduler.sample_timesteps(1, device='cpu')",
            'loss = conditional_loss(model_pred.float(), target.float(), reduction="none", huber_c=c)',
            WEIGHTED,
        ],
    ),
    "video, errors of x_0": (
        script(
            SCHEDULER,
            RANDINT,
            "weights = 1 / (1 - noise_scheduler.alphas_cumprod[timesteps])\n"
            "loss = torch.mean((weights * (model_pred - target) ** 2).reshape(bsz, -1), dim=1)\n"
            "loss = loss.mean()",
        ),
        ["loss = noise_scheduler.loss_weights(timesteps) * loss"],
    ),
    "Euler's scheduler, a cubic draw": (
        script(
            "noise_scheduler = EulerDiscreteScheduler.from_pretrained(args.model)",
            "timesteps = torch.rand((bsz,), device=latents.device)\n"
            "timesteps = (1 - timesteps**3) * noise_scheduler.config.num_train_timesteps\n"
            "timesteps = timesteps.long().to(noise_scheduler.timesteps.dtype)\n"
            "timesteps = timesteps.clamp(0, noise_scheduler.config.num_train_timesteps - 1)",
            "loss = torch.mean((sigmas**-2 * (denoised - target) ** 2).reshape(target.shape[0], -1), dim=1)\n"
            "loss = loss.mean()",
        ),
        [
            "from speed_diffusers import SpeeDDDPMScheduler",
            "noise_scheduler_speed = SpeeDDDPMScheduler.from_config(noise_scheduler.config)",
            "timesteps = noise_scheduler_speed.sample_timesteps(bsz, device=latents.device)"
            ".to(noise_scheduler.timesteps.dtype)",
            "loss = noise_scheduler_speed.loss_weights(timesteps.long()) * loss",
        ],
    ),
    "a flow with weighting schemes": (
        script(
            FLOW,
            DENSITY,
            "weighting = compute_loss_weighting_for_sd3(weighting_scheme=args.weighting_scheme, sigmas=sigmas)",
            "if args.with_prior_preservation:\n"
            "    target, target_prior = torch.chunk(target, 2, dim=0)\n"
            "    prior_loss = torch.mean(\n"
            "        (weighting.float() * (pred_prior - target_prior) ** 2).reshape(target_prior.shape[0], -1), 1\n"
            "    )\n"
            "    prior_loss = prior_loss.mean()",
            "loss = torch.mean((weighting.float() * (model_pred - target) ** 2).reshape(target.shape[0], -1), 1)\n"
            "loss = loss.mean()",
        ),
        [
            "noise_scheduler_copy = speed_scheduler(noise_scheduler)",
            "timesteps = noise_scheduler_copy.sample_timesteps(bsz).to(device=latents.device)",
            "weighting = noise_scheduler_copy.loss_weights(timesteps).view(sigmas.shape)",
            "weighting, weighting_prior = torch.chunk(weighting, 2, dim=0)",
            "(weighting_prior.float() * (pred_prior - target_prior) ** 2).reshape(target_prior.shape[0], -1), 1",
        ],
    ),
    "a flow that chunks its weights": (
        script(
            FLOW,
            DENSITY,
            "weighting = compute_loss_weighting_for_sd3(weighting_scheme=args.weighting_scheme, sigmas=sigmas)",
            "target, target_prior = torch.chunk(target, 2, dim=0)\n"
            "weighting, weighting_prior = torch.chunk(weighting, 2, dim=0)\n"
            "prior_loss = torch.mean((weighting_prior * (prior - target_prior) ** 2).reshape(bsz, -1), 1)\n"
            "loss = torch.mean((weighting * (pred - target) ** 2).reshape(target.shape[0], -1), 1).mean()",
        ),
        [
            "weighting = noise_scheduler_copy.loss_weights(timesteps).view(sigmas.shape)",
            "prior_loss = torch.mean((weighting_prior * (prior - target_prior) ** 2).reshape(bsz, -1), 1)",
        ],
    ),
    "a flow by a sigmoid, without weights": (
        script(
            FLOW.replace("noise_scheduler_copy = copy.deepcopy(noise_scheduler)", ""),
            "u = torch.sigmoid(args.scale * torch.randn((bsz,), device=latents.device))\n"
            "indices = (u * noise_scheduler.config.num_train_timesteps).long()\n"
            "timesteps = noise_scheduler.timesteps[indices].to(latents.device)",
            'loss = F.mse_loss(noise_pred.float(), (noise - latents).float(), reduction="mean")',
        ),
        ["timesteps = noise_scheduler.sample_timesteps(bsz).to(latents.device)", WEIGHTED],
    ),
    "a flow by torch.randint": (
        script(
            FLOW,
            "indices = torch.randint(0, noise_scheduler_copy.config.num_train_timesteps, (bsz,))\n"
            "timesteps = noise_scheduler_copy.timesteps[indices]",
            MEAN,
        ),
        [
            "timesteps = noise_scheduler_copy.sample_timesteps(bsz)",
            "loss = (noise_scheduler_copy.loss_weights(timesteps).view(-1, *[1] * (loss.ndim - 1)) * loss).mean()",
        ],
    ),
}

REFUSED = {
    "no scheduler": (script("vae = AutoencoderKL()", "loss = F.mse_loss(a, b)"), "no scheduler of diffusers"),
    "no timesteps": (script(SCHEDULER, "loss = F.mse_loss(a, b)"), "no place that draws timesteps"),
    "other timesteps": (
        script(SCHEDULER, "timesteps = torch.randint(1, args.num_ddim_timesteps, (bsz,))", MEAN),
        "no place that draws timesteps",
    ),
    "no loss": (script(SCHEDULER, RANDINT, "loss = model(latents, timesteps)"), "no loss after line"),
    "pairs": (
        script(
            SCHEDULER,
            RANDINT,
            'losses = F.mse_loss(model_pred, target, reduction="none")\n'
            'loss = F.l1_loss(F.mse_loss(a, b, reduction="none"), losses.chunk(2)[0])',
        ),
        "how this error becomes the loss",
    ),
    "timesteps changed": (script(SCHEDULER, RANDINT, "timesteps = timesteps // 2", MEAN), "changed after they were"),
    "noise and images turned round": (
        script(FLOW, DENSITY, "noisy = (1.0 - sigmas) * noise + sigmas * latents", MEAN),
        "change places",
    ),
    "noise by other sigmas": (
        script(FLOW, DENSITY, "sigmas = shifted(noise_scheduler_copy.sigmas[indices])", MEAN),
        "used again",
    ),
    "a generator of the indices": (
        script(FLOW, DENSITY.replace("batch_size=bsz,", "batch_size=bsz, generator=rng,"), MEAN),
        "its generator",
    ),
    "an unknown scheduler": (
        script("noise_scheduler = DDPMWuerstchenScheduler()", RANDINT, MEAN),
        "not known to SpeeD",
    ),
    "SpeeD already": ("import speed_diffusers\n", "has SpeeD already"),
}
