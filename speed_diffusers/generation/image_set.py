"""A set of generated images by number: what each of them follows from, and the folder that keeps them with it.

The bytes of an image do not depend on how the set was made. Its noise and its class follow from the seed and its
number. The network rounds otherwise for batches of another size and with another number of threads, so neither is left
to chance: image i is always computed in pass i // images_per_pass, among the same others, whether they are wanted or
not, and every pass has that size. What a process takes at once, and how many of them there are, moves whole passes
only.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import DiTPipeline

from ..errors import InputError
from ..files import tensors_sha256, write_text
from ..json_files import check_values, read_object
from ..randomness import keyed_generator
from .generate import GenerationSettings, row_names_of, speed_pipeline

MANIFEST = "generated.json"
FORMAT_VERSION = 1

LABELS = ("balanced", "random")
FORMATS = ("png", "parquet", "npz")

TOKENS_PER_PASS = 4096
"""Tokens that fill a GPU for all but the smallest networks: 16 images of DiT-XL/2 at 256x256."""
MOST_PER_PASS = 64


@dataclass(frozen=True)
class ImageSet:
    """All that the bytes of generated images follow from, besides the machine.

    Attributes:
        model: Name of the model as the user gave it; the hashes decide whether two are equal.
        weights_sha256: Hash of the transformer's weights in float32.
        weights: Which weights of a run they are, as protocols have it.
        vae_sha256: Fingerprint of the autoencoder.
        scheduler: Class and config of the scheduler that samples.
        labels: "balanced": classes in turn; "random": each image's class is drawn with the seed and its number.
        class_rows: Rows of the label table that images may have, in the order of their turns.
        class_names: Names of all rows, by row.
        null_class_id: Row of the label table that means "no class".
        num_inference_steps: Solver steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_channels: Latent channels that are guided; None: all.
        guidance_interval: Where the noising process is guided.
        seed: Seed of noise and random labels.
        resolution: Side of the images in pixels.
        dtype: The network's arithmetic, such as "float32"; the autoencoder's is always float32.
        images_per_pass: Images that the network sees at once.
        device: Type of the device.
        num_threads: Torch's threads on the CPU; None on other devices.
    """

    model: str = field(compare=False)
    weights_sha256: str
    weights: str
    vae_sha256: str
    scheduler: Mapping[str, Any]
    labels: str
    class_rows: Sequence[int]
    class_names: Mapping[str, str] = field(compare=False)
    null_class_id: int
    num_inference_steps: int
    guidance_scale: float
    guidance_channels: int | None
    guidance_interval: Sequence[float]
    seed: int
    resolution: int
    dtype: str
    images_per_pass: int
    device: str
    num_threads: int | None

    @classmethod
    def of(
        cls,
        pipeline: DiTPipeline,
        settings: GenerationSettings,
        *,
        model: str,
        vae_sha256: str,
        resolution: int,
        labels: str = "balanced",
        class_rows: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        images_per_pass: int | None = None,
        device: torch.device | None = None,
    ) -> "ImageSet":
        """The set that a pipeline, still in float32, would generate.

        Args:
            pipeline: Any DiT pipeline.
            settings: How; its batch size does not matter.
            model: Name of the pipeline.
            vae_sha256: Fingerprint of its autoencoder.
            resolution: Side of its images in pixels.
            labels: One of `LABELS`.
            class_rows: Classes, as rows of the label table; None: all, or none where the pipeline names none.
            dtype: The network's arithmetic.
            images_per_pass: Images that the network sees at once; None: as many as make 4,096 tokens, 64 at most.
            device: Where it will run; None: the CPU.
        """
        sampling = speed_pipeline(pipeline, settings.sampler)
        shape, names = pipeline.transformer.config, row_names_of(pipeline)
        tokens = (shape.sample_size // shape.patch_size) ** 2
        device = device or torch.device("cpu")
        config = json.loads(json.dumps(dict(sampling.scheduler.config), default=str))
        rows = list(class_rows) if class_rows is not None else list(names) or [sampling.null_class_id]
        return cls(
            model=model,
            weights_sha256=tensors_sha256(pipeline.transformer.state_dict()),
            weights="ema",
            vae_sha256=vae_sha256,
            scheduler={"_class_name": type(sampling.scheduler).__name__, **_without_versions(config)},
            labels=labels,
            class_rows=rows,
            class_names={str(row): name for row, name in names.items()},
            null_class_id=sampling.null_class_id,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_channels=settings.guidance_channels,
            guidance_interval=list(settings.guidance_interval),
            seed=settings.seed,
            resolution=resolution,
            dtype=str(dtype).removeprefix("torch."),
            images_per_pass=images_per_pass or max(1, min(MOST_PER_PASS, TOKENS_PER_PASS // tokens)),
            device=device.type,
            num_threads=torch.get_num_threads() if device.type == "cpu" else None,
        )

    def label(self, number: int) -> int:
        """Row of the label table of an image."""
        if self.labels == "balanced":
            return self.class_rows[number % len(self.class_rows)]
        generator = keyed_generator(self.seed, "label", number)
        return self.class_rows[int(torch.randint(len(self.class_rows), (), generator=generator))]

    def numbers_of(self, one_pass: int) -> range:
        """Numbers of the images that a pass computes."""
        return range(one_pass * self.images_per_pass, (one_pass + 1) * self.images_per_pass)

    def passes(self, num_images: int, *, rank: int = 0, world: int = 1) -> Iterator[int]:
        """The passes of one of several processes, so that all passes of the first images are somebody's."""
        return iter(range(rank, -(-num_images // self.images_per_pass), world))

    def differences(self, other: "ImageSet") -> list[str]:
        """In what another set differs, a phrase per part; empty if its images are the same."""
        compared = [each.name for each in dataclasses.fields(self) if each.compare]
        # By way of JSON, because a tuple and a list are the same there.
        one, two = (json.loads(json.dumps(dataclasses.asdict(each))) for each in (self, other))
        return [f"{name}: {_short(one[name])} and {_short(two[name])}" for name in compared if one[name] != two[name]]


@dataclass(frozen=True)
class Manifest:
    """What a folder of generated images is.

    Attributes:
        image_set: What the images follow from.
        num_images: How many there are to be.
        format: One of `FORMATS`.
        complete: Whether all of them are there.
        environment: Versions and device, which are told and not compared.
        files: Packed files that hold the images, by name, with their SHA-256; empty for PNG.
    """

    image_set: ImageSet
    num_images: int
    format: str
    complete: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes it, whole or not at all."""
        document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_text(folder / MANIFEST, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            InputError: There is none, or it is damaged or of another version.
        """
        path = folder / MANIFEST
        document = read_object(path)
        try:
            if document.pop("format_version") != FORMAT_VERSION:
                raise InputError("another format")
            values = document.pop("image_set")
            check_values(path, {"image_set": values}, {"image_set": dict})
            check_values(path, values, get_type_hints(ImageSet))
            check_values(path, document, get_type_hints(cls))
            return cls(ImageSet(**values), **document)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no manifest of this version ({type(error).__name__}: {error}); overwrite_output_dir=true "
                "makes the set anew."
            ) from error


def is_image_set(folder: Path) -> bool:
    """Whether a folder holds generated images with their manifest."""
    return (folder / MANIFEST).is_file()


def _without_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config without what says where and by which version it was written."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
