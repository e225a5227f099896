"""Runs whose every change to a file can be made the last; see `nightly/file_faults.c`."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from forked import Forker, run_options

RUN = (
    "max_train_samples=8",
    "train_batch_size=4",
    "max_train_steps=6",
    "checkpointing_steps=2",
    "checkpoints_total_limit=2",
    "validation_steps=4",
    "logging_steps=2",
    "lr_warmup_steps=1",
    "num_validation_images=1",
    "num_inference_steps=1",
    "random_flip=true",
    "report_to=tensorboard",
)
"""Of a run that does all that writes: latent cache, checkpoints, pruning, grids, TensorBoard, export."""


class FaultyRuns:
    """Runs whose disk fails them or who are killed at a change to a file, each in a folder of its own.

    Args:
        forker: Starts them.
        options: Of the runs, without their folders.
        place: Where the folders are.
    """

    def __init__(self, forker: Forker, options: Sequence[str], place: Path) -> None:
        self.forker, self.options, self.place = forker, options, place
        listing = place / "whole.txt"
        self.whole = place / "whole"
        assert self.start(self.whole, listing=listing) == 0, (self.whole / "output.txt").read_text()
        self.changes = listing.read_text().splitlines()

    def start(
        self, folder: Path, *options: str, number: int = 0, full: bool = False, listing: Path | None = None
    ) -> int:
        """One start of the run in a folder; returns the exit code."""
        command = run_options(self.options, folder / "run", f"cache_dir={folder / 'cache'}", *options)
        faults = {"folders": [str(folder / "run"), str(folder / "cache")], "number": number, "full": full}
        faults |= {"listing": None if listing is None else str(listing)}
        code = self.forker.start(folder, command, changes=[f"faults:{json.dumps(faults)}"]).wait()
        assert code is not None, f"hangs: {(folder / 'output.txt').read_text()}"
        return code

    def places(self) -> list[int]:
        """Numbers of the changes at which to fail: all, but of writes that follow one another in a file three."""
        found: list[int] = []
        for (what, _), numbered in groupby(enumerate(self.changes, 1), lambda one: tuple(one[1].split(" ", 1))):
            numbers = [number for number, _ in numbered]
            found += sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}) if what == "write" else numbers
        return found
