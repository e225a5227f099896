r"""Generates many images from any DiT pipeline, on any number of processes: the same bytes each time.

50,000 images of a run, its classes in turn, into a folder that evaluate.py and any other tool scores:

    python train_scripts/generate_samples.py model=runs/quickstart output_dir=samples
    python train_scripts/evaluate.py models=samples

On eight GPUs, as ADM's and DiT's evaluation reads them:

    torchrun --nproc_per_node 8 train_scripts/generate_samples.py model=facebook/DiT-XL-2-256 format=npz \
        dtype=bfloat16 guidance_scale=1.5 guidance_channels=3 sampler=ddpm num_inference_steps=250 output_dir=samples

Whatever stops it, the same command resumes it. An image depends on the model, on these options and on its number, not
on batch_size, on how many processes there are, or on a stop; generated.json says what it depends on.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiTPipeline
from tqdm.auto import tqdm

from speed_diffusers.assets import EMBEDDED
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.data.moments import vae_factor, vae_fingerprint
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable, unfinished
from speed_diffusers.generation.generate import GenerationSettings, choose_classes, generate, row_names_of
from speed_diffusers.generation.image_files import (
    METADATA_FILE,
    PngWriter,
    finish,
    is_damaged,
    missing_numbers,
    remove_leftovers,
    remove_pngs,
    remove_set,
    to_bytes,
)
from speed_diffusers.generation.image_set import FORMATS, LABELS, MANIFEST, ImageSet, Manifest, is_image_set
from speed_diffusers.hardware import processor
from speed_diffusers.locks import LOCK_FILE, lock_output_dir
from speed_diffusers.training.parts import start_process
from speed_diffusers.training.snapshots import load_latest, warn_of_untrained_guidance

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class GenerateConfig(GenerationSettings):
    """Options of `generate_samples.py`."""

    model: str = option(
        EMBEDDED, "Run, pipeline folder, Hub id, or 'embedded' for the embedded checkpoint.", path=True
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    num_images: int = option(50_000, "Images; more than the folder holds are added to it.", interval="[1, 10^7]")
    class_labels: list[str] = option([], "Classes, names or rows of the label table; empty: all.")
    labels: str = option("balanced", "Balanced: classes in turn; random: each image's by the seed.", choices=LABELS)
    format: str = option("png", "A file each, parquet for datasets, or npz as ADM reads it.", choices=FORMATS)
    dtype: str = option("float32", "Arithmetic of the network; the autoencoder's is float32.", choices=tuple(DTYPES))
    batch_size: int = option(64, "Images that a process takes at once, in whole passes.", interval="[1, 10^6]")
    images_per_pass: int | None = option(
        None, "Images that the network sees at once; None: 4,096 tokens, at most 64 images.", interval="[1, 10^6]"
    )
    num_threads: int = option(
        1, "Threads of a process on the CPU; more processes are faster than more threads.", interval="[1, 1024]"
    )
    output_dir: str = option("samples", "Folder of the images.", path=True)
    overwrite_output_dir: bool = option(False, "Delete the images that the folder holds.")


def main(argv: list[str]) -> None:
    """Generates what is missing of the set that the options describe.

    Raises:
        InputError: Wrong options, or a folder that holds something else; nothing has been written.
        FloatingPointError: The model generated what is not finite.
        OSError: The disk is full, read-only or broken; the same command goes on from there.
    """
    config = load_config(GenerateConfig, argv, Path(__file__).resolve().parent)
    state = start_process()
    if state.device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    folder = Path(config.output_dir)
    if state.is_main_process:
        check_writable("output_dir", folder)
    with state.main_process_first():  # who downloads
        pipeline: DiTPipeline = load_latest(config.model, revision=config.revision)
    image_set = describe(config, pipeline, state.device)
    wanted = Manifest(image_set, config.num_images, config.format, environment=environment_of(state.device))
    with locked(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            open_folder(folder, wanted, overwrite=config.overwrite_output_dir)
        state.wait_for_everyone()
        manifest = Manifest.load(folder)
        if not manifest.complete:
            if state.is_main_process:
                warn_of_untrained_guidance(config.model, config.guidance_scale)
            # The method of the class would warn of modules that should stay in float32, of which DiT has none.
            torch.nn.Module.to(pipeline.transformer, DTYPES[config.dtype])
            generate_missing(pipeline.to(state.device), manifest, folder, config, state)
            state.wait_for_everyone()
            if state.is_main_process:
                manifest = finish(folder, manifest)
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"{manifest.num_images:,} images: {', '.join(str(folder / name) for name in manifest.files) or folder}")
    state.destroy_process_group()


def describe(config: GenerateConfig, pipeline: DiTPipeline, device: torch.device) -> ImageSet:
    """The set that the options ask for.

    Raises:
        InputError: The pipeline cannot generate it.
    """
    config.check_fits(pipeline)
    rows = None
    if config.class_labels:
        last_row = pipeline.transformer.config.num_embeds_ada_norm
        rows = list(choose_classes(config.class_labels, row_names_of(pipeline), last_row=last_row))
    return ImageSet.of(
        pipeline,
        config,
        model=config.model,
        vae_sha256=vae_fingerprint(pipeline.vae),
        resolution=pipeline.transformer.config.sample_size * vae_factor(pipeline.vae),
        labels=config.labels,
        class_rows=rows,
        dtype=DTYPES[config.dtype],
        images_per_pass=config.images_per_pass,
        device=device,
    )


def environment_of(device: torch.device) -> dict[str, str]:
    """Versions and device, on which the last bit of an image may depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"torch": str(torch.__version__), "diffusers": diffusers.__version__, "device": name}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other launches from writing to it.

    Raises:
        InputError: Another launch writes to it, or it holds other files than a set of images.
    """
    if folder.is_dir() and not is_image_set(folder) and _others_in(folder):
        raise InputError(f"output_dir={folder}: the folder holds other files; take an empty one.")
    lock = lock_output_dir(folder)
    try:
        yield
    finally:
        # Removed while it is held, so that it is nobody else's.
        if lock is not None:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()


def _others_in(folder: Path) -> list[str]:
    """Files of a folder without a manifest that no launch of this script has left, killed before it wrote one."""
    ours = {folder / LOCK_FILE, *unfinished(folder, MANIFEST)}
    return [each.name for each in folder.iterdir() if each not in ours]


def open_folder(folder: Path, wanted: Manifest, *, overwrite: bool) -> None:
    """Makes the folder ready for a set; for who has locked it.

    Args:
        folder: An empty one, or one with a set of images.
        wanted: What is asked for; saved, unless all of it is there.
        overwrite: Delete the set that the folder holds.

    Raises:
        InputError: The folder holds other images.
    """
    remove_leftovers(folder)
    if is_image_set(folder) and overwrite:
        remove_set(folder)
    if is_image_set(folder):
        there = Manifest.load(folder)
        check_same_set(folder, there, wanted)
        if there.complete and there.files and not is_damaged(folder, there):
            remove_pngs(folder)  # of a process that was killed between packing and this
            return
    (folder / METADATA_FILE).unlink(missing_ok=True)
    wanted.save(folder)


def check_same_set(folder: Path, there: Manifest, wanted: Manifest) -> None:
    """Checks that what a folder holds is part of what is asked for.

    Raises:
        InputError: It is not; the message says in what they differ.
    """
    changes = there.image_set.differences(wanted.image_set)
    if there.format != wanted.format:
        changes.append(f"format: {there.format} and {wanted.format}")
    if there.num_images > wanted.num_images or (there.files and there.num_images != wanted.num_images):
        changes.append(f"num_images: {there.num_images} and {wanted.num_images}")
    if changes:
        raise InputError(
            f"output_dir={folder} holds other images ({'; '.join(changes)}): take another folder, or delete them with "
            "overwrite_output_dir=true."
        )
    if there.environment != wanted.environment:
        logger.warning(
            "%s was begun with %s, and goes on with %s: the last bit of an image may differ.",
            folder,
            there.environment,
            wanted.environment,
        )


def generate_missing(
    pipeline: DiTPipeline, manifest: Manifest, folder: Path, config: GenerateConfig, state: PartialState
) -> None:
    """Generates and writes the images of this process that are missing or damaged."""
    image_set = manifest.image_set
    todo = list(missing_passes(manifest, folder, state))
    pipeline.set_progress_bar_config(disable=True)
    bar = tqdm(
        total=sum(len(numbers) for _, numbers in todo),
        desc="Images" if state.num_processes == 1 else f"Images of process 1 of {state.num_processes}",
        unit="image",
        **hidden(not state.is_main_process),
    )
    at_once = -(-config.batch_size // image_set.images_per_pass)
    with bar, PngWriter(folder) as writer:
        for start in range(0, len(todo), at_once):
            made = []
            for one_pass, numbers in todo[start : start + at_once]:
                made += [
                    image for image in images_of_pass(pipeline, image_set, one_pass, config) if image[0] in numbers
                ]
                bar.update(len(numbers))
            writer.write(made)


def hidden(is_hidden: bool) -> dict[str, Any]:
    """Options of a progress bar: nothing where it may show, for what is given there TQDM_DISABLE cannot change."""
    return {"disable": True} if is_hidden else {}


def missing_passes(manifest: Manifest, folder: Path, state: PartialState) -> Iterator[tuple[int, set[int]]]:
    """The passes of this process of which something is missing, and the numbers of those images."""
    image_set, world = manifest.image_set, state.num_processes
    passes = list(image_set.passes(manifest.num_images, rank=state.process_index, world=world))
    silent = not state.is_main_process or not any(folder.glob("*.png"))
    for one_pass in tqdm(passes, desc="Looking at what is there", unit="pass", **hidden(silent)):
        numbers = [number for number in image_set.numbers_of(one_pass) if number < manifest.num_images]
        if missing := missing_numbers(folder, numbers, image_set.resolution):
            yield one_pass, set(missing)


def images_of_pass(
    pipeline: DiTPipeline, image_set: ImageSet, one_pass: int, config: GenerateConfig
) -> Iterator[tuple[int, Any]]:
    """All images of a pass, those that nobody asked for too, with their numbers."""
    numbers = image_set.numbers_of(one_pass)
    settings = dataclasses.replace(config, batch_size=len(numbers))
    labels = [image_set.label(number) for number in numbers]
    (images,) = generate(pipeline, labels, settings, first_image=numbers.start)
    return zip(numbers, to_bytes(images), strict=True)


if __name__ == "__main__":
    run_script(main, __doc__, GenerateConfig)
