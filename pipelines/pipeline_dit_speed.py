"""DiT generation by any fitting solver of diffusers, in one file that also works as diffusers' `custom_pipeline`."""

import copy
import inspect
import json
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
)
"""Schedulers that the pipeline samples with, and any subclass of theirs."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Labels = int | str | Sequence[int] | Sequence[str] | Tensor
Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


class SpeeDDiTPipeline(DiTPipeline):
    """`DiTPipeline` for any class count, any fitting scheduler, a learned variance, and guidance where it is wanted.

    The stock call gives the stock pipeline's images. New are the keywords of `__call__`; besides, ancestral solvers
    take their noise from `generator`, and solvers in sigmas (Euler, Heun, LMS) begin with noise of the right size.

    Args:
        transformer: Its `out_channels` are its `in_channels`, or twice as many for a learned variance.
        vae: Turns latents into images.
        scheduler: One of `SCHEDULERS`.
        id2label: Rows of the label table to names; unlike the stock pipeline's they survive saving.
        null_class_id: Row of the label table that means "no class". None: row 1000, as the stock pipeline has it, if
            there is one, and else the last row, which is where diffusers' DiT drops labels to.
    """

    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        null_class_id: int | None = None,
    ) -> None:
        super().__init__(transformer=transformer, vae=vae, scheduler=scheduler, id2label=id2label)  # type: ignore[arg-type]
        if id2label is not None:
            self.register_to_config(id2label={str(row): name for row, name in id2label.items()})
        if null_class_id is not None:
            self._check_rows("null_class_id", [null_class_id])
            self.register_to_config(null_class_id=null_class_id)

    def to_json_string(self) -> str:
        """The index of the saved pipeline; it names the stock class, so that it opens where this file is not."""
        index = {**json.loads(super().to_json_string()), "_class_name": "DiTPipeline"}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def null_class_id(self) -> int:
        """Row of the label table that means "no class"."""
        chosen = self.config.get("null_class_id")
        return min(1000, int(self.transformer.config.num_embeds_ada_norm)) if chosen is None else int(chosen)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Rows of the label table by names: a class's whole name, or one of several that commas separate.

        Raises:
            ValueError: A name that no class has; the message gives the nearest one.
        """
        whole = {name.strip(): int(row) for row, name in (self.config.get("id2label") or {}).items()}
        known = {**self.labels, **whole}
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in known:
                nearest = get_close_matches(str(name), known, n=1)
                hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Allowed: {', '.join([*known][:20])}."
                raise ValueError(f"Unknown class label '{name}'. {hint if known else 'The model names no classes.'}")
        return [known[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        num_images: int | None = None,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generates images, one per label.

        Args:
            class_labels: Rows of the label table or names of classes: one for all images, a list, or a tensor (N,).
                None: images without a class.
            guidance_scale: Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): unconditional + scale x
                (conditional - unconditional). At most 1: none, at half the work.
            generator: One for all images, or one for each: an image then depends on nothing else in its batch.
            num_inference_steps: Steps of the solver, from 1 to the length of the noising process.
            output_type: "pil", "np" (float32 (N, H, W, 3) in [0, 1]), "pt" ((N, 3, H, W) in [0, 1]) or "latent"
                ((N, C, S, S), float32 at least, as the autoencoder's scaling factor has scaled them).
            return_dict: False: a tuple with the images.
            num_images: Images of one label or none; None: as many as generators or latents are given, or 1.
            guidance_channels: Latent channels that are guided, from the first; None: all. DiT guided 3 of 4. The
                others, like the variance, are those of the conditional pass.
            guidance_interval: Where to guide, both ends included, in shares t / num_train_timesteps of the noising
                process: 0 is clean, 1 is pure noise (Kynkäänniemi et al., arXiv 2404.07724).
            eta: Share of DDPM's noise in DDIM's steps (arXiv 2010.02502, eq. 16), in [0, 1]; DDIM only.
            latents: Noise of unit variance to begin with, (N, C, S, S), instead of noise from `generator`.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after each step; "latents" in what it
                returns replace the latents. It may set `_guidance_scale`, or `_interrupt` to skip all further steps.
            callback_on_step_end_tensor_inputs: Tensors that it is given; "latents" is all there is.

        Raises:
            ValueError: Anything wrong with the input, before any work.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        rows = self._label_rows(class_labels, num_images, generator, latents)
        self._check_guidance(guidance_scale, guidance_channels, guidance_interval)
        self._check_scheduler(num_inference_steps, eta)
        shape = self.transformer.config
        size = (len(rows), shape.in_channels, shape.sample_size, shape.sample_size)
        self.check_inputs(size, generator, latents, output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        scheduler = self._working_scheduler(num_inference_steps)
        accepted = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}
        if latents is None:
            latents = randn_tensor(size, generator, self._execution_device, self.transformer.dtype)
        # Solvers add small differences to large numbers: half precision is for the network alone.
        latents = latents.to(self._execution_device, torch.promote_types(self.transformer.dtype, torch.float32))
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        labels = torch.tensor(rows, device=latents.device)
        channels = (guidance_channels or size[1]) if any(row != self.null_class_id for row in rows) else 0
        # The solver's timesteps stay on the host, so that it never waits for the device.
        steps = scheduler.timesteps
        device_steps = steps.to(latents.device, torch.float32 if steps.is_floating_point() else torch.int64)
        self.num_timesteps = len(steps)
        for index, step in enumerate(self.progress_bar(steps)):
            if self._interrupt:
                continue
            share = float(step) / scheduler.config.num_train_timesteps
            guided = self._guidance_scale > 1 and guidance_interval[0] <= share <= guidance_interval[1]
            # Flow matching knows no scaling.
            inputs = scheduler.scale_model_input(latents, step) if hasattr(scheduler, "scale_model_input") else latents
            output = self._predict(inputs, device_steps[index], labels, channels if guided else 0)
            if not _takes_variance(scheduler):
                output = output[:, : size[1]]
            elif index == len(steps) - 1:
                # The least variance: nothing is noisy after the last step, even if the steps end above timestep 0.
                output[:, size[1] :] = -1.0
            latents = scheduler.step(output, step, latents, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, index, step, tensors).pop("latents", latents)
        images: Any = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _working_scheduler(self, num_inference_steps: int) -> Any:
        """The scheduler, set to its steps; a copy where it would take the learned variance for something else."""
        scheduler: Any = self.scheduler
        if not _takes_variance(scheduler) and scheduler.config.get("variance_type") in ("learned", "learned_range"):
            # From the config of a DDPM scheduler; DPM solvers would cut the latents down to three channels.
            scheduler = copy.copy(scheduler)
            scheduler.register_to_config(variance_type=None)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def _predict(self, inputs: Tensor, step: Tensor, labels: Tensor, guided: int) -> Tensor:
        """The network's output (N, C or 2C, S, S), guided in its first channels; 0: the conditional pass alone."""
        dtype = inputs.dtype
        inputs = inputs.to(self.transformer.dtype)
        if guided:
            inputs = torch.cat([inputs, inputs])
            labels = torch.cat([labels, torch.full_like(labels, self.null_class_id)])
        options = {"timestep": step.expand(len(labels)), "class_labels": labels, "return_dict": False}
        output: Tensor = self.transformer(inputs, **options)[0].to(dtype)
        if not guided:
            return output
        output, unconditional = output.chunk(2)
        first, other = unconditional[:, :guided], output[:, guided:]
        return torch.cat([first + self._guidance_scale * (output[:, :guided] - first), other], dim=1)

    def _decode(self, latents: Tensor, output_type: str | None) -> Any:
        """Images of the type asked for, from clean latents (N, C, S, S)."""
        latents = 1 / self.vae.config.scaling_factor * latents
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    def _label_rows(self, labels: Any, num_images: Any, generator: Any, latents: Any) -> list[int]:
        """Row of the label table of each image."""
        _check("num_images", num_images, num_images is None or _is_integer(num_images, 1, math.inf), "1 or more")
        given = generator if isinstance(generator, list) else latents
        count = num_images or (len(given) if isinstance(given, list | Tensor) else 1)
        # Arrays of other libraries have it as tensors do; the stock pipeline takes a column of labels too.
        labels = labels.reshape(-1).tolist() if getattr(labels, "ndim", 0) else labels
        labels = self.null_class_id if labels is None else labels
        labels = list(labels) if isinstance(labels, list | tuple | range) else [labels] * count
        labels = [label.item() if hasattr(label, "item") else label for label in labels]
        _check("class_labels", labels, bool(labels), "one or more, or None")
        _check("num_images", num_images, num_images in (None, len(labels)), f"{len(labels)}, one for each label")
        rows = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in labels]
        self._check_rows("class_labels", rows)
        return rows

    def _check_rows(self, name: str, rows: list[Any]) -> None:
        last = self.transformer.config.num_embeds_ada_norm
        for row in rows:
            _check(name, row, _is_integer(row, 0, last), f"rows of the label table, 0 to {last}")

    def check_inputs(self, size: Any, generator: Any, latents: Any, output_type: Any, tensors: Any) -> None:
        """Raises a ValueError of one line, with name, value and what is allowed, for wrong noise and outputs."""
        generators = generator if isinstance(generator, list) else [generator]
        fits = generator is None or all(isinstance(one, torch.Generator) for one in generators)
        _check("generator", generator, fits, "a torch.Generator or a list of them")
        fits = not isinstance(generator, list) or len(generator) == size[0]
        _check("number of generators", len(generators), fits, f"{size[0]}, one per image, or one that is in no list")
        fits = latents is None or (isinstance(latents, Tensor) and latents.shape == size)
        _check("latents", getattr(latents, "shape", latents), fits, f"a tensor of shape {size}")
        _check("output_type", output_type, output_type in OUTPUT_TYPES, ", ".join(OUTPUT_TYPES))
        known = self._callback_tensor_inputs
        _check("callback_on_step_end_tensor_inputs", tensors, set(tensors) <= set(known), ", ".join(known))

    def _check_guidance(self, scale: Any, guided: Any, interval: Any) -> None:
        _check("guidance_scale", scale, _is_number(scale, math.inf), "a number of at least 0")
        channels = self.transformer.config.in_channels
        fits = guided is None or _is_integer(guided, 1, channels)
        _check("guidance_channels", guided, fits, f"1 to {channels}, or None for all")
        ends = list(interval) if isinstance(interval, Sequence) else []
        fits = len(ends) == 2 and all(_is_number(end, 1) for end in ends) and ends[0] <= ends[1]
        _check("guidance_interval", interval, fits, "two numbers from 0 to 1, the lower one first")

    def _check_scheduler(self, steps: Any, eta: Any) -> None:
        scheduler: Any = self.scheduler
        kind, num_in = type(scheduler).__name__, self.transformer.config.in_channels
        num_out = self.transformer.config.out_channels or num_in
        if not isinstance(scheduler, tuple(getattr(diffusers, name) for name in SCHEDULERS)):
            raise ValueError(f"The pipeline does not sample with {kind}; it does with {', '.join(SCHEDULERS)}.")
        _check("the transformer's out_channels", num_out, num_out in (num_in, 2 * num_in), f"{num_in} or {2 * num_in}")
        if isinstance(scheduler, DDPMScheduler) and scheduler.variance_type.startswith("learned"):
            allowed = "learned_range" if num_out > num_in else "fixed_small, as the transformer predicts no variance"
            _check("variance_type", scheduler.variance_type, scheduler.variance_type == allowed, allowed)
        longest = scheduler.config.num_train_timesteps
        _check("num_inference_steps", steps, _is_integer(steps, 1, longest), f"1 to {longest}")
        _check("eta", eta, _is_number(eta, 1), "a number from 0 to 1")
        if eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta={eta}: {kind} has no eta; DDIMScheduler does.")
        if scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(f"{kind} with use_dynamic_shifting=True: not supported; give it a shift instead.")
        if isinstance(scheduler, diffusers.PNDMScheduler) and not scheduler.config.skip_prk_steps:
            _check("num_inference_steps", steps, steps >= 4, "4 or more without skip_prk_steps")


def _takes_variance(scheduler: Any) -> bool:
    """Whether the scheduler's step wants mean and variance; all others want the mean alone."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.variance_type == "learned_range"


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name}={value}: allowed is {allowed}.")


def _is_integer(value: object, lowest: float, highest: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _is_number(value: object, highest: float) -> bool:
    return isinstance(value, int | float) and 0 <= value <= highest and value < math.inf
