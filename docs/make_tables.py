"""Writes the tables of the pages in docs/ from the code: registries, options and noise schedules.

    python docs/make_tables.py

What stands between `<!-- made: NAME -->` and `<!-- end -->` on a page is made here; the rest is written by hand. A
test fails where a page is not what this makes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from speed_diffusers.errors import InputError
from speed_diffusers.generation import SAMPLERS
from speed_diffusers.metrics import EXTRACTORS, METRICS
from speed_diffusers.presets import PRESETS
from speed_diffusers.process import ForwardProcess
from speed_diffusers.registry import markdown_table
from speed_diffusers.settings import SPEED_DEFAULTS, SPEED_KEYS, SpeeDOptions, SpeeDSettings
from speed_diffusers.timesteps import DENSITIES, DRAWS
from speed_diffusers.weightings import WEIGHTINGS

PAGES = sorted(Path(__file__).resolve().parent.glob("*.md"))
NIGHTLY = Path(__file__).resolve().parents[1] / "benchmarks" / "nightly" / "result.json"
SCORE_LIBRARIES = Path(__file__).resolve().parents[1] / "benchmarks" / "score_libraries" / "result.json"
STEPS_TO_QUALITY = Path(__file__).resolve().parents[1] / "benchmarks" / "steps_to_quality" / "quickstart" / "table.md"


def diffusion(*, zero_snr: bool = False, **options: Any) -> ForwardProcess:
    """The process of a DDPM scheduler.

    Zero terminal SNR (Lin et al., arXiv 2305.08891, algorithm 1) is made here in float64: the rounding of diffusers'
    float32 depends on the processor, and moves the end of the acceleration area by a few steps.
    """
    process = ForwardProcess.from_scheduler(DDPMScheduler(**options))
    if not zero_snr:
        return process
    root = (1 - process.noise_level).sqrt()
    return ForwardProcess.from_alphas_cumprod(((root - root[-1]) * root[0] / (root[0] - root[-1])).square())


def flow(**options: Any) -> ForwardProcess:
    """The process of a rectified flow."""
    return ForwardProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(**options))


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULES: dict[str, Callable[[], ForwardProcess]] = {
    "linear (DiT)": diffusion,
    "linear, zero terminal SNR": lambda: diffusion(zero_snr=True),
    "linear, T = 10": lambda: diffusion(num_train_timesteps=10),
    "linear, T = 100": lambda: diffusion(num_train_timesteps=100),
    "linear, T = 4,000": lambda: diffusion(num_train_timesteps=4000),
    "linear, T = 10,000": lambda: diffusion(num_train_timesteps=10_000),
    "scaled_linear (Stable Diffusion)": lambda: diffusion(**SD),
    "scaled_linear, zero terminal SNR": lambda: diffusion(**SD, zero_snr=True),
    "scaled_linear, DiT's betas": lambda: diffusion(beta_schedule="scaled_linear"),
    "cosine": lambda: diffusion(**COSINE),
    "cosine, zero terminal SNR": lambda: diffusion(**COSINE, zero_snr=True),
    "cosine, T = 10": lambda: diffusion(**COSINE, num_train_timesteps=10),
    "sigmoid": lambda: diffusion(beta_schedule="sigmoid"),
    "laplace": lambda: diffusion(beta_schedule="laplace"),
    "rectified flow": flow,
    "rectified flow, shift 1.15": lambda: flow(shift=1.15),
    "rectified flow, shift 3 (SD3)": lambda: flow(shift=3.0),
    "rectified flow, T = 10": lambda: flow(num_train_timesteps=10),
    "rectified flow, T = 10,000": lambda: flow(num_train_timesteps=10_000),
}


def markdown(heads: list[str], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def options_table() -> str:
    """SpeeD's keywords with their defaults, ranges and meanings."""
    about = {field.name: field.metadata for field in fields(SpeeDOptions)}
    rows = []
    for key, name in SPEED_KEYS.items():
        default = repr(SPEED_DEFAULTS[key]).replace("'", '"')
        rows.append((f"`{key}`", f"`{default}`", str(about[name]["interval"] or ""), about[name]["help"]))
    return markdown(["keyword", "default", "range", "what it does"], rows)


