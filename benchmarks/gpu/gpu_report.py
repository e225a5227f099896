"""Table and picture of what the GPU suite measured, from its JSON alone."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from speed_diffusers.files import write_text, written_whole

COLOURS = {"bf16+compile": "tab:blue", "bf16": "tab:cyan", "tf32": "tab:green"}
"""Of our precisions; the loops that they are held against are grey."""


def save_report(results: dict[str, Any], file: Path) -> None:
    """Writes a table and, where there are figures to show, a picture beside a file of results.

    Args:
        results: As the suite writes them.
        file: Where they lie; the report has its name with other endings.
    """
    write_text(file.with_suffix(".md"), table(results) + "\n")
    if measured(results):
        with written_whole(file.with_suffix(".png")) as temporary:
            save_picture(results, temporary)


def measured(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Who trained and the figures, of each unit that has some: the trainer's first, by model."""
    found = []
    for name, unit in results["units"].items():
        kind, *words = name.split()
        if unit["status"] == "done" and kind in ("step", "reference"):
            found.append((words[0] if kind == "reference" else "this package", unit["result"]))
    return sorted(found, key=lambda each: -each[1]["model_tflops_per_second"])


def table(results: dict[str, Any]) -> str:
    """Speed, memory, the goal, the profile, the tests, and what could not be measured, in Markdown."""
    device, environment = results["device"], results["environment"]
    about = [device["name"]]
    if "memory_gib" in device:
        about += [f"{device['memory_gib']:.0f} GiB", f"CUDA {device['cuda']}"]
    about += [
        f"torch {environment['torch']}",
        f"diffusers {environment['diffusers']}",
        f"commit {environment['commit']}",
    ]
    lines = [", ".join(about)]
    if device["type"] == "cpu":
        lines += ["", "At tiny size on a CPU: this shows that the suite runs, and says nothing of any GPU."]
    rows = measured(results)
    if rows:
        lines += [
            "",
            "| model | by | precision | batch | latents | ms/step | images/s | TFLOP/s | MFU | peak GiB | host ms |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for who, row in sorted(rows, key=lambda each: (each[1]["model"], each[0] != "this package")):
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%} ({row['mfu_of']})"
        memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}"
        host = f"{row['host_milliseconds']:.1f}" if "host_milliseconds" in row else ""
        lines.append(
            f"| {row['model']} | {who} | {row['precision']} | {row['batch_size']} | {latents(row)} | "
            f"{row['milliseconds']:.1f} | {row['images_per_second']:,.1f} | "
            f"{row['model_tflops_per_second']:,.2f} | {mfu} | {memory} | {host} |"
        )
    lines += [*ratios(rows), *profiles(results), *tests(results), *failures(results)]
    return "\n".join(lines)


def ratios(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Our fastest images per second over those of each reference loop, with the same model, batch size and latents."""
    lines = []
    for who, theirs in rows:
        ours = [
            row
            for name, row in rows
            if name == "this package" and all(row[key] == theirs[key] for key in ("model", "batch_size", "in_loop"))
        ]
        if who != "this package" and ours:
            best = max(ours, key=lambda row: row["images_per_second"])
            ratio = best["images_per_second"] / theirs["images_per_second"]
            lines.append(
                f"{theirs['model']}, {theirs['batch_size']} images a step, {latents(theirs)} latents: "
                f"this package in {best['precision']} trains on {ratio:.2f} times as many images a second as "
                f"{who}'s own loop in {theirs['precision']}."
            )
    return ["", *lines] if lines else []


def profiles(results: dict[str, Any]) -> list[str]:
    """The parts of a step and the kinds of kernels, of each unit that was profiled."""
    lines = []
    for name, unit in results["units"].items():
        profile = unit.get("result", {}).get("profile")
        if profile is None:
            continue
        lines += ["", f"Profile, {name.removeprefix('step ')}:"]
        if "error" in profile:
            lines += ["", profile["error"]]
            continue
        lines += ["", "| part | host ms | device ms |", "|---|---|---|"]
        for part, host in profile["host_milliseconds"].items():
            lines.append(f"| {part} | {host:.2f} | {profile['device_milliseconds'].get(part, 0.0):.2f} |")
        if profile["kernel_milliseconds"]:
            lines += ["", "| kernels | ms |", "|---|---|"]
            lines += [f"| {kind} | {value:.2f} |" for kind, value in profile["kernel_milliseconds"].items()]
    return lines


def tests(results: dict[str, Any]) -> list[str]:
    """What became of the tests marked gpu."""
    unit = results["units"].get("tests", {})
    if "result" not in unit:
        return []
    lines = ["", "Tests marked `gpu`:", "", "| test | outcome |", "|---|---|"]
    return lines + [f"| {name} | {test['outcome']} |" for name, test in unit["result"]["tests"].items()]


def failures(results: dict[str, Any]) -> list[str]:
    """Units that gave no figures, with the reason."""
    failed = [(name, unit) for name, unit in results["units"].items() if unit["status"] != "done"]
    lines = [f"- {name}: {unit['status']} ({' '.join(unit['error'].split())[:160]})" for name, unit in failed]
    return ["", "Not measured:", "", *lines] if lines else []


def save_picture(results: dict[str, Any], path: Path) -> None:
    """Images per second of everything that was measured, by model, with MFU and peak memory at the bars."""
    rows = sorted(measured(results), key=lambda each: (each[1]["model"], -each[1]["images_per_second"]))
    models = list(dict.fromkeys(row["model"] for _, row in rows))
    counts = [sum(row["model"] == model for _, row in rows) for model in models]
    height = 0.9 + 0.32 * len(rows) + 0.55 * len(models)
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, model in zip(panels, models, strict=True):
        own = [(who, row) for who, row in rows if row["model"] == model]
        colours = [COLOURS[row["precision"]] if who == "this package" else "0.6" for who, row in own]
        names = [f"{who}, {row['precision']}, {row['batch_size']}{', VAE' * row['in_loop']}" for who, row in own]
        bars = axes.barh(range(len(own)), [row["images_per_second"] for _, row in own], color=colours)
        axes.bar_label(bars, [label(row) for _, row in own], padding=3, fontsize=8)
        axes.set_yticks(range(len(own)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set_title(model, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("images per second, latents of 4x32x32: cached, or encoded in the step (VAE)")
    figure.suptitle(f"Training steps on {results['device']['name']}", fontsize=10)
    figure.savefig(path, format="png")


def latents(row: dict[str, Any]) -> str:
    """Where the latents of a step come from: "cached" or "encoded"."""
    return "encoded" if row["in_loop"] else "cached"


def label(row: dict[str, Any]) -> str:
    """What stands at a bar."""
    words = [f"{row['images_per_second']:,.0f}"]
    if row["mfu"] is not None:
        words.append(f"MFU {row['mfu']:.1%}")
    if row["peak_memory_gib"] is not None:
        words.append(f"{row['peak_memory_gib']:.0f} GiB")
    return ", ".join(words)
