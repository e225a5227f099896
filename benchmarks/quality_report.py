"""Tables and pictures of the committed results of `steps_to_quality.py`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from quality_arms import ARMS, DENSITIES, SETTINGS
from quality_estimator import SHARES, Curve, load_curves, step_ratio

BASELINES = {"uniform_epsilon": "as published", "uniform_epsilon_tuned": "at 4e-3"}
COSINE = "_cosine"
FACTORS = (
    ("SpeeD's density and weighting: epsilon, DiT's embedders", "paper_epsilon", "uniform_epsilon"),
    ("SpeeD's density and weighting: epsilon, unit embedders", "paper_epsilon_unit", "uniform_epsilon_unit"),
    ("SpeeD's density and weighting: epsilon, unit embedders, Muon", "paper_epsilon_fast", "uniform_epsilon_fast"),
    ("SpeeD's density and weighting: velocity, DiT's embedders", "paper_v", "uniform_v"),
    ("SpeeD's density and weighting: flow, DiT's embedders", "paper_flow", "uniform_flow"),
    ("SpeeD's density and weighting: velocity, unit embedders", "paper_v_unit", "uniform_v_unit"),
    ("SpeeD's density and weighting: velocity, unit embedders, Muon", "paper_v_fast", "uniform_v_fast"),
    ("Gaussian over log SNR, even draw: velocity, unit embedders", "fast_density_v_unit", "uniform_v_unit"),
    ("Gaussian over log SNR, even draw: velocity, unit embedders, Muon", "fast", "uniform_v_fast"),
    (
        "Even draw, not an independent one: Gaussian, velocity, unit embedders",
        "fast_density_v_unit",
        "gaussian_v_unit",
    ),
    ("Velocity instead of epsilon: uniform", "uniform_v", "uniform_epsilon"),
    ("Velocity instead of epsilon: SpeeD", "paper_v", "paper_epsilon"),
    ("Velocity instead of epsilon: uniform, unit embedders, Muon", "uniform_v_fast", "uniform_epsilon_fast"),
    ("Embedders of unit size: uniform, epsilon", "uniform_epsilon_unit", "uniform_epsilon"),
    ("Embedders of unit size: uniform, velocity", "uniform_v_unit", "uniform_v"),
    ("Embedders of unit size: SpeeD, velocity", "paper_v_unit", "paper_v"),
    ("Muon instead of AdamW at 4e-3: the recipe", "fast", "fast_adamw"),
    (
        "Muon instead of AdamW at 1e-3: uniform, epsilon, unit embedders",
        "uniform_epsilon_fast",
        "uniform_epsilon_unit",
    ),
    ("Muon instead of AdamW at 1e-3: SpeeD, epsilon, unit embedders", "paper_epsilon_fast", "paper_epsilon_unit"),
    ("Learning rate of the baseline: 4e-3 instead of 1e-3", "uniform_epsilon_tuned", "uniform_epsilon"),
    ("Learning rate of the baseline: 4e-3 instead of 2e-3", "uniform_epsilon_tuned", "uniform_epsilon_rate_0.002"),
    ("The whole recipe, the baseline at 2e-3", "fast", "uniform_epsilon_rate_0.002"),
    ("The whole recipe with an average of 0.99, the baseline at 2e-3", "fast_ema_0.99", "uniform_epsilon_rate_0.002"),
    ("Average of 0.99 instead of 0.995: the recipe", "fast_ema_0.99", "fast"),
    (
        "Average of 0.99 instead of 0.995: the baseline at 4e-3",
        "uniform_epsilon_tuned_ema_0.99",
        "uniform_epsilon_tuned",
    ),
    ("The whole recipe, average of 0.99 in both", "fast_ema_0.99", "uniform_epsilon_tuned_ema_0.99"),
    (
        "The whole recipe, average of 0.99 in both, the baseline at 2e-3",
        "fast_ema_0.99",
        "uniform_epsilon_rate_0.002_ema_0.99",
    ),
)
"""What is changed and with what else, the arm that has it and the one that has not."""

FACTOR_SHARES = (0.5, 1.0)

LADDER = (
    ("DiT's recipe: uniform timesteps, epsilon, AdamW at 1e-3", "uniform_epsilon"),
    ("the same at 4e-3", "uniform_epsilon_tuned"),
    ("SpeeD instead of uniform timesteps", "paper_epsilon"),
    ("velocity instead of epsilon", "uniform_v"),
    ("both: SpeeD and velocity", "paper_v"),
    ("and embedders of unit size", "paper_v_unit"),
    ("and log SNR normal around -1, evenly drawn, instead of SpeeD's density", "fast_density_v_unit"),
    ("and AdamW at 4e-3", "fast_adamw"),
    ("and Muon instead: `fast`", "fast"),
    ("and an average over half as many steps: decay 0.99 instead of 0.995", "fast_ema_0.99"),
)
"""The front page's rows: what is chosen, row by row, and the arm."""
TUNED_ON, UNTOUCHED = "quickstart", "emoji"
"""The settings whose results it shows: the one that the recipe was made on, and one that nothing was chosen on."""
MARKERS = "<!-- made: steps_to_quality -->", "<!-- end -->"

