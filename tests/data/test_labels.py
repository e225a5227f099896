"""Labels of any kind to class ids and names."""

import time

import datasets
import numpy as np
import pyarrow as pa
import pytest

from small_images import encoded, image_dataset, noise_image
from speed_diffusers.data.images import from_dataset
from speed_diffusers.errors import InputError


def test_label_names_of_the_data_are_kept() -> None:
    source = from_dataset(image_dataset([2, 0, 1, 0, 2, 0], datasets.ClassLabel(names=["shoe", "bag", "coat", "hat"])))
    assert source.label_names == ["shoe", "bag", "coat", "hat"]
    assert source.num_classes == 4
    assert source.labels.tolist() == [2, 0, 1, 0, 2, 0]


def test_strings_are_numbered_as_datasets_numbers_them() -> None:
    names: list[object] = ["bag", "coat", "Ärmel", "bag", "Zip", "coat"]
    dataset = image_dataset(names, datasets.Value("string"))
    source = from_dataset(dataset)
    theirs = dataset.class_encode_column("label")
    assert source.label_names == theirs.features["label"].names
    assert source.labels.tolist() == list(theirs["label"])


def test_plain_integers_are_class_ids_named_by_their_number() -> None:
    source = from_dataset(image_dataset([3, 0, 1, 0, 3, 0]))
    assert source.num_classes == 4
    assert source.label_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, 3, 1, 2, 3], "1 of 4 classes in column 'label' have no image (0 '0')."),
        ([1999, 2000, 2001, 2001, 2000, 1999], "1,999 of 2,002 classes in column 'label' have no image (0 '0', 1 '1'"),
    ],
)
def test_labels_that_skip_numbers_warn(labels: list[object], message: str, caplog: pytest.LogCaptureFixture) -> None:
    source = from_dataset(image_dataset(labels))
    assert source.labels.tolist() == labels and message in caplog.text
    caplog.clear()
    from_dataset(image_dataset([0, 1, 2, 0, 1, 2]))
    assert caplog.text == ""


def test_booleans_are_two_classes() -> None:
    source = from_dataset(image_dataset([True, False, True, True, False, True], datasets.Value("bool")))
    assert source.label_names == ["false", "true"]
    assert source.labels.tolist() == [1, 0, 1, 1, 0, 1]


def test_without_classes_there_are_none() -> None:
    source = from_dataset(image_dataset(None), label_column=None)
    assert (source.num_classes, source.label_names, source.labels.tolist()) == (0, None, [0] * 6)


BAD_LABELS = {
    "none": ([0, None, 1, None, 0, 1], None, "2 of 6 rows have no label in column 'label', the first is row 1"),
    "negative": ([0, 1, -1, 0, -1, 0], None, r"2 of 6 rows have a negative label \(-1\).* first is row 2"),
    "negative with names": (
        [0, 1, -1, 0, 1, 0],
        datasets.ClassLabel(names=["cat", "dog"]),
        r"1 of 6 rows have a negative label \(-1\)",
    ),
    "floats": ([0.0, 1.0, 0.5, 0.0, 1.0, 1.0], datasets.Value("float32"), "holds float; class labels are integers"),
    "lists": ([[0]] * 6, datasets.Sequence(datasets.Value("int64")), "class labels are integers or strings"),
    "hashes": ([0, 1, 2**40, 3, 4, 5], None, "goes up to 1099511627776"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_are_told_with_the_way_out(kind: str) -> None:
    labels, feature, message = BAD_LABELS[kind]
    with pytest.raises(InputError, match=f"{message}.*label_column=None trains without classes"):
        from_dataset(image_dataset(labels, feature))


def test_a_share_of_sorted_data_is_of_all_classes_and_does_not_change_them() -> None:
    dataset = image_dataset([label for label in range(4) for _ in range(10)], count=40)
    whole, part = from_dataset(dataset), from_dataset(dataset, max_train_samples=20)
    assert (len(part), part.num_classes, set(part.labels.tolist())) == (20, 4, {0, 1, 2, 3})
    again = from_dataset(dataset, max_train_samples=20)
    assert again.fingerprint == part.fingerprint != whole.fingerprint
    for row in range(20):
        np.testing.assert_array_equal(part.load(row, 8), again.load(row, 8))
    assert part.labels.tolist() == sorted(part.labels.tolist())  # in the order of the data
    assert len(from_dataset(dataset, max_train_samples=99)) == 40
    # Without classes there is an order too, that of the folders.
    flat = from_dataset(dataset, label_column=None, max_train_samples=3)
    assert flat.fingerprint != from_dataset(dataset.select(range(3)), label_column=None).fingerprint
    assert sum(np.array_equal(flat.load(row, 8), whole.load(row, 8)) for row in range(3)) < 3
    with pytest.raises(InputError, match="max_train_samples must be at least 1"):
        from_dataset(dataset, max_train_samples=0)


def test_labels_of_a_million_rows_are_checked_in_seconds() -> None:
    rows = 1_280_000
    one = encoded(noise_image(4, 4))
    images = datasets.Dataset.from_dict({"image": [{"bytes": one, "path": None}]}).with_format("arrow")[:]["image"]
    table = pa.table(
        {
            "image": pa.chunked_array([images.chunk(0).take(pa.array(np.zeros(rows, dtype=np.int64)))]),
            "label": pa.array(np.random.default_rng(0).choice(["dog", "cat", "owl"], rows)),
        }
    )
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    started = time.perf_counter()
    source = from_dataset(dataset)
    assert time.perf_counter() - started < 8
    assert (len(source), source.label_names) == (rows, ["cat", "dog", "owl"])
