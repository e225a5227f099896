"""Whether a cache of a million latents costs what one of ten thousand costs: rows per second, memory, seeking, start.

    OMP_NUM_THREADS=1 python benchmarks/latent_cache.py work_dir=/tmp/latent_cache

Makes caches of random moments by the code that writes real ones: 8x16x16, 4,096 bytes an image, a quarter of what
ImageNet's at 256x256 take, so that a million fit into the system's file cache. Reads random batches of both by turns
in one process, after every byte has been read once, so that the disk does not count; and batches of ten thousand rows
that lie all over the million, again and again: for these the processor's caches do what they do for the small cache,
and what is left is the cost of the format. Each size's memory is that of a process of its own (proportional set size,
with the processes of a DataLoader), before and after reading. Seeking is to open a cache and get the first batch at
90 % of an epoch. Start-up is what a training does before its first step, at ImageNet's size: open class folders of
1,281,167 files (hard links to one image a class) or a parquet file, make fingerprint and signature, look at every
shard of a finished cache, and order an epoch. How long it takes to verify every byte is measured beside it.

Ten minutes, most of which makes the data; 5 GB of disk, and of memory for files, while it runs. Linux only. Results:
result.json and latent_cache.png in latent_cache/ beside this file.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from measurement import environment, load_average
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.data.batch_sampler import BatchLayout, BatchOrder
from speed_diffusers.data.images import collate, open_images
from speed_diffusers.data.latents import LatentDataset
from speed_diffusers.data.latents_encoding import survey, write_header
from speed_diffusers.data.latents_shard import CacheHeader, rows_per_shard, write_shard

SMALL_SIDE = 4
"""Of the latents in the start-up's cache, of which only headers are read."""

GOALS = {"rate_ratio": 0.9, "memory_rise_mb": 150.0, "seek_seconds": 3.0, "start_up_seconds": 30.0}
"""Ratio at least, the others at most."""


@dataclass
class LatentCacheConfig(Options):
    """All options of this benchmark."""

    work_dir: str | None = option(None, "Where the data is made and removed; None: a temporary folder.", path=True)
    results_dir: str = option(
        str(Path(__file__).resolve().parent / "latent_cache"), "Where the results go.", path=True
    )
    small_rows: int = option(10_000, "Images of the small cache.", interval="[1, 10^7]")
    large_rows: int = option(1_000_000, "Images of the large cache.", interval="[1, 10^7]")
    start_up_rows: int = option(1_281_167, "Images of the start-up; ImageNet's.", interval="[1000, 10^7]")
    side: int = option(16, "Side of the latents, of 4 channels.", interval="[1, 128]")
    batch_size: int = option(256, "Rows of a batch.", interval="[1, 10^5]")
    block_batches: int = option(100, "Batches of a block.", interval="[1, 10^5]")
    pairs: int = option(20, "Pairs of blocks, one of each cache.", interval="[1, 1000]")
    memory_batches: int = option(1000, "Batches that are read before memory is looked at.", interval="[1, 10^6]")
    num_workers: int = option(2, "Processes of the DataLoader.", interval="[1, 64]")
    seed: int = option(0, "Of data and order.", interval="[0, 2^63)")


