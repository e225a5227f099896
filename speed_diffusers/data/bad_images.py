"""Images that cannot be read: each has the next good one in its place, is counted and listed, and many end the run."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..files import write_text

logger = logging.getLogger(__name__)

MAX_BAD_IMAGES = 0.01
"""Share of a set's images that may be bad where nothing else is said."""

NAMED = 3
"""How many images a message names."""


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read."""

    row: int
    path: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' ({self.path})' if self.path else ''}: {self.reason}"


class BadImages:
    """The bad images of a set that have been met so far."""

    def __init__(self, num_images: int, max_share: float = MAX_BAD_IMAGES, file: Path | None = None) -> None:
        """Begins with none.

        Args:
            num_images: Size of the set.
            max_share: Share of it that may be bad, in [0, 1].
            file: Where the list is kept, one JSON object ("row", "path", "reason") a line; None: each bad image is
                a warning instead.
        """
        self.num_images = num_images
        self.max_share = max_share
        self.file = file
        self._found: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[BadImage]:
        return iter(sorted(self._found.values(), key=lambda image: image.row))

    def __contains__(self, row: int) -> bool:
        return row in self._found

    def add(self, images: Iterable[BadImage]) -> None:
        """Takes in images that cannot be read, those that are known already too.

        Raises:
            InputError: They are too many. The list is in its file.
        """
        for image in images:
            if self.file is None and image.row not in self:
                logger.warning("Cannot read the image of %s The next good one takes its place.", image)
            self._found[image.row] = image
        if len(self) > self.max_share * self.num_images:
            if self.file is not None:
                self.save()
            raise InputError(
                f"{self._count()} cannot be read, which is more than max_bad_images={self.max_share:g} allows: "
                f"{self._first()} Mend or remove them, or set max_bad_images higher (a share, up to 1)."
            )

    def save(self) -> None:
        """Writes the list to its file, or removes that where there are none."""
        assert self.file is not None
        if self:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, "".join(f"{json.dumps(asdict(image))}\n" for image in self))
        else:
            self.file.unlink(missing_ok=True)

    def load(self) -> None:
        """Adds those that an earlier start of the run has listed in the file.

        Raises:
            InputError: The file is damaged, or they are too many.
        """
        if self.file is None or not self.file.is_file():
            return
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
            listed = [BadImage(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.file} is damaged ({error}); remove it.") from error
        self.add(listed)

    def summary(self) -> str:
        """What became of them, in one line."""
        return f"{self._count()} cannot be read; the next good one took the place of each: {self._first()}"

    def _count(self) -> str:
        return f"{len(self):,} of {self.num_images:,} images"

    def _first(self) -> str:
        named = " ".join(str(image) for image in [*self][:NAMED])
        more = f" ... ({self.file})" if self.file is not None else " ..." if len(self) > NAMED else ""
        return f"{named}{more}"
