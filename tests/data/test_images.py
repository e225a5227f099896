"""Where training images come from: folders, parquet files, sets in memory; and every mistake in one line."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from small_images import encoded, image_dataset, image_rows, noise_image
from speed_diffusers.data.bad_images import BadImages
from speed_diffusers.data.batches import ImageSettings, all_batches, batch_reader, open_training_images
from speed_diffusers.data.images import (
    ImageDataset,
    collate,
    find_bad_images,
    from_dataset,
    note_bad_rows,
    open_images,
)
from speed_diffusers.data.signature import WHOLE_IMAGES, data_signature
from speed_diffusers.errors import InputError

# ---------------------------------------------------------------------------------------------------------------
# Places


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where `datasets` may put its copies."""
    return str(tmp_path_factory.mktemp("hf_cache"))


def class_folder(root: Path, files: dict[str, int]) -> Path:
    """Images at the given relative paths, each of the noise with the given seed."""
    for name, seed in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8, seed).save(root / name)
    return root


def test_image_folder_has_a_class_a_sub_folder(tmp_path: Path) -> None:
    root = class_folder(tmp_path, {"dog/b.png": 1, "cat/a.PNG": 2, "dog/deep/c.png": 3})
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    source = open_images(train_data_dir=str(root))
    assert source.label_names == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1]
    for row, seed in enumerate((2, 1, 3)):
        np.testing.assert_array_equal(source.load(row, 8), np.array(noise_image(8, 8, seed)))


def test_words_like_test_in_paths_lose_no_image(tmp_path: Path) -> None:
    root = class_folder(tmp_path, {"train/test_1.png": 1, "train/2.png": 2, "bus/valid.png": 3})
    source = open_images(train_data_dir=str(root))
    assert source.label_names == ["bus", "train"]
    assert len(source) == 3


def test_image_folder_with_splits(tmp_path: Path) -> None:
    root = class_folder(tmp_path, {"train/cat/1.png": 1, "train/dog/2.png": 2, "val/cat/3.png": 3})
    assert len(open_images(train_data_dir=str(root))) == 2
    assert open_images(train_data_dir=str(root), split="val").label_names == ["cat"]
    with pytest.raises(InputError, match="Unknown split 'test'.*Allowed: train, val"):
        open_images(train_data_dir=str(root), split="test")


def test_flat_folder_needs_label_column_none(tmp_path: Path) -> None:
    root = class_folder(tmp_path, {"2.png": 2, "1.png": 1})
    with pytest.raises(InputError, match="no class sub-folders; label_column=None trains without classes"):
        open_images(train_data_dir=str(root))
    source = open_images(train_data_dir=str(root), label_column=None)
    assert (len(source), source.num_classes) == (2, 0)
    np.testing.assert_array_equal(source.load(0, 8), np.array(noise_image(8, 8, 1)))


def test_metadata_file_gives_the_labels(tmp_path: Path, cache_dir: str) -> None:
    root = class_folder(tmp_path, {"1.png": 1, "test_2.png": 2})
    (root / "metadata.csv").write_text("file_name,kind\n1.png,owl\ntest_2.png,cat\n")
    source = open_images(train_data_dir=str(root), label_column="kind", cache_dir=cache_dir)
    assert source.label_names == ["cat", "owl"]
    assert source.labels.tolist() == [1, 0]


def test_replaced_image_changes_the_fingerprint(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "a", {"cat/1.png": 1, "dog/2.png": 2})
    first = open_images(train_data_dir=str(root)).fingerprint
    moved = root.rename(tmp_path / "b")
    assert open_images(train_data_dir=str(moved)).fingerprint == first
    noise_image(8, 8, 3).save(moved / "cat" / "1.png")
    os.utime(moved / "cat" / "1.png", (0, 0))
    assert open_images(train_data_dir=str(moved)).fingerprint != first


