"""How to draw and weigh timesteps on one process, over a whole training: the options, checked, and what they change.

Schedulers are thin wrappers around this; it serves loops without a diffusers scheduler just as well.
"""

import logging
import math
from dataclasses import dataclass, replace

from torch import Tensor

from .errors import InputError
from .process import ForwardProcess
from .settings import SpeeDSettings, require_number
from .tables import SpeeDTables
from .timesteps import (
    DENSITIES,
    DRAWS,
    INDEPENDENT,
    PAIRED,
    UNIFORM,
    AdaptiveDensity,
    drawn_pmf,
    normalised,
    timestep_density,
)
from .weightings import WEIGHTINGS, timestep_weights

logger = logging.getLogger(__name__)

BATCHES_BEFORE_WARNING = 1000

PROGRESS_STEPS = 1000
"""What changes in training changes in so many steps, so that a batch seldom waits for new tables."""


@dataclass(frozen=True)
class SpeeDOptions:
    """What a user chooses; the names are those of the schedulers' config without `speed_`.

    Attributes:
        sampling: Density over timesteps, with parameters or without ("logit_normal:mean=-0.5").
        weighting: Loss weighting, with parameters or without ("min_snr:gamma=5").
        k: How many times more often steps before tau are drawn; at least 1.
        tau: First timestep of the convergence area in [1, T], or a share of T in (0, 1); None: found from `r`.
        r: The convergence area begins where 1/r of the signal's variance is left; above 1.
        lambda_: Change-aware weights run from 1 - lambda to lambda; in [0.5, 1].
        draw: How a batch is drawn from the density: "independent", "paired" or "stratified".
        normalize_weights: Scale the weights to mean 1 under the law of the draws.
        anneal_start: Share of the training after which k begins to fall; in [0, 1].
        anneal_end: Share of the training at which k has reached 1, linearly; at least `anneal_start`, at most 1. With
            `anneal_start` = 1 k never falls.
        prediction_type: What the network predicts: epsilon, v_prediction, sample or flow_prediction.
    """

    sampling: str = "asymmetric"
    weighting: str = "change_aware"
    k: float = 5.0
    tau: float | None = None
    r: float = 145.0
    lambda_: float = 0.6
    draw: str = INDEPENDENT
    normalize_weights: bool = False
    anneal_start: float = 1.0
    anneal_end: float = 1.0
    prediction_type: str = "epsilon"


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
        _check(options)
        self.settings = SpeeDSettings.resolve(
            process,
            k=options.k,
            tau=options.tau,
            r=options.r,
            lambda_=options.lambda_,
            prediction_type=options.prediction_type,
        )
        sampling, weighting = DENSITIES.parse(options.sampling), WEIGHTINGS.parse(options.weighting)
        self.needs_progress = sampling.entry.needs_progress or options.anneal_start < 1.0
        self.needs_progress |= weighting.entry.needs_progress
        self.pivot = process.dual_pivot if options.draw == PAIRED else None
        self.randint = sampling.name == UNIFORM and options.draw == INDEPENDENT
        self._learner: AdaptiveDensity | None = None
        self._batches_unlearned = 0
        self._weights = timestep_weights(options.weighting, process, self.settings)
        self._latest = self._make(self.settings, self._pmf(self.settings))

    @property
    def is_adaptive(self) -> bool:
        """Whether the density learns from the errors of the training."""
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
                    f"speed_sampling='{self.options.sampling}' with speed_anneal_start={self.options.anneal_start} "
                    "changes in the course of the training: pass progress, the share that is done, in [0, 1]."
                )
            return self._latest
        if not (math.isfinite(progress) and 0 <= progress <= 1):
            raise InputError(f"progress={progress}: must lie in [0, 1]; it is the share of the training that is done.")
        progress = round(progress * PROGRESS_STEPS) / PROGRESS_STEPS
        if self.needs_progress and progress != self._latest.settings.progress:
            k = self.options.k + (1.0 - self.options.k) * self._annealed(progress)
            # Found or not, tau was reported when the strategy was made.
            settings = replace(self.settings, k=k, progress=progress, tau_found=True)
            if WEIGHTINGS.parse(self.options.weighting).entry.needs_progress:
                self._weights = timestep_weights(self.options.weighting, self.process, settings)
            self._latest = self._make(settings, self._pmf(settings))
        return self._latest

    def tables_to_draw(self, progress: float | None = None) -> SpeeDTables:
        """The tables for a draw: those of `tables`, with a warning where a density that learns is told nothing."""
        if self._learner is not None:
            self._batches_unlearned += 1
            if self._batches_unlearned == BATCHES_BEFORE_WARNING:
                logger.warning(
                    "speed_sampling='%s' learns from the errors of the training, but %d batches were drawn without "
                    "update_speed, so it stays as it is. Give it the errors of each timestep.",
                    self.options.sampling,
                    BATCHES_BEFORE_WARNING,
                )
        return self.tables(progress)

    def update(self, error_sums: Tensor, error_counts: Tensor) -> None:
        """Tells a density that learns the errors of one or more batches, summed over all processes.

        The tensors are read on the CPU, which waits for their device; where the loop synchronises anyway is the place
        to call it. One call adds one entry to each timestep's history, whatever the number of batches.

        Args:
            error_sums: Shape (T,): sum over the samples of each timestep of the prediction's mean squared error,
                without loss weight.
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

    def _learning(self) -> AdaptiveDensity:
        if self._learner is None:
            learning = ", ".join(name for name, entry in DENSITIES.items() if isinstance(entry.function, type))
            raise InputError(f"speed_sampling='{self.options.sampling}' learns nothing; those that do: {learning}.")
        return self._learner

    def _annealed(self, progress: float) -> float:
        """Share of the way of k to 1."""
        start, end = self.options.anneal_start, self.options.anneal_end
        if progress < start or start == 1.0:
            return 0.0
        return 1.0 if progress >= end else (progress - start) / (end - start)

    def _pmf(self, settings: SpeeDSettings) -> Tensor:
        density = self._learner or timestep_density(self.options.sampling, self.process, settings)
        if isinstance(density, AdaptiveDensity):
            self._learner = density
            return density.pmf()
        return normalised(density)

    def _make(self, settings: SpeeDSettings, pmf: Tensor) -> SpeeDTables:
        importance = self._learner.importance_weights() if self._learner else None
        weights = self._weights if importance is None else self._weights * importance
        if self.options.normalize_weights:
            weights = weights / (drawn_pmf(pmf, self.options.draw, self.pivot) * weights).sum()
        return SpeeDTables(self.process, settings, pmf, weights, self.options.draw, self.pivot, self.randint)


def _check(options: SpeeDOptions) -> None:
    _ = DRAWS[options.draw]
    if not isinstance(options.normalize_weights, bool):
        raise InputError(f"speed_normalize_weights={options.normalize_weights!r}: must be true or false.")
    start, end = options.anneal_start, options.anneal_end
    require_number("speed_anneal_start", start)
    require_number("speed_anneal_end", end)
    if not 0 <= start <= 1:
        raise InputError(f"speed_anneal_start={start}: must lie in [0, 1], as a share of the training.")
    if not start <= end <= 1:
        raise InputError(f"speed_anneal_end={end}: must lie in [speed_anneal_start, 1], here [{start}, 1].")