def samplers_table() -> str:
    """The samplers by name."""
    rows = [(f"`{name}`", entry.summary, entry.reference) for name, entry in SAMPLERS.items()]
    return markdown(["name", "what it does", "source"], rows)


def metrics_table() -> str:
    """The metrics with the numbers that each of them gives."""
    rows = [
        (f"`{name}`", ", ".join(f"`{number}`" for number in entry.function.numbers), entry.summary, entry.reference)
        for name, entry in METRICS.items()
    ]
    return markdown(["metric", "numbers", "what it measures", "source"], rows)


def extractors_table() -> str:
    """The named feature extractors, with the metrics that are defined in their features."""
    rows = []
    for name, entry in EXTRACTORS.items():
        own = [f"`{metric}`" for metric, other in METRICS.items() if other.function.extractor == name]
        rows.append((f"`{name}`", entry.summary, ", ".join(own) or "any of the general ones", entry.reference))
    return markdown(["extractor", "features", "metrics", "source"], rows)


LIBRARY_ROWS = {
    "fid": "Fréchet distance",
    "kid": "KID, 100 subsets",
    "kernel_distance": "KID, one subset of all",
    "inception_score": "Inception Score, 10 splits",
    "precision": "precision",
    "recall": "recall",
}


def score_libraries_table() -> str:
    """Our numbers beside the libraries', from the committed result of benchmarks/score_libraries.py."""
    result = json.loads(SCORE_LIBRARIES.read_text("utf-8"))
    rows = []
    for extractor, numbers in result["numbers"].items():
        ours, fidelity, metrics = (numbers[name] for name in ("speed_diffusers", "torch-fidelity", "torchmetrics"))
        weights = f"{result['inception_weights']} weights, " if extractor == "inception" else ""
        images = f"{extractor}, {weights}2 x {result['images'][extractor]:,} images"
        for name, label in LIBRARY_ROWS.items():
            shown = [f"{each[name]:.6g}" if name in each else "-" for each in (ours, fidelity, metrics)]
            difference = f"{abs(ours[name] / fidelity[name] - 1):.0e}" if fidelity[name] else "-"
            rows.append((images, label, *shown, difference))
    heads = ["features", "number", "speed_diffusers", f"torch-fidelity {result['torch-fidelity']}"]
    return markdown([*heads, f"torchmetrics {result['torchmetrics']}", "ours and torch-fidelity's differ by"], rows)


def areas_table() -> str:
    """The three areas and what they come to, on every schedule, with the defaults r = 145 and k = 5."""
    rows = []
    for name, make in SCHEDULES.items():
        process = make()
        settings = SpeeDSettings.resolve(process)
        steps = process.num_train_timesteps
        areas = process.areas(settings.tau)
        density = torch.ones(steps)
        density[: settings.tau] = 5.0
        rows.append(
            (
                name,
                f"{steps:,}",
                f"{process.fastest_step}",
                f"{settings.tau}" if settings.tau_found else f"{settings.tau} = T",
                f"{float(1 - process.noise_level[settings.tau]):.2%}" if settings.tau_found else "-",
                ", ".join(f"{len(area) / steps:.0%}" for area in vars(areas).values()),
                f"{float(density[settings.tau :].sum() / density.sum()):.1%}",
                _pivot(process),
            )
        )
    shares = "steps: acceleration, deceleration, convergence"
    heads = ["noise schedule", "T", "acceleration ends at", "tau", "signal left at tau", shares]
    return markdown([*heads, "draws from tau on, k = 5", "pivot m of the authors"], rows)


