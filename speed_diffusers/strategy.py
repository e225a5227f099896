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
from .loss_aware import LossAware
from .process import ForwardProcess
from .registry import Registry
from .settings import PREFIX, SpeeDOptions, SpeeDSettings
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
from .weightings import WEIGHTINGS, LossAwareWeighting, checked_weights

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
        self.needs_progress = self._sampling.needs_progress or options.anneal_start < 1.0
        self.needs_progress |= self._weighting.needs_progress
        self.pivot = process.dual_pivot if options.draw == PAIRED else None
        self.randint = self._sampling.entry is DENSITIES[UNIFORM] and options.draw == INDEPENDENT
        self._learned_density: LossAwareDensity | None = None
        self._learned_weights: LossAwareWeighting | None = None
        self._uses_untold: dict[str, int] = {}
        # Once, not in the course of the training: what changes there lies between what is known to be sound.
        self._weights = checked_weights(self._weighting, self._weighed(self.settings))
        density = self._density(self.settings)
        if density[1] is not None and options.draw == PAIRED:
            raise InputError(
                f"speed_draw='{PAIRED}': mirrors half of the draws, so that the loss could not undo "
                f"speed_sampling='{self._sampling}'; take 'independent' or 'stratified'."
            )
        _ = checked_pmf(self._sampling, density[0])
        self._latest = self._make(self.settings, *density)
        _ = checked_weights(self._weighting, self._latest.weights)  # their mean under the draws may be 0

    @property
    def is_loss_aware(self) -> bool:
        """Whether density or weighting follows the losses of the training, and so needs `update`."""
        return bool(self._learners)

    @property
    def learning(self) -> list[str]:
        """Which of `sampling` and `weighting` follow the losses of the training."""
        return [option.removeprefix(PREFIX) for option in self._learners]

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
            if self._weighting.needs_progress:
                self._weights = self._weighed(settings)
            self._latest = self._make(settings, *self._density(settings))
        return self._latest

    def tables_to_draw(self, progress: float | None = None) -> SpeeDTables:
        """The tables for a draw: those of `tables`, with a warning where a loss-aware density is told nothing."""
        self._count_use(self._learned_density, str(self._sampling))
        return self.tables(progress)

    def tables_to_weigh(self, progress: float | None = None) -> SpeeDTables:
        """The tables for weights: those of `tables`, with a warning where a loss-aware weighting is told nothing."""
        self._count_use(self._learned_weights, str(self._weighting))
        return self.tables(progress)

    def _count_use(self, learner: LossAware | None, choice: str) -> None:
        if learner is None:
            return
        option = learner.OPTION
        self._uses_untold[option] = self._uses_untold.get(option, 0) + 1
        if self._uses_untold[option] == BATCHES_BEFORE_WARNING:
            # Not logged: a script's own handlers may leave out what a library logs.
            warnings.warn(
                f"{option}='{choice}' is loss-aware, but {BATCHES_BEFORE_WARNING} batches were drawn or weighed "
                "without update_speed, so it stays as it is. Tell it the losses of each timestep.",
                UserWarning,
                stacklevel=4,
            )

    def expect_update(self) -> None:
        """Says that errors are being collected for `update`, so that no warning comes before it, however late."""
        self._uses_untold.clear()

    def update(self, error_sums: Tensor, error_counts: Tensor) -> None:
        """Tells what is loss-aware the errors of one or more batches, summed over all processes.

        The tensors are read on the CPU, which waits for their device; where the loop synchronises anyway is the place
        to call it. One call adds one entry to each timestep's history, whatever the number of batches.

        Args:
            error_sums: Shape (T,): sum over the samples of each timestep of the prediction's unweighted
                mean squared error.
            error_counts: Shape (T,): how many samples that were.

        Raises:
            InputError: Neither density nor weighting learns, or the tensors are of another shape.
        """
        for learner in self._learning().values():
            learner.update(error_sums, error_counts, self._weights)
        self._uses_untold.clear()
        self._learned()

    def state_dict(self) -> dict[str, Tensor]:
        """What density and weighting have learned, as plain tensors for a checkpoint, named `OPTION.NAME`.

        Raises:
            InputError: Neither learns.
        """
        return {
            f"{option}.{name}": value
            for option, learner in self._learning().items()
            for name, value in learner.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to what density and weighting had learned.

        Args:
            state: From `state_dict`. A name without an option, as when only densities learned, is a density's.

        Raises:
            InputError: Neither learns, or the state is that of other choices; nothing has changed.
        """
        learners = self._learning()
        parts: dict[str, dict[str, Tensor]] = {option: {} for option in learners}
        for name, value in state.items():
            option, dot, own = name.rpartition(".")
            option = option if dot else LossAwareDensity.OPTION
            if option not in parts:
                raise InputError(f"The state is of {option} too, which learns nothing here.")
            parts[option][own] = value
        for option, learner in learners.items():
            learner.check_state_dict(parts[option])
        for option, learner in learners.items():
            learner.load_state_dict(parts[option])
        self._learned()

    @property
    def _learners(self) -> dict[str, LossAware]:
        """What learns, by its option."""
        return {each.OPTION: each for each in (self._learned_density, self._learned_weights) if each is not None}

    def _learning(self) -> dict[str, LossAware]:
        if not self._learners:
            names = [name for registry in REGISTRIES.values() for name, entry in registry.items() if entry.learns]
            raise InputError(
                f"speed_sampling='{self._sampling}' speed_weighting='{self._weighting}' learns nothing; "
                f"those that do: {', '.join(names)}."
            )
        return self._learners

    def _learned(self) -> None:
        """Makes the tables again after something was learned."""
        if self._learned_weights is not None:
            self._weights = self._learned_weights.weights()
        settings = self._latest.settings
        self._latest = self._make(settings, *self._density(settings))

    def _annealed(self, progress: float) -> float:
        """Share of the way of k to 1."""
        start, end = self.options.anneal_start, self.options.anneal_end
        if progress < start or start == 1.0:
            return 0.0
        return 1.0 if progress >= end else (progress - start) / (end - start)

    def _density(self, settings: SpeeDSettings) -> tuple[Tensor, Tensor | None]:
        """Probabilities, and what undoes them in the loss, if that is undone."""
        made: Tensor | LossAwareDensity | None = self._learned_density
        if made is None or self._sampling.needs_progress:
            made = self._sampling(self.process, settings)
        if isinstance(made, LossAwareDensity):
            # The one that was made first has learned: one phase of several may be loss-aware.
            self._learned_density = self._learned_density or made
            return self._learned_density.pmf(), self._learned_density.importance_weights()
        return normalised(made), None

    def _weighed(self, settings: SpeeDSettings) -> Tensor:
        made = self._learned_weights or self._weighting(self.process, settings)
        if isinstance(made, LossAwareWeighting):
            self._learned_weights = made
            return made.weights()
        weights: Tensor = made
        return weights

    def _make(self, settings: SpeeDSettings, pmf: Tensor, importance: Tensor | None) -> SpeeDTables:
        steps = self.process.num_train_timesteps
        for key, choice, made in (
            ("speed_sampling", self._sampling, pmf),
            ("speed_weighting", self._weighting, self._weights),
        ):
            if made.shape != (steps,):
                raise InputError(f"{key}='{choice}': gives numbers of shape {tuple(made.shape)}; must be ({steps},).")
        weights = self._weights if importance is None else self._weights * importance
        if self.options.normalize_weights:
            weights = weights / (drawn_pmf(pmf, self.options.draw, self.pivot) * weights).sum()
        return SpeeDTables(
            self.process, settings, pmf, weights, importance, self.options.draw, self.pivot, self.randint
        )
