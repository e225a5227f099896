"""Writes the tables of docs/strategies.md from the registries and the noise schedules.

    python docs/make_strategies.py

What stands between `<!-- made: NAME -->` and `<!-- end -->` is made here; the rest of the page is written by hand. A
test fails where the page is not what this makes.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from speed_diffusers.errors import InputError
from speed_diffusers.presets import PRESETS
from speed_diffusers.process import ForwardProcess
from speed_diffusers.registry import markdown_table
from speed_diffusers.settings import SpeeDSettings
from speed_diffusers.timesteps import DENSITIES, DRAWS
from speed_diffusers.weightings import WEIGHTINGS

PAGE = Path(__file__).resolve().parent / "strategies.md"

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULES: dict[str, Callable[[], DDPMScheduler | FlowMatchEulerDiscreteScheduler]] = {
    "linear (DiT)": lambda: DDPMScheduler(),
    "linear, zero terminal SNR": lambda: DDPMScheduler(rescale_betas_zero_snr=True),
    "linear, T = 10": lambda: DDPMScheduler(num_train_timesteps=10),
    "linear, T = 100": lambda: DDPMScheduler(num_train_timesteps=100),
    "linear, T = 4,000": lambda: DDPMScheduler(num_train_timesteps=4000),
    "linear, T = 10,000": lambda: DDPMScheduler(num_train_timesteps=10_000),
    "scaled_linear (Stable Diffusion)": lambda: DDPMScheduler(**SD),
    "scaled_linear, zero terminal SNR": lambda: DDPMScheduler(**SD, rescale_betas_zero_snr=True),
    "scaled_linear, DiT's betas": lambda: DDPMScheduler(beta_schedule="scaled_linear"),
    "cosine": lambda: DDPMScheduler(**COSINE),
    "cosine, zero terminal SNR": lambda: DDPMScheduler(**COSINE, rescale_betas_zero_snr=True),
    "cosine, T = 10": lambda: DDPMScheduler(**COSINE, num_train_timesteps=10),
    "sigmoid": lambda: DDPMScheduler(beta_schedule="sigmoid"),
    "laplace": lambda: DDPMScheduler(beta_schedule="laplace"),
    "rectified flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "rectified flow, shift 1.15": lambda: FlowMatchEulerDiscreteScheduler(shift=1.15),
    "rectified flow, shift 3 (SD3)": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "rectified flow, T = 10": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=10),
    "rectified flow, T = 10,000": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=10_000),
}


def areas_table() -> str:
    """The three areas and what they come to, on every schedule, with the defaults r = 145 and k = 5."""
    lines = [
        "| noise schedule | T | acceleration ends at | tau | signal left at tau | steps: acceleration, deceleration, "
        "convergence | draws from tau on, k = 5 | pivot m of the authors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, make in SCHEDULES.items():
        process = ForwardProcess.from_scheduler(make())
        settings = SpeeDSettings.resolve(process)
        steps = process.num_train_timesteps
        areas = process.areas(settings.tau)
        shares = ", ".join(f"{len(area) / steps:.0%}" for area in vars(areas).values())
        density = torch.ones(steps)
        density[: settings.tau] = 5.0
        drawn = f"{float(density[settings.tau :].sum() / density.sum()):.1%}"
        left = f"{float(1 - process.noise_level[settings.tau]):.2%}" if settings.tau_found else "-"
        tau = settings.tau if settings.tau_found else f"{settings.tau} = T"
        lines.append(
            f"| {name} | {steps:,} | {process.fastest_step} | {tau} | {left} | {shares} | {drawn} "
            f"| {_pivot(process)} |"
        )
    return "\n".join(lines)


def _pivot(process: ForwardProcess) -> str:
    try:
        return str(process.dual_pivot)
    except InputError:
        return "none"


def presets_table() -> str:
    """The presets with their settings."""
    lines = ["| preset | settings |", "|---|---|"]
    for name, settings in PRESETS.items():
        lines.append(f"| `{name}` | {', '.join(f'`{key}={value}`' for key, value in settings.items())} |")
    return "\n".join(lines)


MADE: dict[str, Callable[[], str]] = {
    "densities": lambda: markdown_table(DENSITIES),
    "weightings": lambda: markdown_table(WEIGHTINGS),
    "draws": lambda: markdown_table(DRAWS),
    "presets": presets_table,
    "areas": areas_table,
}


def with_tables(page: str) -> str:
    """The page with its tables made anew.

    Raises:
        KeyError: The page asks for a table that is not made here.
    """

    def make(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n\n{MADE[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- made: (\w+) -->.*?<!-- end -->", make, page, flags=re.DOTALL)


def main() -> None:
    """Rewrites the page where it is."""
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