def main(argv: list[str]) -> None:
    """Measures, writes the results and prints them.

    Raises:
        InputError: Wrong options; nothing has been written.
    """
    settings = load_config(LatentCacheConfig, argv, Path(__file__).parent)
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="latent-cache-", dir=settings.work_dir) as folder:
        result = measure(settings, Path(folder))
    result["goals"] = GOALS
    result["protocol"] = {
        "bytes_per_row": 2 * 8 * settings.side**2,
        **{name: value for name, value in vars(settings).items() if name not in ("work_dir", "results_dir")},
        "load_before": load,
    }
    result["environment"] = environment()
    results = Path(settings.results_dir)
    results.mkdir(parents=True, exist_ok=True)
    (results / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    save_picture(result, results / "latent_cache.png")
    print(describe(result))


def measure(settings: LatentCacheConfig, folder: Path) -> dict[str, Any]:
    """Everything, one after the other; data is removed as soon as it is not needed any more."""
    sizes = {"small": settings.small_rows, "large": settings.large_rows}
    caches = {name: make_cache(folder / name, rows, settings.side, settings.seed) for name, rows in sizes.items()}
    result: dict[str, Any] = {
        "rate": reading_rates(caches, settings),
        "memory": {name: memory_of(cache, settings) for name, cache in caches.items()},
        "seek": {name: seek(cache, settings) for name, cache in caches.items()},
        "verify": verification(caches["large"]),
    }
    for name in sizes:
        shutil.rmtree(folder / name)
    result["start_up"] = start_up(folder, settings)
    return result


def make_cache(folder: Path, num_rows: int, side: int, seed: int) -> Path:
    """A finished cache of random bytes as moments."""
    shape = (8, side, side)
    header = CacheHeader("made", "none", 8 * side, True, False, num_rows, shape, 0)
    header = replace(header, rows_per_shard=rows_per_shard(num_rows, header.column_bytes))
    folder.mkdir(parents=True)
    write_header(folder, header)
    generator = np.random.default_rng(seed)
    for index in tqdm(range(header.num_shards), desc=f"{num_rows:,} rows", unit="shard"):
        count = len(header.rows_of(index))
        moments = generator.integers(0, 2**16, (count, *shape), dtype=np.uint16).view(np.float16)
        write_shard(folder, header, index, {"moments": moments}, generator.integers(0, 1000, count), [])
    return folder


def reading_rates(caches: dict[str, Path], settings: LatentCacheConfig) -> dict[str, Any]:
    """Rows per second of the trainer's batches: blocks of both caches by turns, and the ratios of neighbours."""
    opened = {name: LatentDataset(folder) for name, folder in caches.items()}

    small, large = (len(dataset) for dataset in opened.values())
    # As many rows as the small cache has, all over the large one: what lies in the processor's caches is then alike.
    spread = np.arange(small) * large // small
    arms = {"small": ("small", None), "large": ("large", None), "spread": ("large", spread)}

    def block(name: str, number: int) -> float:
        dataset, chosen = opened[arms[name][0]], arms[name][1]
        first = number * settings.block_batches
        order = BatchOrder(
            len(dataset) if chosen is None else len(chosen),
            BatchLayout(settings.batch_size),
            seed=settings.seed,
            first_step=first,
            max_steps=first + settings.block_batches,
        )
        batches = [rows if chosen is None else chosen[rows].tolist() for rows in order]
        began = time.perf_counter()
        count = sum(len(batch["labels"]) for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=collate))
        return count / (time.perf_counter() - began)

    for dataset in opened.values():
        # Every byte is in the system's cache and every shard has been opened.
        for begin in range(0, len(dataset), settings.batch_size):
            dataset.__getitems__(list(range(begin, min(begin + settings.batch_size, len(dataset)))))
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for pair in tqdm(range(settings.pairs), desc="Random batches", unit="pair"):
        for name in arms if pair % 2 == 0 else reversed(arms):
            rates[name].append(block(name, pair))
    found: dict[str, Any] = {"rows_per_second": {name: median(values) for name, values in rates.items()}}
    for name in ("large", "spread"):
        ratios = [value / small for value, small in zip(rates[name], rates["small"], strict=True)]
        draws = np.random.default_rng(settings.seed).choice(ratios, (2000, len(ratios)))
        found[f"ratio_{name}"] = median(ratios)
        found[f"ratio_{name}_interval_95"] = np.quantile(np.median(draws, axis=1), (0.025, 0.975)).tolist()
    return found | {"blocks": rates}


def memory_of(folder: Path, settings: LatentCacheConfig) -> dict[str, float]:
    """MB that reading takes: in the process that reads, and in a process with the workers that read for it."""

    def alone(settings: LatentCacheConfig) -> None:
        dataset = LatentDataset(folder)
        generator = np.random.default_rng(settings.seed)
        for _ in range(settings.memory_batches):
            dataset.__getitems__(generator.integers(0, len(dataset), settings.batch_size).tolist())

    def with_workers(settings: LatentCacheConfig) -> Iterator[object]:
        dataset = LatentDataset(folder)
        return iter(loader(dataset, settings, first_step=0, steps=settings.memory_batches + 8))

    def workers_read(settings: LatentCacheConfig) -> object:
        batches = with_workers(settings)
        for _ in range(settings.memory_batches):
            next(batches)
        return batches

    return {"alone": rise_mb(alone, settings), "with_workers": rise_mb(workers_read, settings)}


