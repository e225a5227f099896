"""DiT generation by any fitting solver of diffusers, in one file that also works as diffusers' `custom_pipeline`."""

import copy
import inspect
import json
import math
import numbers
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.embeddings import Timesteps
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

REFUSED_SCHEDULERS = {
    "ConsistencyDecoderScheduler": "it is for the consistency decoder of an autoencoder",
    "HeliosDMDScheduler": "it is for the pyramids of a video model",
    "HeliosScheduler": "it is for the pyramids of a video model",
    "PiflowScheduler": "its model predicts a whole policy, not a mean",
    "SCMScheduler": "it is for distilled models whose time is an angle",
    "UnCLIPScheduler": "its step must be told the next timestep, or takes it to be the one below",
}
"""Schedulers that the pipeline does not sample with and cannot tell so by looking at them, with the reason."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Labels = int | str | Sequence[int] | Sequence[str] | Tensor
Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


class SpeeDDiTPipeline(DiTPipeline):
    """`DiTPipeline` for any class count, any fitting scheduler, a learned variance, and guidance where it is wanted.

    The stock call gives the stock pipeline's images, bit for bit, with every scheduler that draws no noise in its
    steps and begins with noise of unit variance (DDIM, DPM-Solver, UniPC, DEIS, PNDM). It differs on purpose where
    the stock pipeline

    - takes a step's noise from torch's global generator, whatever `generator` is (DDPM, SASolver, LCM, TCD, ancestral
      solvers): here it comes from `generator`. Without one, images without guidance are the stock ones; guided ones
      are not, because the stock pipeline draws noise for the unconditional half of the batch too and throws it away.
    - begins with noise of unit variance, and steps from the network's scaled input in place of the sample, although
      the solver works in sigmas (Euler, Heun, LMS, KDPM2, EDM): here the noise is multiplied by the scheduler's
      `init_noise_sigma`, and the sample is the sample.

    Args:
        transformer: Its `out_channels` are its `in_channels`, or twice as many for a learned variance.
        vae: Turns latents into images.
        scheduler: Any of diffusers' for images, flow matching's too; a call refuses others in one line that says why.
        id2label: Rows of the label table to names; unlike the stock pipeline's they survive saving, and no name is
            lost that another class has too.
        null_class_id: Row of the label table that means "no class". None: row 1000, as the stock pipeline has it, if
            there is one, and else the last row, which is where diffusers' DiT drops labels to.

    Raises:
        ValueError: `null_class_id` or the config of the transformer has a value that cannot be.

    A transformer whose config has `freq_shift` was trained with other timestep frequencies than the stock class
    computes (0: those of DiT's own code, 1: the stock ones): it is given them, for good.
    """

    _callback_tensor_inputs = ["latents"]
    _guidance_scale = 4.0
    _interrupt = False

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
        if (freq_shift := transformer.config.get("freq_shift")) is not None:
            _check("freq_shift", freq_shift, _is_kind(freq_shift, numbers.Real) and 0 <= freq_shift <= 1, "0 to 1")
            for module in transformer.modules():
                if isinstance(module, Timesteps):
                    module.downscale_freq_shift = freq_shift

    def to_json_string(self) -> str:
        """The index of the saved pipeline; it names the stock class, so that it opens where this file is not."""
        index = {**json.loads(super().to_json_string()), "_class_name": "DiTPipeline"}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def null_class_id(self) -> int:
        """Row of the label table that means "no class"."""
        chosen = self.config.get("null_class_id")
        return min(1000, int(self.transformer.config.num_embeds_ada_norm)) if chosen is None else int(chosen)

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call in progress, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that guides at all; `guidance_interval` may still leave steps out."""
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to skip all further steps, by setting `_interrupt`."""
        return self._interrupt

    @property
    def class_names(self) -> dict[int, str]:
        """Rows of the label table to whole names, as they were given; empty if the model names no classes."""
        return {int(row): name for row, name in (self.config.get("id2label") or {}).items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Rows of the label table by names, as `find_rows` reads them; rows themselves are left as they are.

        Raises:
            ValueError: A name that no class has, with the nearest one, or that several have, with their rows.
        """
        names, found = self.class_names, list[int]()
        for wanted in label if isinstance(label, list | tuple) else [label]:
            rows = [int(wanted)] if _is_integer(wanted, 0, math.inf) else find_rows(str(wanted), names)
            if not rows:
                parts = [part.strip() for name in names.values() for part in (name, *name.split(","))]
                nearest = get_close_matches(str(wanted), parts, n=1)
                hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Allowed: {', '.join([*names.values()][:20])}."
                raise ValueError(f"Unknown class label '{wanted}'. {hint if names else 'The model names no classes.'}")
            if len(rows) > 1:
                raise ValueError(ambiguous_name(str(wanted), rows, names))
            found += rows
        return found

    def rows_of_class_ids(self, class_ids: int | Sequence[int]) -> list[int]:
        """Rows of the label table by class ids 0 to C-1, as data sets count them.

        A class id is its row, except that ids from the null row up move by one: with more than 1000 classes, class
        1099 is row 1100.

        Raises:
            ValueError: No such class.
        """
        ids, last = _flat(class_ids), int(self.transformer.config.num_embeds_ada_norm) - 1
        for number in ids:
            _check("class_ids", number, _is_integer(number, 0, last), f"class ids, 0 to {last}")
        return [int(number) + (number >= self.null_class_id) for number in ids]

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
        eta: float | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generates images, one per label.

        Args:
            class_labels: Rows of the label table or names of classes: one for all images, a list (of lists of one,
                too), or a tensor (N,) or (N, 1). Numbers are rows, as in the stock pipeline, not class ids; the two
                differ for models with more than 1000 classes (`rows_of_class_ids`). None: images without a class.
            guidance_scale: Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): unconditional + scale x
                (conditional - unconditional); at least 0. At most 1: none, at half the work.
            generator: One for all images, or one for each: an image then depends on nothing else in its batch, unless
                the scheduler's steps take noise but no generator (DPMSolverSDE).
            num_inference_steps: Steps of the solver, from 1 to the length of the noising process.
            output_type: "pil", "np" or None (float32 (N, H, W, 3) in [0, 1]), "pt" ((N, 3, H, W) in [0, 1]) or
                "latent" ((N, C, S, S), float32 at least, as the autoencoder's scaling factor has scaled them).
            return_dict: False: a tuple with the images.
            num_images: Images of one label or none; None: as many as generators or latents are given, or 1.
            guidance_channels: Latent channels that are guided, from the first; None: all. DiT guided 3 of 4. The
                others, like the variance, are those of the conditional pass.
            guidance_interval: Where to guide, both ends included, in shares t / num_train_timesteps of the noising
                process: 0 is clean, 1 is pure noise (Kynkäänniemi et al., arXiv 2404.07724).
            eta: Share of DDPM's noise in DDIM's steps (arXiv 2010.02502, eq. 16), or of fresh noise in TCD's, in
                [0, 1]; for schedulers that have it. None: the scheduler's own, 0 for DDIM.
            latents: Noise of unit variance to begin with, floating-point (N, C, S, S), instead of noise from
                `generator`.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after each step; "latents" in what it
                returns replace the latents. It may set `_guidance_scale`, or `_interrupt` to skip all further steps.
            callback_on_step_end_tensor_inputs: Tensors that it is given; "latents" is all there is.

        Raises:
            ValueError: Anything wrong with the input, before any work, or with what the callback returns.
            FloatingPointError: The model, or the autoencoder, made NaN or infinite values.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(output_type, generator, latents, callback_on_step_end, callback_on_step_end_tensor_inputs)
        rows = self._label_rows(class_labels, num_images, generator, latents)
        interval = self._check_guidance(guidance_scale, guidance_channels, guidance_interval)
        self._check_scheduler(num_inference_steps, eta)
        shape = self.transformer.config
        size = (len(rows), shape.in_channels, shape.sample_size, shape.sample_size)
        self._check_noise(size, generator, latents)
        scheduler = self._working_scheduler(int(num_inference_steps), interval)
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        accepted = inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
        options |= {} if eta is None else {"eta": float(eta)}
        if latents is None:
            latents = randn_tensor(size, generator, self._execution_device, self.transformer.dtype)
        # Solvers add small differences to large numbers: half precision is for the network alone.
        latents = latents.to(self._execution_device, torch.promote_types(self.transformer.dtype, torch.float32))
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        labels = torch.tensor(rows, device=latents.device)
        channels = int(guidance_channels or size[1]) if any(row != self.null_class_id for row in rows) else 0
        # The solver's timesteps stay on the host, so that it never waits for the device.
        steps = scheduler.timesteps
        device_steps = steps.to(latents.device, torch.float32 if steps.is_floating_point() else torch.int64)
        self.num_timesteps = len(steps)
        for index, step in enumerate(self.progress_bar(steps)):
            if self._interrupt:
                continue
            share = float(step) / scheduler.config.num_train_timesteps
            guided = self._guidance_scale > 1 and (interval is None or interval[0] <= share <= interval[1])
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
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                answer = callback_on_step_end(self, index, step, tensors)
                _check("what callback_on_step_end returns", answer, isinstance(answer, dict), "a dict of tensors")
                latents = answer.pop("latents", latents)
        _check_finite(latents, "The model generated NaN or infinite values")
        images: Any = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _working_scheduler(self, num_inference_steps: int, interval: tuple[float, float] | None) -> Any:
        """The scheduler, set to its steps; a copy where it would take the learned variance for something else.

        Raises:
            ValueError: It cannot be set so, or its steps lie outside the noising process.
        """
        scheduler: Any = self.scheduler
        if not _takes_variance(scheduler) and scheduler.config.get("variance_type") in ("learned", "learned_range"):
            # From the config of a DDPM scheduler; DPM solvers would cut the latents down to three channels.
            scheduler = copy.copy(scheduler)
            scheduler.register_to_config(variance_type=None)
        kind, longest = type(scheduler).__name__, scheduler.config.num_train_timesteps
        try:
            scheduler.set_timesteps(num_inference_steps)
        except Exception as error:
            reason = _one_line(error) or type(error).__name__
            raise ValueError(f"num_inference_steps={num_inference_steps}: {kind} refuses it: {reason}") from error
        first, last = float(scheduler.timesteps.max()), float(scheduler.timesteps.min())
        if first >= longest and hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
            # Solvers in sigmas interpolate between timesteps, these look them up.
            offset = scheduler.config.get("steps_offset", 0)
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: with steps_offset={offset} {kind} begins at timestep "
                f"{first:g}, but the last one is {longest - 1}; take fewer steps or steps_offset=0."
            )
        if interval is not None and not 0 <= last <= first <= longest:
            raise ValueError(
                f"guidance_interval={interval}: {kind} has timesteps from {first:g} to {last:g}, which are no shares "
                f"of a noising process; allowed is (0, 1)."
            )
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
        _check_finite(images, f"The autoencoder, in {self.vae.dtype}, made NaN or infinite values of finite latents")
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    def _label_rows(self, labels: Any, num_images: Any, generator: Any, latents: Any) -> list[int]:
        """Row of the label table of each image."""
        _check("num_images", num_images, num_images is None or _is_integer(num_images, 1, math.inf), "1 or more")
        given = generator if isinstance(generator, list) else latents
        flat = _flat(self.null_class_id if labels is None else labels)
        _check("class_labels", labels, bool(flat), "one or more, or None")
        if not _is_many(labels):
            flat *= int(num_images or (len(given) if given is not None else 1))
        _check("num_images", num_images, num_images in (None, len(flat)), f"{len(flat)}, one for each label")
        rows = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in flat]
        self._check_rows("class_labels", rows)
        return [int(row) for row in rows]

    def _check_rows(self, name: str, rows: list[Any]) -> None:
        last = int(self.transformer.config.num_embeds_ada_norm)
        for row in rows:
            _check(name, row, _is_integer(row, 0, last), f"rows of the label table, 0 to {last}")

    def check_inputs(self, output_type: Any, generator: Any, latents: Any, callback: Any, tensors: Any) -> None:
        """Checks the kinds of a call's noise and outputs.

        Raises:
            ValueError: One is of no kind that is allowed; one line with its name, value and what is allowed.
        """
        _check("output_type", output_type, output_type in (*OUTPUT_TYPES, None), f"{', '.join(OUTPUT_TYPES)}, or None")
        generators = generator if isinstance(generator, list) else [generator]
        fits = generator is None or (generators and all(isinstance(one, torch.Generator) for one in generators))
        _check("generator", generator, fits, "a torch.Generator or a list of them, one per image")
        fits = latents is None or (isinstance(latents, Tensor) and latents.is_floating_point() and not latents.is_meta)
        fits = fits and (latents is None or (latents.ndim == 4 and len(latents) > 0))
        _check("latents", _kind(latents), fits, "a float tensor of shape (N, C, S, S)")
        fits = callback is None or callable(callback)
        _check("callback_on_step_end", callback, fits, "a function (pipeline, step, timestep, tensors) -> dict")
        known, many = self._callback_tensor_inputs, isinstance(tensors, list | tuple | set)
        fits = many and all(name in known for name in tensors)
        _check("callback_on_step_end_tensor_inputs", tensors, fits, f"a list out of: {', '.join(known)}")

    def _check_noise(self, size: tuple[int, ...], generator: Any, latents: Any) -> None:
        fits = not isinstance(generator, list) or len(generator) == size[0]
        many = len(generator) if isinstance(generator, list) else 1
        _check("number of generators", many, fits, f"{size[0]}, one per image, or one that is in no list")
        if latents is not None:
            _check("latents", _kind(latents), latents.shape == size, f"a float tensor of shape {size}")
            _check("latents", "NaN or infinite values", bool(torch.isfinite(latents).all()), "finite noise")

    def _check_guidance(self, scale: Any, guided: Any, interval: Any) -> tuple[float, float] | None:
        """The interval to guide in; None for everywhere."""
        _check("guidance_scale", scale, _is_number(scale, math.inf), "a number of at least 0")
        channels = self.transformer.config.in_channels
        fits = guided is None or _is_integer(guided, 1, channels)
        _check("guidance_channels", guided, fits, f"1 to {channels}, or None for all")
        ends = list(interval) if isinstance(interval, Sequence) else []
        fits = len(ends) == 2 and all(_is_number(end, 1) for end in ends) and ends[0] <= ends[1]
        _check("guidance_interval", interval, fits, "two numbers from 0 to 1, the lower one first")
        return None if ends == [0, 1] else (float(ends[0]), float(ends[1]))

    def _check_scheduler(self, steps: Any, eta: Any) -> None:
        scheduler: Any = self.scheduler
        kind, num_in = type(scheduler).__name__, self.transformer.config.in_channels
        num_out = self.transformer.config.out_channels or num_in
        if reason := _why_refused(scheduler):
            raise ValueError(f"The pipeline does not sample with {kind}: {reason}.")
        _check("the transformer's out_channels", num_out, num_out in (num_in, 2 * num_in), f"{num_in} or {2 * num_in}")
        variance = scheduler.config.get("variance_type")
        if _is_ancestral(scheduler) and str(variance).startswith("learned"):
            allowed = "learned_range" if num_out > num_in else "fixed_small, as the transformer predicts no variance"
            _check("variance_type", variance, variance == allowed, allowed)
        longest = scheduler.config.num_train_timesteps
        _check("num_inference_steps", steps, _is_integer(steps, 1, longest), f"1 to {longest}")
        _check("eta", eta, eta is None or _is_number(eta, 1), "a number from 0 to 1, or None")
        if eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta={eta}: {kind} has no eta; DDIMScheduler does.")
        if scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(f"{kind} with use_dynamic_shifting=True: not supported; give it a shift instead.")
        if isinstance(scheduler, diffusers.PNDMScheduler) and not scheduler.config.skip_prk_steps:
            _check("num_inference_steps", steps, steps >= 4, "4 or more without skip_prk_steps")


