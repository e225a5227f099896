"""What lies in a folder and below it: images, parquet files, and what is passed over, with the reason."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jif", ".jp2", ".jpe", ".jpeg", ".jpg")
    + (".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp")
)
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SYSTEM_FOLDERS = frozenset(
    ("#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "__macosx")
    + ("__pycache__", "lost+found", "system volume information")
)
"""What systems and storage put among people's files, in small letters; names with a dot in front count likewise."""

MOST_SHOWN = 3


@dataclass
class Folder:
    """One folder."""

    parts: tuple[str, ...]
    """Names of the folders on the way to it; empty for the one that was scanned."""
    images: list[str] = field(default_factory=list)
    """Names of image files, sorted."""
    parquet: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """How many other files there are, by suffix."""


@dataclass
class Scan:
    """A folder and all below it, depth first, in the order of names."""

    folders: list[Folder] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    """Paths below the folder, by the reason."""

    def ignored(self) -> list[str]:
        """A line for each reason why something was passed over."""
        lines = [
            f"{reason}: {len(paths):,} ({listed(paths, len(paths))})" for reason, paths in self.passed_over.items()
        ]
        others = count_others(self.folders)
        return [*lines, f"other files: {others}"] if others else lines

    def pass_over(self, reason: str, path: str) -> None:
        """Notes a path that is not read."""
        self.passed_over.setdefault(reason, []).append(path)


def scan(root: Path) -> Scan:
    """Looks through a folder; links are followed, but not into a folder that they lie in.

    Raises:
        InputError: A folder cannot be read, or a class folder is a link that leads nowhere.
    """
    found = Scan()
    _scan(root, (), (), found)
    return found


def _scan(place: Path | str, parts: tuple[str, ...], around: tuple[tuple[int, int], ...], found: Scan) -> None:
    folder, below = Folder(parts), []
    found.folders.append(folder)
    try:
        status = os.stat(place)
        with os.scandir(place) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"Cannot read the folder '{shown(place)}': {error.strerror}.") from error
    around = (*around, (status.st_dev, status.st_ino))
    for entry in entries:
        path = "/".join((*parts, entry.name))
        # A link not by its entry, which raises where links go in a circle.
        is_link = entry.is_symlink()
        is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
            found.pass_over("hidden or of a system", path)
        elif is_folder:
            target = os.stat(entry.path) if is_link else None
            if target is not None and (target.st_dev, target.st_ino) in around:
                found.pass_over("link to a folder around it", path)
            else:
                below.append(entry)
        elif not (os.path.isfile(entry.path) if is_link else entry.is_file()):
            if is_link and not parts and not suffix:
                # A class whose disk is missing would shift the ids of those behind it.
                raise InputError(f"'{shown(entry.path)}' is a link that leads nowhere: mend it, or take it out.")
            found.pass_over("link that leads nowhere" if is_link else "no ordinary file", path)
        elif entry.name in METADATA_FILES:
            folder.others[entry.name] += 1
        elif suffix in IMAGE_SUFFIXES:
            folder.images.append(entry.name)
        elif suffix == ".parquet":
            folder.parquet.append(entry.name)
        else:
            folder.others[suffix or "no suffix"] += 1
    for entry in below:
        _scan(entry.path, (*parts, entry.name), around, found)


def count_others(folders: Iterable[Folder]) -> str:
    """Files that are neither images nor parquet files: "5 (.txt 3, .xml 2)", or ""."""
    others: Counter[str] = sum((folder.others for folder in folders), Counter())
    kinds = [f"{suffix} {count}" for suffix, count in others.most_common(MOST_SHOWN)]
    return f"{others.total():,} ({listed(kinds, len(others))})" if others else ""


def listed(names: Iterable[str], count: int) -> str:
    """The first few of `count` names."""
    first = [shown(name) for name, _ in zip(names, range(MOST_SHOWN), strict=False)]
    return ", ".join(first + ["..."] * (count > len(first)))


def number(count: int, what: str) -> str:
    """A number with its noun: "1 image" or "2,000 images"."""
    return f"{count:,} {what}" + "s" * (count != 1)


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path for a message: bytes that are no UTF-8 as \xff, and in one line."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def check_names(paths: Sequence[str]) -> None:
    """Refuses names that nothing behind this can hold: tables, JSON and trackers keep text.

    Raises:
        InputError: A name is no UTF-8; the message has it escaped.
    """
    if not _is_text("".join(paths)):
        bad = [path for path in paths if not _is_text(path)]
        raise InputError(
            f"{number(len(bad), 'name')} in the data {'is' if len(bad) == 1 else 'are'} no UTF-8, the first is "
            f"'{shown(bad[0])}': rename them (convmv does it for whole folders)."
        )


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