def loader(dataset: LatentDataset, settings: LatentCacheConfig, *, first_step: int, steps: int) -> DataLoader[Any]:
    """As the trainer's, with forked workers, which need no second to start."""
    order = BatchOrder(
        len(dataset),
        BatchLayout(settings.batch_size),
        seed=settings.seed,
        first_step=first_step,
        max_steps=first_step + steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=settings.num_workers,
        multiprocessing_context="fork",
    )


def rise_mb(work: Callable[[LatentCacheConfig], object], settings: LatentCacheConfig) -> float:
    """By how much a process and its children grow by some work, whose result they keep meanwhile."""
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def watched() -> None:
        before = proportional_bytes()
        kept = work(settings)
        found.put((proportional_bytes() - before) / 1e6)
        del kept

    process = context.Process(target=watched)
    process.start()
    process.join()
    assert process.exitcode == 0
    return float(found.get())


def proportional_bytes() -> int:
    """Proportional set size of this process and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    texts = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in ("self", *children)]
    return sum(int(line.split()[1]) * 1024 for text in texts for line in text.splitlines() if line.startswith("Pss:"))


def seek(folder: Path, settings: LatentCacheConfig) -> float:
    """Seconds to open a cache and get the first batch at 90 % of an epoch from a DataLoader."""
    began = time.perf_counter()
    dataset = LatentDataset(folder)
    step = int(0.9 * len(dataset)) // settings.batch_size
    batch = next(iter(loader(dataset, settings, first_step=step, steps=2)))
    assert len(batch["labels"]) == settings.batch_size
    return time.perf_counter() - began


def verification(folder: Path) -> dict[str, float]:
    """Seconds to look at all shards' headers, and to verify every byte; GB per second of the latter."""
    header = LatentDataset(folder).header
    seconds = {}
    for name in ("headers", "everything"):
        began = time.perf_counter()
        wrong, _ = survey(folder, header, verify=name == "everything")
        seconds[name] = time.perf_counter() - began
        assert not wrong
    size = sum(map(header.bytes_of, range(header.num_shards)))
    return seconds | {"gigabytes": size / 1e9, "gigabytes_per_second": size / 1e9 / seconds["everything"]}


def start_up(folder: Path, settings: LatentCacheConfig) -> dict[str, Any]:
    """Seconds of the parts of a start, each the second time that it is done."""
    rows = settings.start_up_rows
    found: dict[str, Any] = {"images": rows}
    cache = make_cache(folder / "cache", rows, SMALL_SIDE, settings.seed)
    header = LatentDataset(cache).header
    common = {
        "look at shards": lambda: survey(cache, header, verify=False),
        "order": lambda: BatchOrder(
            rows, BatchLayout(settings.batch_size), seed=settings.seed, first_step=0, max_steps=1
        ).permutation(0),
    }
    shards = {name: warm_seconds(work) for name, work in common.items()}
    shutil.rmtree(cache)
    for kind, made in (("parquet", parquet_file), ("class folders", class_folders)):
        with made(folder / kind.replace(" ", "_"), rows) as data:

            def open_data(data: Path = data) -> Any:
                return open_images(train_data_dir=str(data), cache_dir=str(folder / "datasets"))

            parts = {"open, with fingerprint": warm_seconds(open_data)}
            source = open_data()
            assert len(source) == rows
            parts["signature"] = warm_seconds(source.signature)
            del source
            parts |= shards
            found[kind] = parts | {"total": sum(parts.values())}
        shutil.rmtree(folder / "datasets", ignore_errors=True)
    return found


def warm_seconds(work: Callable[[], object]) -> float:
    """Of the second time."""
    for _ in range(2):
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    return seconds


def small_png() -> bytes:
    """An image of 8x8 pixels."""
    file = BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(file, "PNG")
    return file.getvalue()