@pytest.fixture(scope="module")
def parquet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two named classes in one parquet file."""
    file = tmp_path_factory.mktemp("parquet") / "animals.parquet"
    image_dataset([0, 1, 1, 0, 1, 0], datasets.ClassLabel(names=["cat", "dog"])).to_parquet(file)
    return file


def test_one_parquet_file(parquet_file: Path, cache_dir: str) -> None:
    source = open_images(train_data_dir=str(parquet_file), cache_dir=cache_dir)
    assert source.label_names == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1, 0, 1, 0]
    np.testing.assert_array_equal(source.load(4, 8), np.array(noise_image(8, 8, 4)))
    assert open_images(train_data_dir=str(parquet_file), cache_dir=cache_dir).fingerprint == source.fingerprint


@pytest.mark.parametrize("place", ["", "data"])
def test_parquet_folder_takes_the_shards_of_the_split(
    tmp_path: Path, parquet_file: Path, cache_dir: str, place: str
) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        shutil.copy(parquet_file, tmp_path / place / f"{name}.parquet")
    assert len(open_images(train_data_dir=str(tmp_path), cache_dir=cache_dir)) == 12
    assert len(open_images(train_data_dir=str(tmp_path), split="test", cache_dir=cache_dir)) == 6
    with pytest.raises(InputError, match="Unknown split 'valid'.*Allowed: test, train"):
        open_images(train_data_dir=str(tmp_path), split="valid", cache_dir=cache_dir)


def test_parquet_folder_without_split_names_is_all_training_data(
    tmp_path: Path, parquet_file: Path, cache_dir: str
) -> None:
    for name in ("part-00000-of-00002", "trainer_b"):
        shutil.copy(parquet_file, tmp_path / f"{name}.parquet")
    assert len(open_images(train_data_dir=str(tmp_path), cache_dir=cache_dir)) == 12


def test_saved_dataset_folder(tmp_path: Path) -> None:
    dataset = image_dataset([0, 1, 1, 0, 1, 0])
    datasets.DatasetDict(train=dataset, test=dataset.select(range(2))).save_to_disk(tmp_path / "both")
    dataset.save_to_disk(tmp_path / "one")
    assert len(open_images(train_data_dir=str(tmp_path / "both"), split="test")) == 2
    assert len(open_images(train_data_dir=str(tmp_path / "one"))) == 6
    with pytest.raises(InputError, match="Unknown split 'val'"):
        open_images(train_data_dir=str(tmp_path / "both"), split="val")


def test_embedded_set_needs_no_network_and_no_place_to_write(cache_dir: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    source = open_images(dataset_name="embedded", cache_dir=str(tmp_path / "file"))
    assert source.num_classes == 10
    assert "Sneaker" in (source.label_names or [])
    counts = np.bincount(source.labels)
    assert counts.min() == counts.max() >= 800
    assert source.load(0, 32).shape == (32, 32, 3)
    with pytest.raises(InputError, match="Unknown split 'val'.*Allowed: test, train"):
        open_images(dataset_name="embedded", split="val", cache_dir=cache_dir)


# ---------------------------------------------------------------------------------------------------------------
# Mistakes


def test_exactly_one_place_must_be_given() -> None:
    with pytest.raises(InputError, match="exactly one of dataset_name and train_data_dir; got neither"):
        open_images()
    with pytest.raises(InputError, match="got both"):
        open_images(dataset_name="a/b", train_data_dir="c")


def test_missing_or_useless_folders_are_told(tmp_path: Path) -> None:
    class_folder(tmp_path / "hole", {"cat/1.png": 1})
    (tmp_path / "hole" / "dog").mkdir()
    (tmp_path / "hole" / "dog" / "1.heic").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    expected = {
        "nowhere": "No such file or folder: '.*nowhere'",
        "empty": r"No images in '.*empty'.*one sub-folder of images per class, or \*.parquet files",
        "notes.txt": "is a file but not",
        "hole": r"Every sub-folder .*hole' is a class, but 'dog' has no images, only other files: 1 \(.heic 1\)",
        "broken.parquet": "Cannot read the parquet data in '.*broken.parquet': .*[Pp]arquet",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as caught:
            open_images(train_data_dir=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        assert "\n" not in str(caught.value)


def test_cache_folder_that_cannot_be_written_is_told(tmp_path: Path, parquet_file: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Cannot cache .* in '.*file'"):
        open_images(train_data_dir=str(parquet_file), cache_dir=str(tmp_path / "file"))


def test_unknown_columns_name_the_nearest() -> None:
    dataset = image_dataset([0, 1, 1, 0, 1, 0])
    with pytest.raises(InputError, match="Unknown image column 'img'. Did you mean 'image'.*Allowed: image, label"):
        from_dataset(dataset, "img")
    with pytest.raises(InputError, match="Unknown label column 'labels'. Did you mean 'label'.*label_column=None"):
        from_dataset(dataset, "image", "labels")


def test_image_column_without_images_is_told() -> None:
    dataset = image_dataset([0, 1, 1, 0, 1, 0])
    with pytest.raises(InputError, match=r"'label' holds int64, not images. Columns: image .*, label \(int64\)"):
        from_dataset(dataset, "label")
    texts = datasets.Dataset.from_dict({"image": ["a cat", "a dog"], "label": [0, 1]})
    with pytest.raises(InputError, match=r"Cannot read the image of row 0 \(a cat\)"):
        from_dataset(texts)
    with pytest.raises(InputError, match="no rows"):
        from_dataset(texts.select([]))


def test_paths_and_formats_are_no_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"give it as train_data_dir={tmp_path}"):
        open_images(dataset_name=str(tmp_path))
    with pytest.raises(InputError, match="No such folder: './my/images'"):
        open_images(dataset_name="./my/images")
    with pytest.raises(InputError, match="'imagefolder' is a file format"):
        open_images(dataset_name="imagefolder")


def test_source_is_checked_without_decoding_more_than_one_image() -> None:
    rows = [*image_rows(1), {"bytes": b"damaged", "path": None}]
    features = datasets.Features(image=datasets.Image())
    source = from_dataset(datasets.Dataset.from_dict({"image": rows}, features=features), label_column=None)
    assert len(source) == 2


# ---------------------------------------------------------------------------------------------------------------
# Batches


def test_image_dataset_gives_whole_batches() -> None:
    source = from_dataset(image_dataset([0, 1, 1, 0, 1, 0]))
    dataset = pickle.loads(pickle.dumps(ImageDataset(source, resolution=8)))
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=[[5, 0], [3]], collate_fn=collate)
    first, second = list(loader)
    assert first["pixel_values"].shape == (2, 3, 8, 8)
    assert first["pixel_values"].dtype == torch.uint8
    assert first["labels"].tolist() == [0, 0]
    assert second["labels"].dtype == torch.int64
    np.testing.assert_array_equal(first["pixel_values"][0].permute(1, 2, 0).numpy(), np.array(noise_image(8, 8, 5)))
    assert dataset[3]["pixel_values"].equal(second["pixel_values"][0])


def test_the_next_good_image_and_its_label_stand_for_a_bad_one(tmp_path: Path) -> None:
    dataset = image_dataset([0, 1, 2, 0, 1, 2])
    images = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    damaged = [image if row not in (2, 3, 5) else {"bytes": b"x", "path": None} for row, image in enumerate(images)]
    columns = {"image": damaged, "label": dataset["label"]}
    source = from_dataset(datasets.Dataset.from_dict(columns, features=dataset.features))
    batch = ImageDataset(source, resolution=8).__getitems__([1, 2, 5])
    pixels = batch["pixel_values"].permute(0, 2, 3, 1).numpy()
    for values, seed in zip(pixels, (1, 4, 0), strict=True):
        np.testing.assert_array_equal(values, np.array(noise_image(8, 8, seed)))
    assert batch["labels"].tolist() == [1, 1, 0]
    bad = BadImages(6, 0.5, tmp_path / "run" / "bad_images.jsonl")
    note_bad_rows(batch, source, bad)
    assert (sorted(batch), [image.row for image in bad]) == (["labels", "pixel_values"], [2, 3, 5])
    assert [image.row for image in find_bad_images(source)] == [2, 3, 5]
    bad.save()
    again = BadImages(6, 0.4, bad.file)
    with pytest.raises(
        InputError, match=r"3 of 6 images cannot be read.* max_bad_images=0.4 allows: row 2: not an im"
    ):
        again.load()


def test_other_scripts_read_bad_images_by_the_same_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = class_folder(tmp_path, {"cat/1.png": 1, "cat/2.png": 2, "dog/3.png": 3})
    (root / "cat" / "2.png").write_bytes(b"")
    settings = ImageSettings(train_data_dir=str(root), resolution=8, max_bad_images=0.5)
    source = open_training_images(settings)
    for images_to_read in (3, 1):  # from memory, and as they come
        ((images, labels),) = batch_reader(source, settings, images_to_read=images_to_read)([[0, 1, 2]])
        assert torch.equal(images[1], images[2])
        assert labels.tolist() == [0, 1, 1]
    (record,) = caplog.records
    assert "Cannot read the image of row 1" in record.message
    with pytest.raises(InputError, match=r"1 of 3 images cannot be read, which is more than max_bad_images=0.01"):
        list(all_batches(source, replace(settings, max_bad_images=0.01), description="all"))


def test_a_column_without_any_image_that_can_be_read_is_refused() -> None:
    features = datasets.Features(image=datasets.Image())
    rows = [{"bytes": b"x", "path": None}] * 3
    with pytest.raises(InputError, match="Cannot read the image of row 0"):
        from_dataset(datasets.Dataset.from_dict({"image": rows}, features=features), label_column=None)
    source = from_dataset(
        datasets.Dataset.from_dict({"image": [*rows, *image_rows(1)]}, features=features), label_column=None
    )
    assert source.load_or_next(0, 8)[1] == 3


# ---------------------------------------------------------------------------------------------------------------
# Signature


def test_signature_is_of_all_images_wherever_they_lie(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "a", {f"{name}/{seed}.png": seed for seed in range(4) for name in ("cat", "dog")})
    signature = open_images(train_data_dir=str(root)).signature()
    shutil.copytree(root, tmp_path / "b")
    assert open_images(train_data_dir=str(tmp_path / "b")).signature() == signature
    images = [{"bytes": noise_bytes(seed), "path": None} for _ in range(2) for seed in range(4)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = datasets.Dataset.from_dict({"image": images, "label": [0] * 4 + [1] * 4}, features=features)
    assert from_dataset(rows).signature() == signature
    assert from_dataset(rows.select([1, 0, *range(2, 8)])).signature() != signature
    assert from_dataset(rows.select(range(8))).signature() == signature


def noise_bytes(seed: int) -> bytes:
    """The file of an image of `class_folder`."""
    return encoded(noise_image(8, 8, seed))


def test_signature_tells_replaced_and_exchanged_images() -> None:
    # More images than are hashed whole, of two sizes; of all files that are exchanged, none is hashed whole.
    images = [{"bytes": bytes([row % 251]) * (50 + row % 2), "path": None} for row in range(3000)]
    whole = set(np.linspace(0, 2999, WHOLE_IMAGES, dtype=int).tolist())
    free = [row for row in range(3000) if row not in whole]
    features = datasets.Features(image=datasets.Image(decode=False))
    labels = np.arange(3000) // 1500

    def signature(rows: list[dict[str, object]], earlier: str | None = None) -> str:
        dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
        return data_signature(dataset, "image", labels, ["cat", "dog"], earlier=earlier)

    replaced, exchanged = list(images), list(images)
    replaced[free[7]] = {"bytes": b"another", "path": None}
    other = next(row for row in reversed(free) if (row - free[0]) % 2)
    exchanged[free[0]], exchanged[other] = images[other], images[free[0]]
    same_size = list(images)
    same_size[sorted(whole)[500]] = {"bytes": b"y" * len(images[sorted(whole)[500]]["bytes"]), "path": None}
    assert len({signature(rows) for rows in (images, replaced, exchanged, same_size)}) == 4
    # The rule of version 0.1 stays as it was, or its runs would not resume.
    earlier = "0" * 64
    before = "6d27e68f"
    assert signature(images, earlier)[:8] == signature(replaced, earlier)[:8] == before


def test_class_ids_beyond_the_names_are_one_line() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = pa.table(
        {"image": pa.array([None] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": [0, 7]}
    )
    with pytest.raises(InputError, match="goes up to 7, but names only 2 classes"):
        from_dataset(datasets.Dataset(datasets.table.InMemoryTable(table).cast(features.arrow_schema)))


def noting_stat(
    stat: Callable[..., os.stat_result], noted: list[str], path: object, **given: object
) -> os.stat_result:
    noted.append(str(path))
    return stat(path, **given)


def test_few_of_many_images_are_those_of_the_whole_set_and_no_other_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("cat", 40), ("dog", 70), ("eel", 0), ("fox", 10)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            noise_image(8, 8, seed=number).save(tmp_path / "images" / name / f"{number}.png")
    for options in ({}, {"first_rows": True}, {"label_column": None}):
        limited = {"train_data_dir": str(tmp_path / "images"), "max_train_samples": 9, **options}
        with monkeypatch.context() as whole_set:
            whole_set.setattr("speed_diffusers.data.few_rows.FEW_ROWS", 0)
            whole = open_images(**limited)
        looked_up: list[str] = []
        with monkeypatch.context() as counted:
            counted.setattr(os, "stat", partial(noting_stat, os.stat, looked_up))
            few = open_images(**limited)
        assert 0 < sum(path.endswith(".png") for path in looked_up) <= 9
        assert (few.labels.tolist(), few.label_names) == (whole.labels.tolist(), whole.label_names)
        assert few.signature() == whole.signature() and few.ignored == whole.ignored
        assert all((few.load(row, 8) == whole.load(row, 8)).all() for row in range(9))
    part = open_images(train_data_dir=str(tmp_path / "images"), max_train_samples=5, split="train[:50%]")
    assert len(part) == 5 and part.labels.max() <= 1, "slices are opened whole"


def test_other_columns_are_not_read_with_the_images() -> None:
    """A mask beside each image, damaged at that."""
    masks = [{"bytes": b"no image", "path": None}] * 4
    features = {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.Value("int64")}
    columns = {"image": list(image_rows(4)), "mask": masks, "label": [0, 1, 0, 1]}
    source = from_dataset(datasets.Dataset.from_dict(columns, features=datasets.Features(features)))
    assert source.load(3, 8).shape == (8, 8, 3) and source.labels.tolist() == [0, 1, 0, 1]
    (batch,) = torch.utils.data.DataLoader(
        ImageDataset(source, resolution=8), batch_sampler=[[0, 1, 2, 3]], collate_fn=collate
    )
    assert batch["pixel_values"].shape == (4, 3, 8, 8)


def test_paths_may_be_large_strings(tmp_path: Path) -> None:
    """As pandas 3 writes them."""
    paths = []
    for index in range(3):
        paths.append(str(tmp_path / f"{index}.png"))
        noise_image(8, 8, index).save(paths[-1])
    table = pa.table({"image": pa.array(paths, pa.large_string()), "label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "train.parquet")
    source = open_images(train_data_dir=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert source.load(2, 8).shape == (8, 8, 3)
