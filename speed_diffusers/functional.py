"""SpeeD without a diffusers scheduler: tables in, indices and weights out.

    tables = speed_tables(alphas_cumprod=alphas_cumprod, prediction_type="v_prediction")
    timesteps = draw(tables, len(batch), generator)         # int64, 0 is the one with the least noise
    loss = (weights(tables, timesteps) * error).mean()      # error: each sample's mean squared error

Plain functions of their arguments. A density that learns from errors needs an object with state: make a
`SpeeDStrategy` of the same process and options.
"""

from torch import Tensor

from .errors import InputError
from .process import ForwardProcess
from .strategy import SpeeDOptions, SpeeDStrategy
from .tables import SpeeDTables, draw, weights
from .timesteps import INDEPENDENT

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
    sampling: str = "asymmetric",
    weighting: str = "change_aware",
    draw: str = INDEPENDENT,
    k: float = 5.0,
    tau: float | None = None,
    r: float = 145.0,
    lambda_: float = 0.6,
    normalize_weights: bool = False,
    anneal_start: float = 1.0,
    anneal_end: float = 1.0,
    progress: float | None = None,
) -> SpeeDTables:
    """Probabilities and weights of every timestep; the defaults are the paper's SpeeD (arXiv 2405.17403).

    Args:
        alphas_cumprod: As for `process_from`.
        sigmas: As for `process_from`.
        num_train_timesteps: As for `process_from`.
        prediction_type: epsilon, v_prediction, sample or flow_prediction, whose error is weighted; None: epsilon, or
            flow_prediction on a rectified flow.
        sampling: Density, such as "asymmetric" or "logit_normal:mean=-0.5".
        weighting: Loss weighting, such as "change_aware" or "min_snr:gamma=5".
        draw: "independent", "paired" or "stratified".
        k: How many times more often steps before tau are drawn; at least 1.
        tau: First timestep of the convergence area, or a share of T in (0, 1); None: from `r`.
        r: The convergence area begins where 1/r of the signal's variance is left; above 1.
        lambda_: Change-aware weights run from 1 - lambda to lambda; in [0.5, 1].
        normalize_weights: Scale the weights to mean 1 under the law of the draws.
        anneal_start: Share of the training after which k begins to fall to 1; 1: never.
        anneal_end: Share of the training at which k is 1.
        progress: Share of the training that is done, in [0, 1]; needed where k is annealed or the density changes.

    Raises:
        InputError: A choice is unknown, outside its range, does not fit the process, or learns from errors.
    """
    process = process_from(alphas_cumprod=alphas_cumprod, sigmas=sigmas, num_train_timesteps=num_train_timesteps)
    options = SpeeDOptions(
        sampling=sampling,
        weighting=weighting,
        k=k,
        tau=tau,
        r=r,
        lambda_=lambda_,
        draw=draw,
        normalize_weights=normalize_weights,
        anneal_start=anneal_start,
        anneal_end=anneal_end,
        prediction_type=prediction_type or ("epsilon" if alphas_cumprod is not None else "flow_prediction"),
    )
    strategy = SpeeDStrategy(process, options)
    if strategy.is_adaptive:
        raise InputError(
            f"sampling='{sampling}' learns from the errors of the training, so plain tables cannot hold it; make a "
            "SpeeDStrategy of the process and these options."
        )
    return strategy.tables(progress)
