"""Images that are streamed from shards: those of `open_images` for the same data, whoever reads them."""

import logging
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from small_images import image_rows
from speed_diffusers.data import shards, streaming_reader
from speed_diffusers.data.batch_sampler import BatchLayout
from speed_diffusers.data.images import BAD_ROWS, collate, find_bad_images, open_images
from speed_diffusers.data.listing import describe_images
from speed_diffusers.data.shards import ParquetShards, Stretch
from speed_diffusers.data.streaming import EncodedImage, StreamSource, open_stream
from speed_diffusers.data.streaming_order import StreamOrder
from speed_diffusers.data.streaming_reader import StreamDataset, StreamReader
from speed_diffusers.errors import InputError

SIZES = (70, 33, 90)
NAMES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "STRETCH_ROWS", 32)


def write_shards(folder: Path, labels: list[Any], feature: Any, images: list[dict[str, Any]] | None = None) -> Path:
    """Three files of 193 rows in all, with row groups of 16; the images as from `image_rows`."""
    images = image_rows(sum(SIZES)) if images is None else images
    features = datasets.Features(image=datasets.Image(), label=feature)
    folder.mkdir()
    begin = 0
    for number, count in enumerate(SIZES):
        rows = slice(begin, begin + count)
        data = datasets.Dataset.from_dict({"image": images[rows], "label": labels[rows]}, features=features)
        data.to_parquet(folder / f"train-{number:05}-of-00003.parquet", batch_size=16)
        begin += count
    return folder


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = [row % 3 for row in range(sum(SIZES))]
    return write_shards(tmp_path_factory.mktemp("shards") / "images", labels, datasets.ClassLabel(names=NAMES))


def reader(
    source: StreamSource,
    per_device: int = 12,
    processes: int = 1,
    rank: int = 0,
    *,
    first_step: int = 0,
    steps: int = 40,
) -> StreamReader:
    layout = BatchLayout(per_device, processes, rank)
    rows = np.diff(source.starts)
    order = StreamOrder(rows, layout, shuffle_buffer_size=40, seed=3, first_step=first_step, max_steps=steps)
    return StreamReader(source, order)


def loaded(source: StreamSource, workers: int = 0, **options: int) -> list[dict[str, Tensor]]:
    """Decoded batches through a loader."""
    context = "forkserver" if workers else None
    return list(
        DataLoader(
            StreamDataset(source, resolution=8),
            batch_sampler=reader(source, **options),
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=context,
        )
    )