def _pivot(process: ForwardProcess) -> str:
    try:
        return str(process.dual_pivot)
    except InputError:
        return "none"


RECIPES = {
    "EDM, data of standard deviation 0.5": (1.0, 2.4),
    "EDM2": (-0.6, 2.0),
    "SD3, diffusers' defaults": (0.0, 2.0),
    "JiT": (-1.6, 1.6),
}
"""Published densities over the noise by mean and standard deviation of log SNR, for data of variance 1."""


def equal_settings_table() -> str:
    """One density in the words of each of our names and of diffusers' scripts, on a flow without shift."""
    rows = [
        (
            recipe,
            f"N({mean:g}, {std:g}^2)",
            f"`gaussian:mean={mean:g},std={std:g}`",
            f"`logit_normal:mean={-mean / 2 + 0.0:g},std={std / 2:g}`",
            f"`edm:mean={-mean / 2 + 0.0:g},std={std / 2:g}`",
            f"`--logit_mean {mean / 2 + 0.0:g} --logit_std {std / 2:g}`",
        )
        for recipe, (mean, std) in RECIPES.items()
    ]
    ours = ["`gaussian`", "`logit_normal`", "`edm`"]
    return markdown(["recipe", "log SNR", *ours, "diffusers' SD3 and Flux scripts"], rows)


def presets_table() -> str:
    """The presets with their settings."""
    rows = [
        (f"`{name}`", ", ".join(f"`{key}={value}`" for key, value in settings.items()))
        for name, settings in PRESETS.items()
    ]
    return markdown(["preset", "settings"], rows)


def screening_table() -> str:
    """What each density and weighting saves, out of the committed tables of benchmarks/steps_to_quality.py."""
    _, _, rest = STEPS_TO_QUALITY.read_text("utf-8").partition("**Density and weighting alone**")
    return next(block for block in rest.split("\n\n") if block.startswith("|"))


def nightly_table() -> str:
    """The last outcome of the tests that take minutes, from the committed result."""
    result = json.loads(NIGHTLY.read_text("utf-8"))
    tests: dict[str, list[dict[str, Any]]] = {}
    for test in result["tests"]:
        tests.setdefault(test["name"].partition("[")[0], []).append(test)
    rows = []
    for name, cases in tests.items():
        outcomes = [case["outcome"] for case in cases]
        counted = ", ".join(f"{outcomes.count(each)} {each}" for each in sorted(set(outcomes)))
        numbers: dict[str, float] = {}
        for case in cases:
            for key, value in case["numbers"].items():
                numbers[key] = numbers.get(key, 0) + value
        said = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in numbers.items() if key != "seed")
        seconds = sum(case["seconds"] for case in cases)
        when = ", ".join(sorted({f"{case['date']} {case['commit']}" for case in cases}))
        rows.append((f"`{name.rpartition('::')[2]}`", counted, said or "-", f"{seconds:.0f} s", when))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    table = markdown(["test", "outcome", "numbers", "took", "date and commit"], rows)
    return f"{result['machine']}; {versions}.\n\n{table}"


MADE: dict[str, Callable[[], str]] = {
    "options": options_table,
    "densities": lambda: markdown_table(DENSITIES),
    "weightings": lambda: markdown_table(WEIGHTINGS),
    "draws": lambda: markdown_table(DRAWS),
    "presets": presets_table,
    "equal_settings": equal_settings_table,
    "areas": areas_table,
    "samplers": samplers_table,
    "metrics": metrics_table,
    "extractors": extractors_table,
    "score_libraries": score_libraries_table,
    "nightly": nightly_table,
    "screening": screening_table,
}


def with_tables(page: str) -> str:
    """The text of a page with its tables made anew.

    Raises:
        KeyError: The page asks for a table that is not made here.
    """

    def make(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n\n{MADE[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- made: (\w+) -->.*?<!-- end -->", make, page, flags=re.DOTALL)


def main() -> None:
    """Rewrites the pages where they are."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
