"""The protocol of a score: all that it depends on besides the weights. Scores compare under equal protocols only."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from diffusers import SchedulerMixin

from ..errors import InputError

SAMPLER_SETTINGS = (
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "variance_type",
    "clip_sample",
    "thresholding",
    "algorithm_type",
    "solver_order",
    "solver_type",
    "lower_order_final",
    "final_sigmas_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift",
)
"""Keys of schedulers' configs that change what is sampled and belong to the sampler, not to the trained model."""


@dataclass(frozen=True)
class Protocol:
    """All that a score depends on besides the weights of the transformer.

    Attributes:
        num_images: Generated images; the Fréchet distance falls with it.
        labels: How classes are given to images.
        sampler: Class of the scheduler.
        sampler_settings: Those of its settings that change the images.
        num_inference_steps: Solver steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_channels: Latent channels that are guided, from the first; None: all.
        guidance_interval: Where the noising process is guided, in shares of it: 0 is clean, 1 is pure noise.
        seed: Seed of the images' noise.
        resolution: Side of the images in pixels.
        weights: "ema" (averaged, as pipelines hold them) or "model".
        vae_sha256: Fingerprint of the autoencoder.
        extractor: Name of the feature extractor.
        extractor_sha256: Hash of its weights.
        reference: Name of the reference; its hash decides whether two are equal.
        reference_sha256: Hash of the reference's file.
        num_reference_images: Images behind the reference's mean and covariance; None where the file does not say.
        nearest: k of precision and recall.
        measures: Constants of the metrics in published features, by metric; empty for other features.
        dtype: The network's arithmetic.
        pixels: What was measured: "float", as a pipeline makes them, or "8 bit", as files keep them.
    """

    num_images: int
    labels: str
    sampler: str
    sampler_settings: Mapping[str, Any]
    num_inference_steps: int
    guidance_scale: float
    guidance_channels: int | None
    guidance_interval: tuple[float, float]
    seed: int
    resolution: int
    weights: str
    vae_sha256: str
    extractor: str
    extractor_sha256: str
    reference: str = field(compare=False)
    reference_sha256: str
    num_reference_images: int | None
    nearest: int
    measures: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    pixels: str = "float"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """The protocol that `dataclasses.asdict` wrote, also by way of JSON.

        Raises:
            InputError: Parts of it are missing, or there are others: another version wrote it.
        """
        names = {each.name for each in fields(cls)}
        # Older scores do not mention what was not there to differ.
        if set(values) | LATER_PARTS.keys() != names:
            odd = ", ".join(sorted((set(values) | LATER_PARTS.keys()) ^ names))
            raise InputError(f"a protocol of another version; these parts are missing or unknown: {odd}.")
        return cls(**{**values, "guidance_interval": tuple(values["guidance_interval"])})

    def compared(self) -> dict[str, Any]:
        """The parts on which two protocols must agree."""
        values = dataclasses.asdict(self)
        return {each.name: values[each.name] for each in fields(self) if each.compare}

    def short_hash(self) -> str:
        """Eight hexadecimal digits that stand for the protocol in file names."""
        # Without what is as it always was, as the files of older scores are named.
        parts = {
            name: value
            for name, value in self.compared().items()
            if name not in LATER_PARTS or value != LATER_PARTS[name]
        }
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def in_words(self, *, without: Collection[str] = ()) -> str:
        """The protocol in one line, for titles.

        Args:
            without: "guidance" or "weights": what the scores that the line is about do not share.
        """
        guidance = "no guidance"
        if self.guidance_scale != 1:
            guidance = f"guidance {self.guidance_scale:g}"
            if self.guidance_channels is not None:
                guidance += f" on {self.guidance_channels} channels"
            if self.guidance_interval != (0.0, 1.0):
                guidance += " in [{:g}, {:g}]".format(*self.guidance_interval)
        sampler = self.sampler.removesuffix("Scheduler")
        chosen = {"guidance": guidance, "weights": f"{self.weights} weights"}
        shared = "".join(f", {words}" for part, words in chosen.items() if part not in without)
        reference = f"reference {self.reference}"
        if self.num_reference_images:
            reference += f" ({self.num_reference_images:,} images)"
        return (
            f"{self.num_images:,} {self._kind_of_images()} of {self.resolution}x{self.resolution} ({self.labels}), "
            f"{sampler} {self.num_inference_steps} steps{shared}, seed {self.seed}; "
            f"features of {self.extractor}, {reference}"
        )

    def _kind_of_images(self) -> str:
        words = ["8-bit"] if self.pixels == "8 bit" else []
        return " ".join([*words, *([] if self.dtype == "float32" else [self.dtype]), "images"])


LATER_PARTS: dict[str, Any] = {"measures": {}, "dtype": "float32", "pixels": "float"}
"""Parts that the first scores did not have, as they were then."""


def sampler_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The settings of a scheduler that change what it samples, without those of the schedule it was trained with."""
    return sampler_settings_of_config(scheduler.config)  # type: ignore[attr-defined]


def sampler_settings_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a scheduler's config."""
    return {name: config[name] for name in SAMPLER_SETTINGS if name in config}


def labels_in_words(rows: Sequence[int], order: str = "in turn") -> str:
    """How classes are given to images, such as "0..9 in turn".

    Args:
        rows: Rows of the label table, in the order in which images take them.
        order: How they take them.
    """
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + f" {order}"


def protocol_differences(first: Protocol, second: Protocol) -> list[str]:
    """What keeps two scores from being compared, a phrase per part; empty if nothing does."""
    one, other = first.compared(), second.compared()
    return [f"{name}: {one[name]} and {other[name]}" for name in one if one[name] != other[name]]


def require_equal_protocols(protocols: Mapping[str, Protocol]) -> None:
    """Checks that scores may stand in one column or one curve.

    Args:
        protocols: By the name of what was scored.

    Raises:
        InputError: Two of them differ; the message says in what.
    """
    names = list(protocols)
    for name in names[1:]:
        differences = protocol_differences(protocols[names[0]], protocols[name])
        if differences:
            raise InputError(f"The scores of {names[0]} and {name} do not compare: {'; '.join(differences)}.")