def assert_same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Ledger:
    """Notes which rows are read from the shards, and by how many reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: Counter[int] = Counter()
        self.reads = 0
        read = StreamSource.read

        def noting(source: StreamSource, stretch: Stretch, begin: int, first: int) -> Iterator[list[EncodedImage]]:
            self.reads += 1
            for images in read(source, stretch, begin, first):
                self.rows.update(image.row for image in images)
                yield images

        monkeypatch.setattr(StreamSource, "read", noting)


@pytest.mark.parametrize("kind", ["parquet", "one file", "saved", "saved and chosen", "large row groups"])
def test_a_stream_has_the_rows_of_the_same_data_on_the_disk(
    kind: str, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = shard_folder, open_images(train_data_dir=str(shard_folder), cache_dir=str(tmp_path / "cache"))
    if kind == "large row groups":
        monkeypatch.setattr(shards, "WHOLE_BYTES", 0)
        monkeypatch.setattr(shards, "BATCH_ROWS", 5)
    if kind == "one file":
        path = shard_folder / "train-00001-of-00003.parquet"
        whole = open_images(train_data_dir=str(path), cache_dir=str(tmp_path / "cache"))
    elif kind.startswith("saved"):
        files = sorted(map(str, shard_folder.glob("*.parquet")))
        saved = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))  # type: ignore[arg-type]
        chosen = saved.select(range(192, -1, -1)) if kind == "saved and chosen" else saved
        chosen.save_to_disk(path := tmp_path / "saved")
        whole = open_images(train_data_dir=str(path))
    source = open_stream(train_data_dir=str(path))
    assert len(source) == len(whole) and source.label_names == whole.label_names == NAMES
    assert source.labels_of(range(len(source))).tolist() == whole.labels.tolist()
    for row in range(len(whole)):
        assert (source.load(row, 8) == whole.load(row, 8)).all()
    for images in reader(source, steps=17):
        for row, image, label in images:
            assert (source.decode(image, row, 8, True) == whole.load(row, 8)).all() and label == whole.labels[row]
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 20_000, "it goes to every worker"
    assert again.load(7, 8).tolist() == whole.load(7, 8).tolist() and again.signature() == source.signature()


def test_the_plan_says_what_is_streamed(shard_folder: Path) -> None:
    described = describe_images(open_stream(train_data_dir=str(shard_folder)))
    assert described == "193 images, 3 classes (0 'cat' to 2 'eel'), streamed from 3 parquet files"
    without = describe_images(open_stream(train_data_dir=str(shard_folder), label_column=None))
    assert without == "193 images, without classes, streamed from 3 parquet files"


def test_the_embedded_images_are_a_stream_too() -> None:
    source = open_stream(dataset_name="embedded")
    assert (len(source), source.num_classes, source.ignored) == (9000, 10, ())


def test_neither_processes_nor_a_stop_change_a_batch(shard_folder: Path) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    whole = loaded(source)
    assert len(whole) == 40, "two epochs and a half"
    assert_same(loaded(source, first_step=21), whole[21:])
    ranks = [loaded(source, per_device=4, processes=3, rank=rank, first_step=9) for rank in range(3)]
    together = [
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in zip(*ranks, strict=True)
    ]
    assert_same(together, whole[9:])


def test_what_is_read_is_read_once(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    ledger = Ledger(monkeypatch)
    used = Counter(image.row for images in reader(source, steps=16) for image in images)
    lanes = reader(source).order.num_lanes
    assert (used.total(), lanes) == (192, 6)
    # Whole stretches are read, of which two lanes may share one.
    assert ledger.reads <= len(source.stretches) + lanes - 1
    assert set(used) <= set(ledger.rows) and ledger.rows.total() <= 193 + 32 * (lanes - 1)


def test_a_resumed_reader_reads_no_more_than_the_stretches_it_was_in(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    ledger = Ledger(monkeypatch)
    used = [image.row for images in reader(source, first_step=12, steps=16) for image in images]
    stretches = set(np.searchsorted(source.starts, used, side="right").tolist())
    assert len(used) == 48
    assert ledger.reads <= len(stretches) + reader(source).order.num_lanes - 1
    assert ledger.rows.total() < 193


def test_a_reader_that_is_left_stops_its_threads(shard_folder: Path) -> None:
    batches = iter(reader(open_stream(train_data_dir=str(shard_folder)), steps=1000))
    next(batches)
    assert any(thread.name.startswith("read_stretch") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("read_stretch") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_good_image_stands_for_one_that_cannot_be_read(workers: int, tmp_path: Path) -> None:
    images = image_rows(sum(SIZES))
    for row in (5, 6, 69, 192):
        images[row]["bytes"] = b"no image"
    labels = [row % 3 for row in range(sum(SIZES))]
    folder = write_shards(tmp_path / "bad", labels, datasets.ClassLabel(names=NAMES), images)
    source = open_stream(train_data_dir=str(folder))
    assert [image.row for image in find_bad_images(source)] == [5, 6, 69, 192]
    whole = open_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    order = reader(source, steps=17).order
    for batch, rows in zip(loaded(source, workers, steps=17), order, strict=True):
        for pixels, label, row in zip(batch["pixel_values"], batch["labels"], rows, strict=True):
            expected, used, _ = whole.load_or_next(row, 8)
            assert (pixels.permute(1, 2, 0).numpy() == expected).all() and label == whole.labels[used]
        bad = [found.row for row in rows for found in whole.load_or_next(row, 8)[2]]
        assert batch[BAD_ROWS].tolist() == bad
    assert source.fault(5) == whole.fault(5)


@pytest.mark.parametrize(
    ("values", "feature", "names"),
    [
        (["b", "a", "c"], datasets.Value("string"), ["a", "b", "c"]),
        ([True, False, True], datasets.Value("bool"), ["false", "true"]),
        ([4, 0, 2], datasets.Value("int32"), ["0", "1", "2", "3", "4"]),
    ],
)
def test_classes_are_those_of_a_set_on_the_disk(
    values: list[Any], feature: Any, names: list[str], tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "data", [values[row % 3] for row in range(sum(SIZES))], feature)
    source = open_stream(train_data_dir=str(folder))
    whole = open_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    assert source.label_names == whole.label_names == names
    assert source.labels_of(range(193)).tolist() == whole.labels.tolist()


def test_a_limit_takes_a_share_that_is_spread_and_reads_no_rows_for_it(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(monkeypatch)
    source = open_stream(train_data_dir=str(shard_folder), max_train_samples=50)
    assert (len(source), source.num_classes, ledger.reads) == (50, 3, 1), "the first image is looked at"
    assert [image.row for image in find_bad_images(source)] == []
    assert len(source.stretches) == 8 and max(stretch.rows for stretch in source.stretches) <= 8
    assert open_stream(train_data_dir=str(shard_folder), max_train_samples=50).stretches == source.stretches
    for limit in (1, 2, 9, 100, 192, 193, 500):
        assert len(open_stream(train_data_dir=str(shard_folder), max_train_samples=limit)) == min(limit, 193)
    rows = source.spread(7)
    assert rows == sorted(set(rows)) and len(rows) == 7
    assert rows[0] == 0 and rows[-1] >= source.starts[-2], "from the first stretch to the last"


def test_the_signature_follows_the_content(shard_folder: Path, tmp_path: Path) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    elsewhere = shutil.copytree(shard_folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert open_stream(train_data_dir=str(elsewhere)).signature() == source.signature()
    labels = [min(row % 3 + (row == 100), 2) for row in range(sum(SIZES))]
    changed = write_shards(tmp_path / "changed", labels, datasets.ClassLabel(names=NAMES))
    assert open_stream(train_data_dir=str(changed)).signature() != source.signature()
    limited = open_stream(train_data_dir=str(shard_folder), max_train_samples=100)
    assert limited.signature() != source.signature()


def test_a_read_that_fails_is_tried_again_where_it_failed(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    whole = loaded(source)
    monkeypatch.setattr(shards, "WHOLE_BYTES", 0)
    monkeypatch.setattr(shards, "BATCH_ROWS", 5)
    monkeypatch.setattr(streaming_reader, "PAUSES", (0.0, 0.0))
    source = StreamSource(source.shards, "image", "label", is_remote=True)
    read, failures = ParquetShards.read, iter([True, False, True, True] + 10 * [False])

    def failing(self: ParquetShards, *arguments: Any) -> Iterator[pa.Table]:
        for number, table in enumerate(read(self, *arguments)):
            if number == 2 and next(failures, False):
                raise ConnectionResetError("reset by peer")
            yield table

    monkeypatch.setattr(ParquetShards, "read", failing)
    with caplog.at_level(logging.WARNING):
        assert_same(loaded(source), whole)
    assert len(caplog.records) == 3
    assert all("reset by peer. Trying again in 0 s." in record.getMessage() for record in caplog.records)

    def broken(self: ParquetShards, *arguments: Any) -> Iterator[pa.Table]:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(ParquetShards, "read", broken)
    with pytest.raises(InputError, match=r"^Cannot read '.*train-0000\d-of-00003.parquet': reset by peer\.$"):
        loaded(source)


def _negative(folder: Path) -> None:
    write_shards(folder, [-1] * sum(SIZES), datasets.Value("int64"))


def _huge(folder: Path) -> None:
    write_shards(folder, [10**9] * sum(SIZES), datasets.Value("int64"))


def _missing(folder: Path) -> None:
    write_shards(folder, [None, *[1] * (sum(SIZES) - 1)], datasets.ClassLabel(names=NAMES))


def _missing_name(folder: Path) -> None:
    write_shards(folder, [None, *["a"] * (sum(SIZES) - 1)], datasets.Value("string"))


def _fractions(folder: Path) -> None:
    write_shards(folder, [0.5] * sum(SIZES), datasets.Value("float32"))


def _no_images(folder: Path) -> None:
    write_shards(folder, [0] * sum(SIZES), datasets.Value("int64"), [{"bytes": b"text", "path": None}] * sum(SIZES))


def _damaged(folder: Path) -> None:
    write_shards(folder, [0] * sum(SIZES), datasets.Value("int64"))
    file = folder / "train-00001-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-3])


def _another_schema(folder: Path) -> None:
    write_shards(folder, [0] * sum(SIZES), datasets.Value("int64"))
    table = pa.table({"image": pa.array([b""]), "name": ["x"]})
    pa.parquet.write_table(table, folder / "train-00001-of-00003.parquet")


def _class_folders(folder: Path) -> None:
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (_negative, {}, r"Labels in column 'label' go down to -1\. Choose another split or column; label_column=None"),
        (_huge, {}, r"The label column 'label' goes up to 1000000000; class ids are integers from 0"),
        (_missing, {}, r"1 rows have no label in column 'label'\."),
        (_missing_name, {}, r"Some rows have no label in column 'label'\."),
        (_fractions, {}, r"The label column 'label' holds float32; class labels are integers or strings\."),
        (_no_images, {}, r"Cannot read the image of row 0: not an image in a format that is read"),
        (_damaged, {}, r"Cannot read the parquet data in '.*train-00001-of-00003.parquet': .*magic"),
        (_another_schema, {}, r"'.*00001-of.*' has the columns image, name, but '.*00000-of.*' has image, label\."),
        (_class_folders, {}, r"has no parquet files\. Folders of images are read in place.*: leave streaming out\."),
        (Path.mkdir, {}, r"has no parquet files\."),
        (None, {}, r"^No such folder or parquet file: '.*data'\.$"),
        (_negative, {"label_column": "labels"}, r"Unknown label column 'labels'\. Did you mean 'label'\?"),
        (_negative, {"image_column": "label"}, r"The image column 'label' holds int64, not images\."),
        (_negative, {"image_column": "img"}, r"Unknown image column 'img'\. Did you mean 'image'\?"),
        (_negative, {"split": "test"}, r"Unknown split 'test'\."),
        (_negative, {"split": "train[:10%]"}, r"split=train\[:10%\]: a stream reads one split, whole; max_train_sam"),
        (_negative, {"max_train_samples": 0}, r"max_train_samples must be at least 1"),
        (_negative, {"dataset_name": "embedded"}, r"Give exactly one of dataset_name and train_data_dir; got both"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(
    write: Callable[[Path], Any] | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if write is not None:
        write(tmp_path / "data")
    with pytest.raises(InputError, match=message) as raised:
        open_stream(train_data_dir=str(tmp_path / "data"), **options)
    assert "\n" not in str(raised.value)


def test_a_label_that_statistics_did_not_tell_of_is_one_line(shard_folder: Path) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    source.label_names = NAMES[:2]
    with pytest.raises(InputError, match=r"^Row 2 has the label 2 in column 'label', which has the classes 0 to 1\."):
        list(chain(*source.read(source.stretches[0], 0, 0)))


@pytest.mark.parametrize("first_rows", [False, True])
def test_few_rows_of_many_are_those_of_the_whole_set_without_a_pass_over_it(
    first_rows: bool, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = {"train_data_dir": str(shard_folder), "max_train_samples": 9, "first_rows": first_rows}
    with monkeypatch.context() as whole_set:
        whole_set.setattr("speed_diffusers.data.few_rows.FEW_ROWS", 0)
        whole = open_images(**limited, cache_dir=str(tmp_path / "cache"))
    cache, taken = tmp_path / "other", []
    take = ParquetShards.take
    monkeypatch.setattr(ParquetShards, "take", lambda *given: taken.append(given) or take(*given))
    few = open_images(**limited, cache_dir=str(cache))
    assert not cache.exists() and 1 <= len(taken) <= 9, "nothing is converted, and other row groups are not read"
    assert few.labels.tolist() == whole.labels.tolist() and few.label_names == whole.label_names
    assert few.signature() == whole.signature(), "a run may be resumed from either"
    assert all((few.load(row, 8) == whole.load(row, 8)).all() for row in range(9))
    more = open_images(**limited | {"max_train_samples": 20}, cache_dir=str(cache))
    assert len(more) == 20 and cache.exists(), "where every row group is read anyway, the set is converted"
    with pytest.raises(InputError, match="Unknown label column 'labels'. Did you mean 'label'?"):
        open_images(**limited, label_column="labels")
    with pytest.raises(InputError, match="Unknown image column 'img'. Did you mean 'image'?"):
        open_images(**limited, image_column="img")


def test_row_groups_without_a_wanted_row_are_not_read(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_stream(train_data_dir=str(shard_folder))
    stretch, groups = source.stretches[5], []
    read = pa.parquet.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pa.parquet.ParquetFile, "read_row_groups", lambda self, some, **o: groups.append(some) or read(self, some, **o)
    )
    assert (stretch.begin, stretch.end, stretch.rows) == (0, 2, 32)
    rows = [image.row for some in source.read(stretch, 0, 20) for image in some]
    assert rows == list(range(20, 32)) and groups.pop() == [1]
    rows = [image.row for some in source.read(stretch._replace(rows=16), 0, 3) for image in some]
    assert rows == list(range(3, 16)) and groups.pop() == [0]
    rows = [image.row for some in source.read(stretch._replace(rows=17), 0, 0) for image in some]
    assert rows == list(range(17)) and groups.pop() == [0, 1]