DISTANCES = {"frechet_distance": ("Fréchet distance", "{:.2f}"), "kernel_distance": ("Kernel distance", "{:.4f}")}
"""By score: its name in words, and how its values are written."""

SCREENING_SHARES = {"epsilon": (0.5, 1.0), "v": (0.5, 0.75), "flow": (0.5, 0.75)}
"""By target: shares of the run of uniform sampling, as far as the others were run."""

PLOTTED = ("uniform_epsilon", "uniform_epsilon_tuned", "paper_epsilon", "paper_v", "fast", "fast_ema_0.99")
SHOWN_STEPS = (500, 1000, 1500, 3000)


def write_report(folder: Path) -> str:
    """Writes `table.md` and `curves.png` beside the results of a setting; returns the table."""
    curves = load_curves(folder)
    score = SETTINGS[folder.name].score
    is_cosine = [curve.arm.endswith(COSINE) for curve in curves]
    constant = [curve for curve, other in zip(curves, is_cosine, strict=True) if not other]
    cosine = [curve for curve, own in zip(curves, is_cosine, strict=True) if own]
    parts: list[str | None] = []
    if constant:
        parts.append(distances(constant, score, "after steps**", SHOWN_STEPS))
        parts += [ratios(constant, score, baseline, SHARES) for baseline in BASELINES]
        parts += [factors(constant, score), screening(constant, score)]
        plot(constant, score, folder / "curves.png")
    if cosine:
        parts.append(distances(cosine, score, "at the end of runs with a cosine schedule**, by their length", None))
        for baseline in BASELINES:
            measured = sorted({step for curve in cosine if curve.arm == baseline + COSINE for step in curve.points})
            parts.append(ratios(cosine, score, baseline + COSINE, [step / max(measured) for step in measured]))
    table = "\n\n".join([*filter(None, parts), harm(curves, score), errors(curves)])
    (folder / "table.md").write_text(table + "\n")
    return table


def arms_of(curves: Sequence[Curve]) -> list[str]:
    """The arms that have results, and the curves that arms share, in their order."""
    found = {curve.arm for curve in curves}
    return [name for name in dict.fromkeys(arm.curve or name for name, arm in ARMS.items()) if name in found]


def _mean(curves: Sequence[Curve], arm: str, step: int, score: str) -> str:
    """Mean over the seeds that were measured then, with their number if others were not."""
    values = [curve.points[step][score] for curve in curves if curve.arm == arm and step in curve.points]
    known = [value for value in values if value is not None]
    _, form = DISTANCES.get(score, ("", "{:.2f}"))
    of_some = f" ({len(values)})" if len(values) < sum(curve.arm == arm for curve in curves) else ""
    return form.format(np.mean(known)) + of_some if known else ""


