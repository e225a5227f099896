"""Splits of data on this machine: which one a name says, and which rows `split` asks for. One rule for every kind.

A word in a name says the split ("birds_test", "Test.parquet", "train2017"): train, training; validation, valid, val,
dev; test, testing, eval, evaluation; words of one split mean the same. What says validation or test is never read as
training data, whatever else its path says. What says nothing belongs to train where nothing else says train.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import numpy.typing as npt

from ..errors import InputError, unknown_name
from .scan import number, shown


class UnknownSplit(InputError):
    """There is no such split in the data."""


TRAIN = "train"
WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The names of splits, the first of each as `datasets` calls it."""

HELD_OUT = tuple(name for name in WORDS if name != TRAIN)
SPLIT_OF_WORD = {word + end: name for name, words in WORDS.items() for word in words for end in ("", "set", "data")}

_CAMEL_CASE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+")
"""Words of a name: "birdsTest_v2" has "birds", "Test" and "v"."""
_CAPITALS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_]+")
"""The same where capitals stand before a small word: "MNISTtest"."""


Few = Callable[[int], npt.NDArray[np.int64] | None]
"""Which of so many rows are to be opened by themselves, ascending; None: all."""


class LocalSplit(NamedTuple):
    """What is read of data on this machine."""

    dataset: datasets.Dataset
    ignored: tuple[str, ...]
    """What lies beside it and is not read: a line for each reason, with how much it is."""
    all_labels: datasets.Dataset | None = None
    """Where `dataset` has only the few rows that were asked for: the label column of all rows."""


def is_whole(split: str | None) -> bool:
    """Whether it is the name of one split, without slices and sums; None names none and takes no part of one."""
    return split is None or not set(split) & set("[+(")


def canonical(split: str) -> str:
    """The first of the words that mean the same split; any other name as it is."""
    return SPLIT_OF_WORD.get(split.lower(), split)


def split_in_name(*names: str) -> str | None:
    """The split that names of a file and of the folders around it say, or None; validation and test outweigh train."""
    said = [SPLIT_OF_WORD[word] for name in names for word in _words(name) if word in SPLIT_OF_WORD]
    held_out = [name for name in said if name != TRAIN]
    return next(reversed(held_out or said), None)


def is_split_name(name: str) -> bool:
    """Whether the whole name says a split ("test", "Val", "train2017") and nothing else."""
    return split_in_name(name) is not None and not _rest(name)


def own_split(path: Path) -> str | None:
    """What the name of the folder that was given says of its content, where no name in it says a split."""
    name = path.absolute().name
    return split_in_name(name) if is_split_name(name) else None


def splits_of_folders(names: Collection[str]) -> dict[str, str | None]:
    """Which of the folders that lie side by side are splits rather than classes, by their names.

    A longer name counts only beside one that differs in nothing but the split ("birds_train" beside "birds_test" or
    "birds"): "bullet_train" and "test_tube" are classes. "train" beside classes is a class, for what it holds is
    training data either way; "test" beside classes is none.
    """
    said = {name: split_in_name(name) for name in names}
    families: dict[str, set[str | None]] = {}
    for name, split in said.items():
        families.setdefault(_rest(name), set()).add(split)
    found = {
        name: split if is_split_name(name) or len(families[_rest(name)]) > 1 else None for name, split in said.items()
    }
    return dict.fromkeys(found) if set(found.values()) == {TRAIN, None} else found


def choose(split: str, found: Collection[str | None], path: Path) -> str | None:
    """The one of the splits that were found that `split` means.

    Args:
        split: As the user gave it.
        found: Names of splits; None stands for what says no split.
        path: The data, for the message.

    Raises:
        UnknownSplit: There is no such split.
    """
    names = {name for name in found if name is not None}
    if split in names:
        return split
    same = [name for name in names if canonical(name) == canonical(split)]
    if len(same) == 1:
        return same[0]
    if None in found and not names & set(WORDS[TRAIN]):
        if canonical(split) == TRAIN:
            return None
        names.add(TRAIN)
    raise UnknownSplit(f"{unknown_name('split', split, names)} Names in '{shown(path)}' say so.")


def read_split(spec: str, load: Callable[[str], LocalSplit]) -> LocalSplit:
    """What `split` asks for, slices and sums as in `datasets`: "train", "train[:10%]", "train+validation[-100:]".

    Args:
        spec: Names of splits, each with a slice or without.
        load: Gives the whole of a split.

    Raises:
        InputError: The slice cannot be read or holds nothing; or as `load`.
    """
    names = [re.split(r"[\[(]", part)[0].strip() for part in spec.split("+")]
    opened = {name: load(name) for name in dict.fromkeys(names)}
    if spec in opened:
        return opened[spec]
    try:
        lengths = {name: len(split.dataset) for name, split in opened.items()}
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        spans = [(opened[part.splitname].dataset, range(part.from_, part.to)) for part in parts]
        chosen = [dataset.select(span) for dataset, span in spans if span]
        if not chosen:
            raise ValueError(f"no rows; there are {lengths}")
        dataset = datasets.concatenate_datasets(chosen)
    except (AssertionError, ValueError) as error:
        raise InputError(f"split={spec}: {' '.join(str(error).split())}") from error
    # Each of them is left out where the others are read.
    first, *more = (split.ignored for split in opened.values())
    return LocalSplit(dataset, tuple(line for line in first if all(line in lines for lines in more)))


def other_splits(counts: Mapping[str | None, int], chosen: str | None, what: str) -> list[str]:
    """A line for each split but the chosen one, with how much of `what` it holds."""
    return [
        f"{'in no split' if name is None else f'split {name!r}'}: {number(count, what)}"
        for name, count in counts.items()
        if name != chosen
    ]


def _words(name: str) -> list[str]:
    for pattern in (_CAPITALS, _CAMEL_CASE):
        words = [word.lower() for word in pattern.findall(name)]
        if any(word in SPLIT_OF_WORD for word in words):
            break
    return words


def _rest(name: str) -> str:
    """The words of a name that say no split."""
    return " ".join(word for word in _words(name) if word not in SPLIT_OF_WORD)
