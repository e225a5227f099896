"""What a network may predict, and how its error relates to the error of the noise."""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import unknown_name
from .process import ForwardProcess

FLOW_PREDICTION = "flow_prediction"

# From x_t = a x_0 + s eps with a^2 / s^2 = SNR, for a given x_t; a^2 + s^2 = 1 except on a flow, where a + s = 1.
#   x_0:  eps = (x_t - a x_0) / s                 so the error of eps is a^2 / s^2 times that of x_0
#   v:    v = a eps - s x_0, eps = s x_t + a v    so it is a^2 times that of v
#   flow: u = eps - x_0, eps = x_t + a u          so it is a^2 times that of u, with a = 1 - sigma
EPSILON_ERROR_RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": torch.ones_like,
    "sample": lambda snr: snr,
    "v_prediction": lambda snr: snr / (1.0 + snr),
    FLOW_PREDICTION: lambda snr: snr / (1.0 + snr.sqrt()).square(),
}
"""Prediction type to the ratio of squared errors, epsilon's over the prediction's, as a function of SNR."""

SNR_BOUNDS = (1e-6, 1e12)
"""Beyond these no weight exceeds what it is there: some grow without limit as the signal or the noise vanishes."""

# Where the exponential of float64 neither overflows nor vanishes, nor does its square.
_LARGEST_LOG_SNR = 80.0


def epsilon_error_ratio(process: ForwardProcess, prediction_type: str) -> Tensor:
    """Squared error of epsilon over squared error of the prediction, shape (T,), float64; 0 where no signal is left.

    Raises:
        InputError: Unknown prediction type.
    """
    return _ratio(prediction_type)(process.log_snr.clamp(-_LARGEST_LOG_SNR, _LARGEST_LOG_SNR).exp())


def weights_by_snr(
    epsilon_weight: Callable[[Tensor], Tensor], process: ForwardProcess, prediction_type: str
) -> Tensor:
    """Weights of a prediction's squared error that count the error of epsilon by a function of the SNR.

    Where the weight grows without limit as the SNR goes to 0 (such as SNR^-1/2 on epsilon with zero terminal SNR) or
    to infinity, it stays at its value at the bounds `SNR_BOUNDS`; weights that fall or settle are exact everywhere.

    Args:
        epsilon_weight: SNR, float64 and above 0, to the weight of epsilon's squared error.
        process: The forward process.
        prediction_type: What the network predicts.

    Returns:
        Shape (T,), float64, finite, none negative.

    Raises:
        InputError: Unknown prediction type.
    """
    ratio = _ratio(prediction_type)
    snr = process.log_snr.clamp(-_LARGEST_LOG_SNR, _LARGEST_LOG_SNR).exp()
    bounded = snr.clamp(*SNR_BOUNDS)
    return torch.minimum(epsilon_weight(snr) * ratio(snr), epsilon_weight(bounded) * ratio(bounded))


def _ratio(prediction_type: str) -> Callable[[Tensor], Tensor]:
    if prediction_type not in EPSILON_ERROR_RATIOS:
        raise unknown_name("prediction_type", prediction_type, EPSILON_ERROR_RATIOS)
    return EPSILON_ERROR_RATIOS[prediction_type]