def distances(curves: Sequence[Curve], score: str, when: str, steps: Sequence[int] | None) -> str:
    """Mean distance over the seeds by step.

    Args:
        curves: What is shown.
        score: Which distance.
        when: The end of the table's heading.
        steps: The columns; None: every step that was scored.
    """
    steps = steps or sorted({step for curve in curves for step in curve.points})
    lines = [
        f"**{DISTANCES[score][0]} {when}, mean over the seeds, or over as many of them as stand in brackets (lower "
        "is better).",
        "",
        "| arm | seeds | " + " | ".join(f"{step:,}" for step in steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for arm in arms_of(curves):
        seeds = sum(curve.arm == arm for curve in curves)
        cells = [_mean(curves, arm, step, score) for step in steps]
        lines.append(f"| {arm} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ladder(curves: Sequence[Curve], untouched: Sequence[Curve]) -> str:
    """The front page's table: steps to where the baselines end, one factor after the other.

    Args:
        curves: Of the setting that the recipe was made on.
        untouched: Of the other one.
    """
    published, tuned = BASELINES
    columns = (
        (curves, published, SETTINGS[TUNED_ON].score),
        (curves, tuned, SETTINGS[TUNED_ON].score),
        (untouched, published, SETTINGS[UNTOUCHED].score),
    )
    lines = [
        f"| trained with | times fewer steps | than the baseline at 4e-3 | seeds | on {UNTOUCHED} |",
        "|---|---|---|---|---|",
    ]
    for what, arm in LADDER:
        seeds = sum(curve.arm == arm for curve in curves)
        of_all = [
            "1" if arm == baseline else str(step_ratio(given, arm, baseline, 1.0, score) or "")
            for given, baseline, score in columns
        ]
        lines.append(f"| {what} | {' | '.join([*of_all[:2], str(seeds), *of_all[2:]])} |")
    return "\n".join(lines)


def with_ladder(page: str, results: Path) -> str:
    """A page with the table of the results in a folder in its place."""
    begin, end = MARKERS
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    table = ladder(load_curves(results / TUNED_ON), load_curves(results / UNTOUCHED))
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def factors(curves: Sequence[Curve], score: str) -> str | None:
    """How many times fewer steps one change saves, all else being equal; None where no two arms compare."""
    rows = []
    for changed, arm, without in FACTORS:
        found = [step_ratio(curves, arm, without, share, score) for share in FACTOR_SHARES]
        if None not in found:
            rows.append(f"| {changed} | {arm} | {without} | {' | '.join(map(str, found))} |")
    if not rows:
        return None
    lines = [
        "**One factor at a time**: times fewer steps than the arm without it, to the distance that that arm has after "
        "half of its run and after all of it.",
        "",
        "| factor, and what else is chosen | with it | without it | "
        + " | ".join(f"{share:.0%}" for share in FACTOR_SHARES)
        + " |",
        "|---|---|---|" + "---|" * len(FACTOR_SHARES),
    ]
    return "\n".join(lines + rows)


def screening(curves: Sequence[Curve], score: str) -> str | None:
    """Every density and weighting against uniform sampling of the same target; None where none was run."""
    rows = []
    for name in DENSITIES:
        found = [
            step_ratio(curves, f"{name}_{target}", f"uniform_{target}", share, score)
            for target, shares in SCREENING_SHARES.items()
            for share in shares
        ]
        if name != "uniform" and any(found):
            rows.append(f"| {name} | {' | '.join(str(ratio or '') for ratio in found)} |")
    if not rows:
        return None
    heads = [f"{target}, {share:.0%}" for target, shares in SCREENING_SHARES.items() for share in shares]
    lines = [
        "**Density and weighting alone**: times fewer steps than uniform sampling with the same target, DiT's "
        "embedders and AdamW at 1e-3, to the distance that it has after a share of its run (3,000 steps with epsilon, "
        "2,000 with velocity or a flow).",
        "",
        f"| preset, density or weighting | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    return "\n".join(lines + rows)


def ratios(curves: Sequence[Curve], score: str, baseline: str, shares: Sequence[float]) -> str | None:
    """How many times fewer steps each arm needs than a baseline; None where no arm can be held against it."""
    if baseline not in arms_of(curves):
        return None
    last = max(max(curve.points) for curve in curves if curve.arm == baseline)
    lines = [
        f"**Times fewer steps than `{baseline}`** ({BASELINES[baseline.removesuffix(COSINE)]}) to the distance that "
        f"it has after a share of {last:,} steps: geometric mean over paired seeds, with a bootstrap's 95 % interval "
        "or, of fewer than four seeds, each seed's.",
        "",
        "| arm | " + " | ".join(f"{share:.0%}" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
    ]
    rows = []
    for arm in arms_of(curves):
        found = [step_ratio(curves, arm, baseline, share, score) for share in shares]
        if arm != baseline and any(found):
            rows.append(f"| {arm} | {' | '.join(str(ratio or '') for ratio in found)} |")
    return "\n".join(lines + rows) if rows else None


def harm(curves: Sequence[Curve], score: str) -> str:
    """What else changes: the other distance, recall, precision, agreement and validation loss at the ends of runs."""
    others = [distance for distance in DISTANCES if distance != score]
    names = (*others, "recall", "precision", "class_agreement", "validation_loss")
    lines = [
        "**At the end of each arm's runs**, mean over the seeds, or over as many of them as stand in brackets.",
        "",
        "| arm | steps | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for arm in arms_of(curves):
        step = max(max(curve.points) for curve in curves if curve.arm == arm)
        lines.append(f"| {arm} | {step:,} | {' | '.join(_mean(curves, arm, step, name) for name in names)} |")
    return "\n".join(lines)


def errors(curves: Sequence[Curve]) -> str:
    """What the strategies do to each noise level: the validation loss at the ends of runs, level by level."""
    lasts = [curve.points[max(curve.points)] for curve in curves]
    levels = sorted({level for last in lasts for level in last.get("error_by_log_snr", {})}, key=float)
    lines = [
        "**Mean squared error of the velocity on held-out images by log SNR**, at the end of each arm's runs, mean "
        "over the seeds. The lower the log SNR, the more noise; predicting zero gives about 1.",
        "",
        "| arm | steps | " + " | ".join(levels) + " |",
        "|---|---|" + "---|" * len(levels),
    ]
    for arm in arms_of(curves):
        step = max(max(curve.points) for curve in curves if curve.arm == arm)
        ends = [curve.points[step] for curve in curves if curve.arm == arm and step in curve.points]
        known = [end["error_by_log_snr"] for end in ends if "error_by_log_snr" in end]
        cells = [f"{np.mean([error[level] for error in known]):.3f}" if known else "" for level in levels]
        lines.append(f"| {arm} | {step:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: Sequence[Curve], score: str, path: Path) -> None:
    """Distance over steps of the main arms: the mean over the seeds, and a band from the best to the worst."""
    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for arm in PLOTTED:
        mine = [curve for curve in curves if curve.arm == arm]
        if not mine:
            continue
        steps, _ = mine[0].values(score)
        values = np.array([curve.values(score)[1] for curve in mine])
        (line,) = axes.plot(
            steps, np.exp(np.log(values).mean(0)), marker="o", markersize=3, label=f"{arm} ({len(mine)})"
        )
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"{DISTANCES[score][0]} (lower is better)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "235" else "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "23568" else "")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
