"""Class ids and class names from a label column, checked over all rows without touching an image."""

import logging

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, unknown_name

logger = logging.getLogger(__name__)

MAX_CLASSES = 1_000_000
"""Larger integers in a label column are no class ids (row numbers, hashes, time stamps)."""

WITHOUT_CLASSES = "label_column=None trains without classes"


def read_labels(dataset: datasets.Dataset, column: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Reads a label column as class ids with names.

    Names come from the column where it has them; strings (and booleans) are numbered in sorted order; plain integers
    are taken as class ids and named "0", "1", ... A class without a row keeps its id, with a warning.

    Args:
        dataset: The data; only `column` is read.
        column: Name of the label column.

    Returns:
        int64 (N,) class ids in 0..C-1, and the C names.

    Raises:
        InputError: If the column is missing, holds neither integers nor strings, or has rows without a label.
    """
    check_label_column(dataset.features, column)
    labels, names = _read(dataset, column)
    unused = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(unused):
        first = ", ".join(f"{label} '{names[label]}'" for label in unused[:3])
        logger.warning(
            "%s of %s classes in column '%s' have no image (%s%s). They keep their ids; nothing is learned of them.",
            f"{len(unused):,}",
            f"{len(names):,}",
            column,
            first,
            ", ..." if len(unused) > 3 else "",
        )
    return labels, names


def check_label_column(features: datasets.Features, column: str) -> None:
    """Checks that there is such a column.

    Raises:
        InputError: There is none.
    """
    if column not in features:
        raise InputError(f"{unknown_name('label column', column, features)} {WITHOUT_CLASSES}.")


def _read(dataset: datasets.Dataset, column: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    feature = dataset.features[column]
    values = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if values.null_count:
        raise _unlabelled(column, np.asarray(pc.is_null(values)), "no label")
    if isinstance(feature, datasets.ClassLabel):
        labels = _class_ids(column, values)
        if labels.max() >= len(feature.names):
            raise InputError(
                f"The label column '{column}' goes up to {labels.max()}, but names only {len(feature.names)} classes."
            )
        return labels, list(feature.names)
    if pa.types.is_integer(values.type):
        labels = _class_ids(column, values)
        return labels, [str(label) for label in range(int(labels.max()) + 1)]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_boolean(values.type):
        return _encode_names(values.cast(pa.large_string()))
    raise InputError(
        f"The label column '{column}' holds {values.type}; class labels are integers or strings. "
        f"Columns: {', '.join(dataset.column_names)}. {WITHOUT_CLASSES}."
    )


def _class_ids(column: str, values: pa.Array) -> npt.NDArray[np.int64]:
    labels = np.asarray(values).astype(np.int64)
    if labels.min() < 0:
        # -1 is how data sets on the Hub mark a split whose labels are kept secret.
        raise _unlabelled(column, labels < 0, f"a negative label ({labels.min()})")
    if labels.max() >= MAX_CLASSES:
        raise InputError(
            f"The label column '{column}' goes up to {labels.max()}; class ids are integers from 0 to the number of "
            f"classes - 1. {WITHOUT_CLASSES}."
        )
    return labels


def _unlabelled(column: str, mask: npt.NDArray[np.bool_], what: str) -> InputError:
    return InputError(
        f"{int(mask.sum())} of {len(mask)} rows have {what} in column '{column}', the first is row "
        f"{int(mask.argmax())}. Choose another split or column; {WITHOUT_CLASSES}."
    )


def _encode_names(values: pa.Array) -> tuple[npt.NDArray[np.int64], list[str]]:
    encoded = values.dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found)
    rank = {name: label for label, name in enumerate(names)}
    return np.array([rank[name] for name in found], dtype=np.int64)[np.asarray(encoded.indices)], names
