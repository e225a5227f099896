"""How to draw and weigh timesteps on one process, over a whole training: the options, checked, and what they change.

Schedulers are thin wrappers around this; it serves loops without a diffusers scheduler just as well.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .config.schema import Interval
from .errors import InputError
from .process import ForwardProcess
from .registry import Registry
from .settings import SpeeDOptions, SpeeDSettings
from .tables import SpeeDTables
from .timesteps import (
    DENSITIES,
    DRAWS,
    INDEPENDENT,
    PAIRED,
    UNIFORM,
    LossAwareDensity,
    checked_pmf,
    drawn_pmf,
    normalised,
)
from .weightings import WEIGHTINGS, checked_weights

BATCHES_BEFORE_WARNING = 200

PROGRESS_STEPS = 1000
"""What changes in training changes in so many steps, so that a batch seldom waits for new tables."""

PROGRESS = Interval("[0, 1]")

REGISTRIES: Mapping[str, Registry[Any]] = MappingProxyType(
    {"speed_sampling": DENSITIES, "speed_weighting": WEIGHTINGS, "speed_draw": DRAWS}
)
"""The options that are names, by their keys, with what they name."""


class SpeeDStrategy:
    """Densities, weights and draws of one process, over a whole training.

    Args:
        process: The forward process.
        options: What the user chose.

    Raises:
        InputError: A choice is unknown, outside its range, or does not fit the process.
    """

    def __init__(self, process: ForwardProcess, options: SpeeDOptions) -> None:
        self.process = process
        self.options = options
        _ = DRAWS[options.draw]
        self.settings = SpeeDSettings.resolve(process, options)
        self._sampling, self._weighting = DENSITIES.parse(options.sampling), WEIGHTINGS.parse(options.weighting)
        self.needs_progress = self._sampling.entry.needs_progress or options.anneal_start < 1.0
        self.needs_progress |= self._weighting.entry.needs_progress
        self.pivot = process.dual_pivot if options.draw == PAIRED else None
        self.randint = self._sampling.entry is DENSITIES[UNIFORM] and options.draw == INDEPENDENT
        self._learner: LossAwareDensity | None = None
        self._batches_unlearned = 0
        # Once, not in the course of the training: what changes there lies between what is known to be sound.
        self._weights = checked_weights(self._weighting, self._weighting(process, self.settings))
        self._latest = self._make(self.settings, checked_pmf(self._sampling, self._pmf(self.settings)))
        _ = checked_weights(self._weighting, self._latest.weights)  # their mean under the draws may be 0

    @property
    def is_loss_aware(self) -> bool:
        """Whether the density follows the losses of the training, and so needs `update`."""
        return self._learner is not None

    @property
    def latest_tables(self) -> SpeeDTables:
        """The tables at the progress that was last asked for, at first 0, or after the last update."""
        return self._latest

    def tables(self, progress: float | None = None) -> SpeeDTables:
        """The tables at a point of the training.

        Args:
            progress: Share of the training that is done, in [0, 1]; taken to the nearest thousandth. May be None where
                nothing depends on it.

        Raises:
            InputError: It is needed and not given, or outside [0, 1].
        """
        if progress is None:
            if self.needs_progress:
                raise InputError(
                    f"speed_sampling='{self._sampling}' with speed_anneal_start={self.options.anneal_start} "
                    "changes in the course of the training: pass progress, the share that is done, in [0, 1]."
                )
            return self._latest
        PROGRESS.require("progress", progress)
        progress = round(progress * PROGRESS_STEPS) / PROGRESS_STEPS
        if self.needs_progress and progress != self._latest.settings.progress:
            k = self.options.k + (1.0 - self.options.k) * self._annealed(progress)
            # Found or not, tau was reported when the strategy was made.
            settings = replace(self.settings, k=k, progress=progress, tau_found=True)
            if self._weighting.entry.needs_progress:
                self._weights = self._weighting(self.process, settings)
            self._latest = self._make(settings, self._pmf(settings))
        return self._latest

    def tables_to_draw(self, progress: float | None = None) -> SpeeDTables:
        """The tables for a draw: those of `tables`, with a warning where a loss-aware density is told nothing."""
        if self._learner is not None:
            self._batches_unlearned += 1
            if self._batches_unlearned == BATCHES_BEFORE_WARNING:
                # Not logged: a script's own handlers may leave out what a library logs.
                warnings.warn(
                    f"speed_sampling='{self._sampling}' is loss-aware, but {BATCHES_BEFORE_WARNING} batches were "
                    "drawn without update_speed, so it stays as it is. Tell it the losses of each timestep.",
                    UserWarning,
                    stacklevel=3,
                )
        return self.tables(progress)

    def update(self, error_sums: Tensor, error_counts: Tensor) -> None:
        """Tells a loss-aware density the errors of one or more batches, summed over all processes.

        The tensors are read on the CPU, which waits for their device; where the loop synchronises anyway is the place
        to call it. One call adds one entry to each timestep's history, whatever the number of batches.

        Args:
            error_sums: Shape (T,): sum over the samples of each timestep of the prediction's unweighted
                mean squared error.
            error_counts: Shape (T,): how many samples that were.

        Raises:
            InputError: The density does not learn, or the tensors are of another shape.
        """
        learner = self._learning()
        learner.update(error_sums, error_counts, self._weights)
        self._batches_unlearned = 0
        self._latest = self._make(self.settings, learner.pmf())

    def state_dict(self) -> dict[str, Tensor]:
        """What the density has learned, as plain tensors for a checkpoint.

        Raises:
            InputError: The density does not learn.
        """
        return self._learning().state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to what the density had learned.

        Raises:
            InputError: The density does not learn, or the state is that of another.
        """
        learner = self._learning()
        learner.load_state_dict(state)
        self._latest = self._make(self.settings, learner.pmf())

    def _learning(self) -> LossAwareDensity:
        if self._learner is None:
            learning = ", ".join(name for name, entry in DENSITIES.items() if entry.learns)
            raise InputError(f"speed_sampling='{self._sampling}' learns nothing; those that do: {learning}.")
        return self._learner

    def _annealed(self, progress: float) -> float:
        """Share of the way of k to 1."""
        start, end = self.options.anneal_start, self.options.anneal_end
        if progress < start or start == 1.0:
            return 0.0
        return 1.0 if progress >= end else (progress - start) / (end - start)

    def _pmf(self, settings: SpeeDSettings) -> Tensor:
        density = self._learner or self._sampling(self.process, settings)
        if isinstance(density, LossAwareDensity):
            self._learner = density
            return density.pmf()
        return normalised(density)

    def _make(self, settings: SpeeDSettings, pmf: Tensor) -> SpeeDTables:
        importance = self._learner.importance_weights() if self._learner else None
        weights = self._weights if importance is None else self._weights * importance
        if self.options.normalize_weights:
            weights = weights / (drawn_pmf(pmf, self.options.draw, self.pivot) * weights).sum()
        return SpeeDTables(
            self.process, settings, pmf, weights, importance, self.options.draw, self.pivot, self.randint
        )
