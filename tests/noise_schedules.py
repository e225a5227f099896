"""Noise schedules of every kind, and the test of a distribution, shared by the tests of the method."""

import inspect
import math

import numpy as np
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from speed_diffusers.process import ForwardProcess
from speed_diffusers.settings import SpeeDOptions, SpeeDSettings

SCHEDULES = {
    "linear": lambda: DDPMScheduler(),
    "scaled_linear": lambda: DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "sigmoid": lambda: DDPMScheduler(beta_schedule="sigmoid"),
    "laplace": lambda: DDPMScheduler(beta_schedule="laplace"),
    "linear, zero terminal SNR": lambda: DDPMScheduler(rescale_betas_zero_snr=True),
    "cosine, zero terminal SNR": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True),
    "CogVideoX": lambda: CogVideoXDDIMScheduler(rescale_betas_zero_snr=True),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow, shift 3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "linear, T=10": lambda: DDPMScheduler(num_train_timesteps=10),
    "linear, T=10000": lambda: DDPMScheduler(num_train_timesteps=10_000),
    "flow, T=10": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=10),
    "flow, T=10000": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=10_000),
}
if "laplace" not in inspect.getsource(DDPMScheduler):  # the oldest diffusers that setup.py allows has none
    del SCHEDULES["laplace"]


def process_named(name: str) -> ForwardProcess:
    """The forward process of one of `SCHEDULES`."""
    return ForwardProcess.from_scheduler(SCHEDULES[name]())


def settings_of(process: ForwardProcess, **changes: object) -> SpeeDSettings:
    """The paper's settings, with changes."""
    values = {"k": 5.0, "tau": None, "r": 145.0, "lambda_": 0.6} | changes
    return SpeeDSettings.resolve(process, SpeeDOptions(**values))  # type: ignore[arg-type]


def chi_square_p_value(counts: np.ndarray, pmf: np.ndarray) -> float:
    """Upper tail by Wilson and Hilferty's cube root, good to a percent from about ten cells on.

    Neighbouring cells are joined until each expects ten draws, below which the law of the statistic is another.
    """
    expected = pmf * counts.sum()
    group = np.minimum((np.cumsum(expected) // 10).astype(int), int(expected.sum() // 10) - 1)
    expected, counts = (np.bincount(group, weights=values) for values in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    spread = 2.0 / (9.0 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2.0))
