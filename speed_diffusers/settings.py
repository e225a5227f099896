"""SpeeD's options, each in one place with its range, and its numbers resolved for one process."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from .config.schema import Options, default_of, option, require_number
from .errors import InputError
from .process import ForwardProcess

PREFIX = "speed_"
"""What stands before an option's name in configs of schedulers and on the command line."""


@dataclass(frozen=True)
class SpeeDOptions(Options):
    """What a user chooses. Schedulers, the training script and the docs have each option as `speed_NAME`.

    `sampling` and `weighting` may be functions of one's own instead of names: (process, settings) to T numbers.

    Attributes:
        prediction_type: What the network predicts: epsilon, v_prediction, sample or flow_prediction. It decides what
            weights by SNR come to, and is no option of SpeeD.

    Raises:
        InputError: A number lies outside its range.
    """

    PREFIX: ClassVar[str] = PREFIX

    sampling: str | Callable[..., Any] = option("asymmetric", "Density over timesteps; uniform is the exact baseline.")
    weighting: str | Callable[..., Any] = option(
        "change_aware", "Loss weight over timesteps; none is the exact baseline."
    )
    k: float = option(5.0, "How many times more often timesteps before tau are drawn.", interval="[1, 1e6]")
    tau: float | None = option(
        None, "First timestep of the convergence area, in [1, T], or a share of T in (0, 1); None: from speed_r."
    )
    r: float = option(
        145.0, "The convergence area begins where 1/r of the signal's variance is left.", interval="(1, inf)"
    )
    lambda_: float = option(0.6, "Change-aware weights run from 1 - lambda to lambda.", interval="[0.5, 1]")
    draw: str = option("independent", "How a global batch is drawn from the density.")
    normalize_weights: bool = option(False, "Scale the weights to mean 1 under the draws.")
    anneal_start: float = option(
        1.0, "Share of the training after which k falls, linearly; 1: never.", interval="[0, 1]"
    )
    anneal_end: float = option(1.0, "Share of the training at which k has reached 1.", interval="[0, 1]")
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None:
            require_number(f"{PREFIX}tau", self.tau)
        if not isinstance(self.normalize_weights, bool):
            raise InputError(f"{PREFIX}normalize_weights={self.normalize_weights!r}: must be true or false.")
        if self.anneal_start > self.anneal_end:
            raise InputError(
                f"{PREFIX}anneal_end={self.anneal_end}: must lie in [speed_anneal_start, 1], here "
                f"[{self.anneal_start}, 1]."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction_type: str) -> "SpeeDOptions":
        """The options in a scheduler's config, with defaults for those that it leaves out.

        Args:
            config: Of a scheduler, or any other mapping with `speed_` keys.
            prediction_type: What the network predicts.

        Raises:
            InputError: A number lies outside its range.
        """
        values = {name: config[key] for key, name in SPEED_KEYS.items() if key in config}
        return cls(**values, prediction_type=prediction_type)


SPEED_KEYS: dict[str, str] = {
    PREFIX + field.name.rstrip("_"): field.name for field in fields(SpeeDOptions) if field.name != "prediction_type"
}
"""Config key of each option to its field: `speed_lambda` to `lambda_`."""

SPEED_DEFAULTS: dict[str, Any] = {
    key: default_of(field) for key, name in SPEED_KEYS.items() for field in fields(SpeeDOptions) if field.name == name
}
"""Config key of each option to its default: the paper's SpeeD."""


@dataclass(frozen=True)
class SpeeDSettings:
    """What densities and weightings are told besides the process.

    Attributes:
        k: How many times more often a step before tau is drawn than one from tau on; at least 1.
        tau: First timestep of the convergence area, in [1, T].
        lambda_: Upper end of the change-aware weights, in [0.5, 1]; the lower end is 1 - lambda_.
        tau_found: False if tau was to come from r but the process never settles that far (tau is T then).
        prediction_type: What the network predicts, by diffusers' names; an epsilon error becomes its error by it.
        progress: Share of the training that is done, in [0, 1].
    """

    k: float
    tau: int
    lambda_: float
    tau_found: bool = True
    prediction_type: str = "epsilon"
    progress: float = 0.0

    @classmethod
    def resolve(cls, process: ForwardProcess, options: SpeeDOptions | None = None) -> "SpeeDSettings":
        """SpeeD's numbers on one process; tau is found from r where it is not given.

        Args:
            process: The forward process.
            options: What the user chose; None: the defaults.

        Raises:
            InputError: tau is not on the process.
        """
        options = options or SpeeDOptions()
        num_timesteps = process.num_train_timesteps
        settings = cls(options.k, num_timesteps, options.lambda_, prediction_type=options.prediction_type)
        if options.tau is not None:
            return replace(settings, tau=_given_tau(options.tau, num_timesteps))
        found = process.first_settled_step(options.r)
        # A process whose very first step has settled would leave nothing to prefer; tau stays inside [1, T].
        return replace(settings, tau=max(found, 1), tau_found=found < num_timesteps)


def _given_tau(tau: float, num_train_timesteps: int) -> int:
    if 0 < tau < 1:
        return max(1, round(tau * num_train_timesteps))
    if not math.isfinite(tau) or tau != int(tau) or not 1 <= tau <= num_train_timesteps:
        raise InputError(
            f"speed_tau={tau}: must be a whole number in [1, {num_train_timesteps}], or None (from r), or a share of "
            "all timesteps in (0, 1)."
        )
    return int(tau)
