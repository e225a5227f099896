"""Named settings of the SpeeD schedulers.

`official`, `official_k2` and `seed` are what the authors' code does where it differs from the paper; the differences
are listed in one place, docs/strategies.md. They need a noise schedule on which the pivot of the authors' pairs exists
(not a rectified flow), and `official` 700 timesteps at least.
"""

from types import MappingProxyType
from typing import Any

_INDEPENDENT = {"speed_draw": "independent"}

# The authors' current code (NUS-HPC-AI-Lab/SpeeD): a fixed tau, draws in pairs, weight 1 from tau on.
_OFFICIAL = {
    "speed_sampling": "asymmetric",
    "speed_weighting": "official",
    "speed_k": 5.0,
    "speed_tau": 700,
    "speed_lambda": 0.6,
    "speed_draw": "paired",
}

PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        # SpeeD as its paper has it (arXiv 2405.17403): the default of every SpeeD scheduler.
        "paper": {
            "speed_sampling": "asymmetric",
            "speed_weighting": "change_aware",
            "speed_k": 5.0,
            "speed_tau": None,
            "speed_r": 145.0,
            "speed_lambda": 0.6,
            **_INDEPENDENT,
        },
        # A plain diffusers loop, bit for bit, whatever options a config has had before.
        "uniform": {
            "speed_sampling": "uniform",
            "speed_weighting": "none",
            **_INDEPENDENT,
            "speed_normalize_weights": False,
            "speed_anneal_start": 1.0,
        },
        # Of their ImageNet, U-Net and text-to-image configurations.
        "official": _OFFICIAL,
        # Of their FFHQ, CelebA and rebuttal configurations.
        "official_k2": {**_OFFICIAL, "speed_k": 2.0},
        # Their first code (kaiwang960112/SpeeD, `faster: true`).
        "seed": {"speed_sampling": "t_sample", "speed_weighting": "p2:k=1,gamma=1", "speed_draw": "paired"},
        # The paper's two halves, as in its ablation.
        "sampling_only": {"speed_sampling": "asymmetric", "speed_weighting": "none", **_INDEPENDENT},
        "weighting_only": {"speed_sampling": "uniform", "speed_weighting": "change_aware", **_INDEPENDENT},
        # The paper's, but tau at 700 of 1,000 timesteps whatever the noise is there: right on DiT's schedule only.
        "fixed_tau": {
            "speed_sampling": "asymmetric",
            "speed_weighting": "change_aware",
            "speed_tau": 0.7,
            **_INDEPENDENT,
        },
        # Of config=quickstart/fast: log SNR is normal around -1, stratified draws, no weights. Not of the paper.
        "fast": {"speed_sampling": "gaussian:mean=-1", "speed_weighting": "none", "speed_draw": "stratified"},
    }
)
"""Preset name to the `speed_` keywords that make it: `SpeeDDDPMScheduler(**PRESETS["paper"])`."""
