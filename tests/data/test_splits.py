"""Which rows a split is: one rule for parquet files, folders and saved sets, and no rows of another split, ever."""

from pathlib import Path

import datasets
import pytest

from small_images import image_dataset, noise_image
from speed_diffusers.data import open_images
from speed_diffusers.data.batches import ImageSettings, open_training_images, open_validation_images
from speed_diffusers.data.splits import UnknownSplit, split_in_name
from speed_diffusers.errors import InputError


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where `datasets` may put its copies."""
    return str(tmp_path_factory.mktemp("hf_cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder whose own name says nothing."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def lay(root: Path, files: dict[str, int]) -> Path:
    """Parquet files of so many rows, images of the noise of so great a seed, and folders ("name/")."""
    for name, size in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            image_dataset([0] * size, count=size).to_parquet(root / name)
        elif name.endswith("/"):
            (root / name).mkdir()
        else:
            noise_image(4, 4, size).save(root / name)
    return root


def test_words_in_names() -> None:
    said = {
        "train": "birds_train train-00001-of-00002 Training train2017 trainA MNISTTrain train_images trainset",
        "validation": "x-validation-0 VAL valid.v2 dev train_val valset",
        "test": "birds_test Test TEST testB birdsTest MNISTtest test2017 eval testing evaluation train_test testdata",
        None: "birds contest trainer trainval restrain latest testimony 00000-of-00001 鸟",
    }
    for split, names in said.items():
        assert {name: split_in_name(name) for name in names.split()} == dict.fromkeys(names.split(), split)


PARQUET = {
    "words": ({"birds_train": 1, "birds_test": 2}, {"train": 1, "test": 2}),
    "shards": (
        {"a-train-00000-of-00002": 1, "a-train-00001-of-00002": 2, "a-validation-00000-of-00001": 4},
        {"training": 3, "val": 4},
    ),
    "capitals": ({"Train": 1, "Test": 2, "more": 4}, {"train": 1, "eval": 2}),
    "folders": ({"default/train/0": 1, "default/test/train": 2}, {"train": 1, "test": 2}),
    "unnamed": ({"birds": 1, "sub/more": 2, "birds_test": 4}, {"train": 3, "test": 4}),
    "other names": ({"fold1-00000-of-00001": 1, "fold2-00000-of-00001": 2, "fold2_test": 4}, {"fold2": 2, "test": 4}),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet_files_belong_to_the_split_that_their_names_say(case: str, root: Path, cache_dir: str) -> None:
    files, expected = PARQUET[case]
    lay(root, {f"{name}.parquet": rows for name, rows in files.items()})
    for split, rows in expected.items():
        source = open_images(train_data_dir=str(root), split=split, cache_dir=cache_dir)
        assert len(source) == rows
        assert bool(source.ignored) == (rows < sum(files.values()))
    with pytest.raises(UnknownSplit, match="Unknown split 'nonsense'.*Allowed: .*train"):
        open_images(train_data_dir=str(root), split="nonsense", cache_dir=cache_dir)


FOLDERS = {
    "class called train": ({"train/in/1.png": 1, "bus/2.png": 2}, {"train": (["bus", "train"], 2)}),
    "test beside classes": (
        {"cat/1.png": 1, "dog/2.png": 2, "test/3.png": 3, "test/cat/4.png": 4},
        {"train": (["cat", "dog"], 2), "test": (["cat"], 1)},
    ),
    "splits beside others": (
        {"Train/cat/1.png": 1, "Train/dog/2.png": 2, "test/cat/3.png": 3, "extra/4.png": 4, "notes/": 0},
        {"train": (["cat", "dog"], 2), "eval": (["cat"], 1)},
    ),
    "longer names": (
        {"seg_train/cat/1.png": 1, "seg_test/dog/2.png": 2, "seg_pred/3.png": 3},
        {"train": (["cat"], 1), "test": (["dog"], 1)},
    ),
    "classes of longer names": (
        {"bullet_train/1.png": 1, "test_tube/2.png": 2, "contest/3.png": 3},
        {"train": (["bullet_train", "contest", "test_tube"], 3)},
    ),
    "splits inside classes": (
        {"cat/train/1.png": 1, "cat/test/2.png": 2, "dog/train/3.png": 3, "elk/test/4.png": 4},
        {"train": (["cat", "dog", "elk"], 2), "test": (["cat", "dog", "elk"], 2)},
    ),
    "empty class in a split": (
        {"train/cat/1.png": 1, "train/dog/": 0, "train/elk/2.png": 2, "val/cat/3.png": 3},
        {"train": (["cat", "dog", "elk"], 2), "dev": (["cat"], 1)},
    ),
    "any name": (
        {"fold1/cat/1.png": 1, "fold2/cat/2.png": 2},
        {"fold2": (["cat"], 1), "train": (["fold1", "fold2"], 2)},
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_splits_or_classes(case: str, root: Path) -> None:
    files, expected = FOLDERS[case]
    lay(root, files)
    for split, (names, rows) in expected.items():
        source = open_images(train_data_dir=str(root), split=split)
        assert (source.label_names, len(source)) == (names, rows)
        assert bool(source.ignored) == (rows < sum(name.endswith(".png") for name in files))
    for split in ("nonsense", "validation" if case != "empty class in a split" else "test", ""):
        with pytest.raises(UnknownSplit, match=f"Unknown split '{split}'.*Allowed: .*train"):
            open_images(train_data_dir=str(root), split=split)


def test_what_is_left_out_is_counted_by_split(root: Path) -> None:
    lay(root, {"train/cat/1.png": 1, "train/2.png": 2, "test/3.png": 3, "test/4.png": 4, "5.png": 5})
    assert open_images(train_data_dir=str(root)).ignored == (
        "in no split: 1 image",
        "split 'test': 2 images",
        "beside the class folders: 1 image",
    )


def test_the_name_of_what_is_given_counts_where_nothing_else_says_a_split(root: Path, cache_dir: str) -> None:
    lay(root, {"val/cat/1.png": 1, "birds_test.parquet": 2, "test/a.parquet": 3})
    for name, split, rows in (("val", "validation", 1), ("birds_test.parquet", "test", 2), ("test", "eval", 3)):
        with pytest.raises(UnknownSplit, match="Unknown split 'train'.*Allowed: (validation|test)"):
            open_images(train_data_dir=str(root / name), cache_dir=cache_dir)
        assert len(open_images(train_data_dir=str(root / name), split=split, cache_dir=cache_dir)) == rows


def test_saved_sets_follow_the_same_rule(root: Path) -> None:
    rows = image_dataset([0, 1, 1, 0, 1, 0])
    datasets.DatasetDict(train=rows, validation=rows.select(range(2))).save_to_disk(root / "both")
    rows.save_to_disk(root / "one")
    rows.select(range(4)).save_to_disk(root / "test")
    both = open_images(train_data_dir=str(root / "both"), split="val")
    assert (len(both), both.ignored) == (2, ("split 'train': 6 rows",))
    assert len(open_images(train_data_dir=str(root / "test"), split="test")) == 4
    for name, split in (("one", "val"), ("one", "nonsense"), ("test", "train"), ("both", "test")):
        with pytest.raises(UnknownSplit, match=f"Unknown split '{split}'"):
            open_images(train_data_dir=str(root / name), split=split)


def test_slices_and_sums_are_those_of_datasets(root: Path, cache_dir: str) -> None:
    lay(root / "parquet", {"train.parquet": 10, "test.parquet": 4})
    folders = {f"train/{'cat' if seed < 5 else 'dog'}/{seed}.png": seed for seed in range(10)}
    lay(
        root / "folder", folders | {f"test/{'cat' if seed < 12 else 'dog'}/{seed}.png": seed for seed in range(10, 14)}
    )
    labels = {"train[:20%]": [0, 0], "train[-6:]": [0] + [1] * 5, "train[8:]+test": [1, 1, 0, 0, 1, 1]}
    for split, expected in labels.items():
        source = open_images(train_data_dir=str(root / "folder"), split=split)
        assert source.labels.tolist() == expected
        assert source.ignored == (() if "+" in split else ("split 'test': 4 images",))
        assert len(open_images(train_data_dir=str(root / "parquet"), split=split, cache_dir=cache_dir)) == len(
            expected
        )
    assert len(open_images(dataset_name="embedded", split="train[:10]")) == 10
    for split, message in {
        "train[:x]": "split=train\\[:x\\]: Unrecognized instruction format",
        "train[10:]": "no rows; there are {'train': 10}",
        "val[:2]": "Unknown split 'val'",
        "train[:200%]": "boundaries",
    }.items():
        with pytest.raises(InputError, match=message):
            open_images(train_data_dir=str(root / "folder"), split=split)


def test_names_that_read_as_patterns_open_themselves(root: Path, cache_dir: str) -> None:
    sizes = {"b[12]": 1, "b1": 2, "c*": 3, "c1": 4, "d?": 5, "d1": 6}
    for name, rows in sizes.items():
        lay(root, {f"{name}/[a].parquet": rows})
    for name, rows in sizes.items():
        assert len(open_images(train_data_dir=str(root / name), cache_dir=cache_dir)) == rows


def test_held_out_images_are_what_is_held_out(root: Path) -> None:
    lay(root, {"a/val/cat/1.png": 1, "a/train/cat/2.png": 2, "a/train/dog/3.png": 3, "b/cat/1.png": 1})
    training = open_training_images(ImageSettings())
    for given, rows in (("a", 1), ("a/val", 1), ("b", 1)):
        source = open_validation_images(ImageSettings(validation_data_dir=str(root / given)), training)
        assert source is not None and len(source) == rows
    settings = ImageSettings(validation_data_dir=str(root / "a"), validation_split="train")
    chosen = open_validation_images(settings, training)
    assert chosen is not None and len(chosen) == 2