@contextmanager
def parquet_file(path: Path, rows: int) -> Iterator[Path]:
    """A parquet file with one small image again and again, of 1,000 classes."""
    path.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=1000))
    image = {"bytes": small_png(), "path": None}
    columns = {"image": [image] * rows, "label": [row * 1000 // rows for row in range(rows)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path / "train.parquet")
    yield path
    shutil.rmtree(path)


@contextmanager
def class_folders(path: Path, rows: int) -> Iterator[Path]:
    """1,000 folders of hard links to one small image each, for no file system has room for a million files at once."""
    for label in tqdm(range(1000), desc=f"{rows:,} files", unit="class"):
        own = path / f"n{label:08d}"
        own.mkdir(parents=True)
        first = own / "0.png"
        first.write_bytes(small_png())
        for row in range(1, rows * (label + 1) // 1000 - rows * label // 1000):
            os.link(first, own / f"{row}.png")
    yield path
    shutil.rmtree(path)


def describe(result: dict[str, Any]) -> str:
    """The results in lines, each with its goal."""
    rate, protocol = result["rate"], result["protocol"]
    rows = {name: f"{protocol[f'{name}_rows']:,}" for name in ("small", "large")}
    lines = [f"batches of {protocol['batch_size']}: {rate['rows_per_second']['small']:,.0f} rows/s of {rows['small']}"]
    for name, what in (("large", ""), ("spread", f"{rows['small']} of ")):
        low, high = rate[f"ratio_{name}_interval_95"]
        lines.append(
            f"{rate['rows_per_second'][name]:,.0f} rows/s of {what}{rows['large']}: ratio {rate[f'ratio_{name}']:.3f} "
            f"({low:.3f} to {high:.3f}; goal: at least {GOALS['rate_ratio']})"
        )
    for name in result["memory"]["small"]:
        small, large = (result["memory"][size][name] for size in ("small", "large"))
        lines.append(
            f"memory, {name.replace('_', ' ')}: {small:.1f} and {large:.1f} MB; rise {large - small:.1f} MB (goal: at "
            f"most {GOALS['memory_rise_mb']:.0f})"
        )
    seek, verify, start = result["seek"], result["verify"], result["start_up"]
    lines.append(
        f"first batch at 90 % of an epoch: {seek['small']:.2f} and {seek['large']:.2f} s (goal: at most "
        f"{GOALS['seek_seconds']:.0f})"
    )
    lines.append(
        f"of {rows['large']}: all headers {verify['headers']:.2f} s, every byte {verify['everything']:.2f} s "
        f"({verify['gigabytes_per_second']:.2f} GB/s)"
    )
    for kind in ("parquet", "class folders"):
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in start[kind].items() if part != "total")
        lines.append(
            f"start-up of {start['images']:,} images, {kind}: {start[kind]['total']:.1f} s (goal: at most "
            f"{GOALS['start_up_seconds']:.0f}): {parts}"
        )
    return "\n".join(lines)


def save_picture(result: dict[str, Any], path: Path) -> None:
    """Rows per second of each block, and what a start is made of."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    protocol, rate = result["protocol"], result["rate"]
    small, large = (f"{protocol[f'{name}_rows']:,}" for name in ("small", "large"))
    labels = {"small": f"{small} images", "large": f"{large} images", "spread": f"{small} of {large} images"}
    for (name, label), colour in zip(labels.items(), ("0.5", "tab:blue", "tab:orange"), strict=True):
        left.plot([value / 1e3 for value in rate["blocks"][name]], "o-", color=colour, label=label, markersize=3)
    left.set_ylim(bottom=0)
    left.set_xlabel("block, by turns")
    left.set_ylabel("thousand rows per second")
    left.set_title(f"Random batches: ratio {rate['ratio_large']:.2f}", fontsize=10)
    left.legend(frameon=False, loc="lower right")
    start = result["start_up"]
    kinds = ["parquet", "class folders"]
    ends = [0.0] * len(kinds)
    for part in (part for part in start[kinds[0]] if part != "total"):
        seconds = [start[kind][part] for kind in kinds]
        right.barh(kinds, seconds, left=ends, label=part, height=0.5)
        ends = [end + second for end, second in zip(ends, seconds, strict=True)]
    for place, end in enumerate(ends):
        right.text(end, place, f" {end:.1f} s", va="center", fontsize=9)
    right.margins(x=0.15, y=0.5)
    right.set_xlabel("seconds, warm")
    right.set_title(f"Start-up with {start['images']:,} images", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, __doc__, LatentCacheConfig)
