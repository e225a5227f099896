"""Named settings of the SpeeD schedulers."""

from types import MappingProxyType

PRESETS = MappingProxyType(
    {
        # SpeeD as its paper has it (arXiv 2405.17403): the default of every SpeeD scheduler.
        "paper": {
            "speed_sampling": "asymmetric",
            "speed_weighting": "change_aware",
            "speed_k": 5.0,
            "speed_tau": None,
            "speed_r": 145.0,
            "speed_lambda": 0.6,
        },
        # A plain diffusers loop, bit for bit.
        "uniform": {"speed_sampling": "uniform", "speed_weighting": "none"},
    }
)
"""Preset name to the `speed_` keywords that make it: `SpeeDDDPMScheduler(**PRESETS["paper"])`."""
