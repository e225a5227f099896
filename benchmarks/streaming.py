"""What a stream of ImageNet's size costs to start, to resume and to read, and what a hundred images out of it cost.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py work_dir=/tmp/streaming

Makes parquet shards of 1,281,167 PNGs of 4x4 pixels, in row groups of 100 as `datasets` writes images; half a minute,
and 300 MB of disk. Their pixels are not decoded: what is measured is everything else. Starting is to open, to make the
signature and to have the first batch of 256, encoded; resuming is the same at 90 % of the first epoch. Reading is what
follows, batch by batch. A hundred images are those of max_train_samples=100, streamed, and opened to be cached, which
must not convert the rest. Files are in the system's cache; beside the time by the clock stands the processor's, for a
machine may have other work. Results: result.json in streaming/ beside this file.
"""

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from measurement import environment, load_average
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.data.batch_sampler import BatchLayout
from speed_diffusers.data.images import open_images
from speed_diffusers.data.streaming import StreamSource, open_stream
from speed_diffusers.data.streaming_order import StreamOrder
from speed_diffusers.data.streaming_reader import StreamReader

GROUP_ROWS = 100
FEW_IMAGES = 100
NUM_CLASSES = 1000
GOALS = {"start": 30.0, "resume": 30.0, "few_streamed": 10.0, "few_cached": 10.0}
"""Seconds at most, by the clock."""


@dataclass
class StreamingConfig(Options):
    """All options of this benchmark."""

    work_dir: str | None = option(None, "Where the shards are made and removed; None: a temporary folder.", path=True)
    results_dir: str = option(str(Path(__file__).resolve().parent / "streaming"), "Where the results go.", path=True)
    num_images: int = option(1_281_167, "Images in all; ImageNet's.", interval="[1000, 10^8]")
    num_files: int = option(256, "Shards.", interval="[1, 10^4]")
    batch_size: int = option(256, "Images of a batch.", interval="[1, 10^5]")
    shuffle_buffer_size: int = option(10_000, "As for the training.", interval="[1, 10^9]")
    num_batches: int = option(400, "Batches that are read.", interval="[1, 10^6]")
    seed: int = option(0, "Of data and order.", interval="[0, 2^63)")


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and of the processor."""

    seconds: float
    processor_seconds: float


def main(argv: list[str]) -> None:
    """Measures, writes the results and prints them.

    Raises:
        InputError: Wrong options; nothing has been written.
    """
    config = load_config(StreamingConfig, argv, Path(__file__).resolve().parent)
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="streaming-") as folder:
        make_shards(config, Path(folder) / "shards")
        settings = {name: value for name, value in asdict(config).items() if not name.endswith("_dir")}
        result = {"settings": settings, "environment": environment(), "load_average": load_average()}
        result |= measure(config, Path(folder) / "shards", Path(folder) / "cache")
    results = Path(config.results_dir)
    results.mkdir(parents=True, exist_ok=True)
    (results / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("costs", "goals_met", "images_per_second", "memory_mb")}))


def make_shards(config: StreamingConfig, folder: Path) -> None:
    """Parquet files of noise, with random classes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(config.seed)
    images = [encoded_noise(rng) for _ in range(1024)]
    names = [f"n{label:08}" for label in range(NUM_CLASSES)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    sizes = np.diff(np.linspace(0, config.num_images, config.num_files + 1).astype(int))
    for number, size in enumerate(tqdm(sizes.tolist(), "Making shards", unit="file", leave=False)):
        chosen = [images[index] for index in rng.integers(len(images), size=size)]
        column = pa.StructArray.from_arrays([pa.array(chosen), pa.nulls(size, pa.string())], ["bytes", "path"])
        table = pa.table({"image": column, "label": rng.integers(NUM_CLASSES, size=size)})
        file = folder / f"train-{number:05}-of-{config.num_files:05}.parquet"
        pq.write_table(table.cast(features.arrow_schema), file, row_group_size=GROUP_ROWS)


def encoded_noise(rng: np.random.Generator) -> bytes:
    """A PNG of 4x4 pixels."""
    file = BytesIO()
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def measure(config: StreamingConfig, shards: Path, cache: Path) -> dict[str, object]:
    """Everything that is written, by name."""
    steps = config.num_images // config.batch_size
    before = peak_memory()

    def begin(step: int) -> StreamReader:
        source = open_stream(train_data_dir=str(shards))
        source.signature()
        reader = reader_of(config, source, step, steps + config.num_batches)
        next(iter(reader))
        return reader

    def few_cached() -> None:
        source = open_images(train_data_dir=str(shards), max_train_samples=FEW_IMAGES, cache_dir=str(cache))
        source.signature()

    costs = {
        "start": cost(lambda: begin(0)),
        "resume": cost(lambda: begin(steps * 9 // 10)),
        "few_streamed": cost(
            lambda: open_stream(train_data_dir=str(shards), max_train_samples=FEW_IMAGES).signature()
        ),
        "few_cached": cost(few_cached),
    }
    assert not cache.exists(), "nothing is converted for a hundred images"
    reading = iter(begin(0))
    next(reading)
    read = cost(lambda: sum(len(batch) for batch in islice(reading, config.num_batches)))
    reading.close()  # type: ignore[attr-defined]
    shutil.rmtree(shards)
    return {
        "costs": {name: asdict(each) for name, each in costs.items()},
        "goals": GOALS,
        "goals_met": {name: costs[name].seconds <= goal for name, goal in GOALS.items()},
        "images_per_second": round(config.num_batches * config.batch_size / read.seconds),
        "memory_mb": round(peak_memory() - before),
    }


def reader_of(config: StreamingConfig, source: StreamSource, first_step: int, max_steps: int) -> StreamReader:
    """What a training on one process reads its batches from, from an optimizer step on."""
    order = StreamOrder(
        np.diff(source.starts),
        BatchLayout(config.batch_size),
        shuffle_buffer_size=config.shuffle_buffer_size,
        seed=config.seed,
        first_step=first_step,
        max_steps=max_steps,
    )
    return StreamReader(source, order)


def cost(work: Callable[[], object]) -> Cost:
    """What it costs to do something once."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return Cost(round(time.perf_counter() - clock, 6), round(time.process_time() - processor, 6))


def peak_memory() -> float:
    """The most that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    run_script(main, __doc__, StreamingConfig)
