"""SpeeD's numbers, checked at the door and resolved for one process."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .errors import InputError
from .process import ForwardProcess


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
    def resolve(
        cls,
        process: ForwardProcess,
        *,
        k: float,
        tau: float | None,
        r: float,
        lambda_: float,
        prediction_type: str = "epsilon",
    ) -> "SpeeDSettings":
        """Checks the numbers against their ranges and finds tau from `r` where it is not given.

        Args:
            process: The forward process.
            k: At least 1.
            tau: A timestep in [1, T], or a share of T in (0, 1), or None: from `r`.
            r: Magnitude by which the signal's variance has shrunk at tau, above 1.
            lambda_: In [0.5, 1].
            prediction_type: Name of what the network predicts.

        Raises:
            InputError: k below 1, tau outside its ranges, r not above 1, lambda_ outside [0.5, 1], or not finite.
        """
        for name, value in (("speed_k", k), ("speed_tau", tau or 1), ("speed_r", r), ("speed_lambda", lambda_)):
            require_number(name, value)
        if not (math.isfinite(k) and k >= 1):
            raise InputError(f"speed_k={k}: must be a finite number of at least 1 (1 draws all timesteps alike).")
        if not 0.5 <= lambda_ <= 1:
            raise InputError(
                f"speed_lambda={lambda_}: must lie in [0.5, 1]; the weights run from 1 - lambda to lambda, "
                "so above 1 some would be negative."
            )
        settings = cls(k, process.num_train_timesteps, lambda_, prediction_type=prediction_type)
        if tau is not None:
            return replace(settings, tau=_given_tau(tau, process.num_train_timesteps))
        if not (math.isfinite(r) and r > 1):
            raise InputError(f"speed_r={r}: must be a finite number above 1.")
        found = process.first_settled_step(r)
        # A process whose very first step has settled would leave nothing to prefer; tau stays inside [1, T].
        return replace(settings, tau=max(found, 1), tau_found=found < process.num_train_timesteps)


def _given_tau(tau: float, num_train_timesteps: int) -> int:
    if 0 < tau < 1:
        return max(1, round(tau * num_train_timesteps))
    if not math.isfinite(tau) or tau != int(tau) or not 1 <= tau <= num_train_timesteps:
        raise InputError(
            f"speed_tau={tau}: must be a whole number in [1, {num_train_timesteps}], or None (from r), or a share of "
            "all timesteps in (0, 1)."
        )
    return int(tau)


def require_number(name: str, value: Any) -> None:
    """Checks that a setting is a number.

    Raises:
        InputError: It is of another type; True and False are no numbers here.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name}={value!r}: must be a number.")