def find_rows(wanted: str, names: Mapping[int, str]) -> list[int]:
    """Rows of the classes that a name can mean; more than one where it is ambiguous.

    The first of these that any class fits decides: the very same name; the same but for spaces around it and its
    commas, and for how Unicode composes its letters; one of the names that commas separate in a class's name.

    Args:
        wanted: A name as a person gives it.
        names: Rows of the label table to whole names.
    """
    if exact := [row for row, name in names.items() if name == wanted]:
        return exact
    parts = {row: _name_parts(name) for row, name in names.items()}
    sought = _name_parts(wanted)
    if whole := [row for row, own in parts.items() if own == sought]:
        return whole
    return [row for row, own in parts.items() if sought != [""] and len(sought) == 1 and sought[0] in own]


def ambiguous_name(wanted: str, rows: Sequence[int], names: Mapping[int, str]) -> str:
    """The message for a name that several classes have, with their rows."""
    listed = ", ".join(f"{row} ('{names[row]}')" for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
    return f"Class label '{wanted}' is ambiguous: rows {listed} have that name. Give a whole name or a row."


def _name_parts(name: str) -> list[str]:
    return [part.strip() for part in unicodedata.normalize("NFC", name).split(",")]


def _is_many(labels: Any) -> bool:
    """Whether labels are several, even if there is but one in them."""
    return bool(getattr(labels, "ndim", isinstance(labels, list | tuple | range)))


def _flat(labels: Any) -> list[Any]:
    """Labels one by one, out of sequences, tensors and arrays of any depth."""
    if hasattr(labels, "tolist"):  # of tensors, of arrays and of their numbers
        labels = labels.tolist()
    if isinstance(labels, list | tuple | range):
        return [one for label in labels for one in _flat(label)]
    return [labels]


def _why_refused(scheduler: Any) -> str | None:
    """Why the pipeline cannot sample with a scheduler, or None if it can."""
    for kind in type(scheduler).__mro__:
        if kind.__name__ in REFUSED_SCHEDULERS:
            return REFUSED_SCHEDULERS[kind.__name__]
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        return "it has no step or no set_timesteps"
    given = ("model_output", "timestep", "sample", "generator", "eta", "return_dict")
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    more = [name for name in needed if name not in given]
    if more:
        return f"its step also needs {' and '.join(more)}"
    if "num_train_timesteps" not in scheduler.config:
        return "it has no num_train_timesteps, so it is for no noising process that a DiT is trained on"
    return None


def _is_ancestral(scheduler: Any) -> bool:
    """Whether a scheduler's step knows learned variances as DDPM's does."""
    return isinstance(scheduler, DDPMScheduler | diffusers.DDPMParallelScheduler)


def _takes_variance(scheduler: Any) -> bool:
    """Whether the scheduler's step wants mean and variance; all others want the mean alone."""
    return _is_ancestral(scheduler) and scheduler.config.variance_type == "learned_range"


def _check(name: str, value: object, fits: object, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name}={_one_line(value)}: allowed is {allowed}.")


def _one_line(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind(value: Any) -> object:
    """A tensor in words, anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return f"{list(value.shape)} of {value.dtype} on {value.device.type}"


def _check_finite(tensors: Tensor, what: str) -> None:
    """Raises a FloatingPointError if any of several images (N, ...) is not finite."""
    bad = int((~torch.isfinite(tensors).flatten(1).all(1)).sum())
    if bad:
        raise FloatingPointError(f"{what} in {bad} of {len(tensors)} images.")


def _is_integer(value: Any, lowest: float, highest: float) -> bool:
    return _is_kind(value, numbers.Integral) and bool(lowest <= value <= highest)


def _is_number(value: Any, highest: float) -> bool:
    return _is_kind(value, numbers.Real) and bool(0 <= value <= highest and value < math.inf)


def _is_kind(value: Any, kind: type) -> bool:
    """Whether a value is a number of a kind, numpy's too; bools are none."""
    return isinstance(value, kind) and type(value) is not bool
