"""SpeeD without a diffusers scheduler: tables in, indices and weights out.

    tables = speed_tables(alphas_cumprod=alphas_cumprod, prediction_type="v_prediction")
    timesteps = draw(tables, len(batch), generator)         # int64, 0 is the one with the least noise
    loss = (weights(tables, timesteps) * error).mean()      # error: each sample's mean squared error

Plain functions of their arguments. What is loss-aware needs an object with state: make a `SpeeDStrategy` of the
same process and options.
"""

from typing import Any

from torch import Tensor

from .errors import InputError, unknown_name
from .predictions import FLOW_PREDICTION
from .process import ForwardProcess
from .settings import SPEED_KEYS, SpeeDOptions
from .strategy import SpeeDStrategy
from .tables import SpeeDTables, draw, weights

__all__ = ["draw", "process_from", "speed_tables", "weights"]


def process_from(
    *, alphas_cumprod: Tensor | None = None, sigmas: Tensor | None = None, num_train_timesteps: int | None = None
) -> ForwardProcess:
    """The forward process of a schedule that is given in exactly one of three ways.

    Args:
        alphas_cumprod: (T,), of a variance-preserving process; index 0 has the least noise.
        sigmas: (T,), of a rectified flow (1 - sigma) x_0 + sigma eps; index 0 has the least noise.
        num_train_timesteps: T of a rectified flow with sigma = 1/T, 2/T, ..., 1.

    Raises:
        InputError: None or several are given, or one is not such a schedule.
    """
    given = [value is not None for value in (alphas_cumprod, sigmas, num_train_timesteps)]
    if sum(given) != 1:
        raise InputError("Give the noise schedule once: alphas_cumprod, sigmas or num_train_timesteps.")
    if alphas_cumprod is not None:
        return ForwardProcess.from_alphas_cumprod(alphas_cumprod)
    if sigmas is not None:
        return ForwardProcess.from_sigmas(sigmas)
    assert num_train_timesteps is not None
    return ForwardProcess.rectified_flow(num_train_timesteps)


def speed_tables(
    *,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    num_train_timesteps: int | None = None,
    prediction_type: str | None = None,
    progress: float | None = None,
    **options: Any,
) -> SpeeDTables:
    """Probabilities and weights of every timestep; the defaults are the paper's SpeeD (arXiv 2405.17403).

    Args:
        alphas_cumprod: As for `process_from`.
        sigmas: As for `process_from`.
        num_train_timesteps: As for `process_from`.
        prediction_type: epsilon, v_prediction, sample or flow_prediction, whose error is weighted; None: epsilon, or
            flow_prediction on a rectified flow.
        progress: Share of the training that is done, in [0, 1]; needed where k is annealed or the density changes.
        options: Fields of `SpeeDOptions`, such as `k=3.0` or `weighting="min_snr:gamma=5"`; `sampling` and
            `weighting` may be functions of your own.

    Raises:
        InputError: An option or choice is unknown, outside its range, does not fit the process, or is loss-aware.
    """
    process = process_from(alphas_cumprod=alphas_cumprod, sigmas=sigmas, num_train_timesteps=num_train_timesteps)
    for name in options:
        if name not in SPEED_KEYS.values():
            raise unknown_name("SpeeD option", name, SPEED_KEYS.values())
    predicted = prediction_type or ("epsilon" if alphas_cumprod is not None else FLOW_PREDICTION)
    strategy = SpeeDStrategy(process, SpeeDOptions(**options, prediction_type=predicted))
    if strategy.is_loss_aware:
        learning = ", ".join(f"{name}='{options[name]}'" for name in strategy.learning)
        raise InputError(
            f"{learning} learns from the losses of the training, so plain tables cannot hold it; make a SpeeDStrategy "
            "of the process and these options."
        )
    return strategy.tables(progress)
