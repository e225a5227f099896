"""Plots the unweighted errors of several runs by timestep: what can be compared where loss weights differ.

    python train_scripts/compare_errors.py runs=runs/speed,runs/uniform output=errors.png

The training loss cannot be compared between runs whose timesteps are drawn or weighted differently; the mean squared
error at a timestep can, as long as process and target are the same. Shown is the last fifth of each run.
"""

from dataclasses import dataclass
from pathlib import Path

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.error_bins import ErrorHistory
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_output_file
from speed_diffusers.reports.plots import save_error_comparison
from speed_diffusers.training.config import TARGET_OPTIONS
from speed_diffusers.training.parts import make_scheduler
from speed_diffusers.training.run_folder import METRICS_FILE, load_run_config
from speed_diffusers.training.tracking import read_metrics

SCRIPT_DIR = Path(__file__).resolve().parent


@dataclass
class CompareConfig(Options):
    """Options of `compare_errors.py`."""

    runs: list[str] = option([], "Folders of runs.", path=True)
    output: str = option("errors.png", "PNG file to write.", path=True)


def main(argv: list[str]) -> None:
    """Plots the picture and prints the numbers.

    Raises:
        InputError: A folder is no run, or the runs do not compare; nothing has been written.
    """
    options = load_config(CompareConfig, argv, SCRIPT_DIR)
    if not options.runs:
        raise InputError("runs is empty: give the folders of runs, runs=FOLDER,FOLDER.")
    if len({Path(run).resolve() for run in options.runs}) < len(options.runs):
        raise InputError(f"runs={','.join(options.runs)}: one is given twice.")
    output = check_output_file("output", options.output, ".png")
    configs = {run: load_run_config(Path(run)) for run in options.runs}
    first, *others = options.runs
    for run in others:
        for name in TARGET_OPTIONS:
            one, other = getattr(configs[first], name), getattr(configs[run], name)
            if one != other:
                raise InputError(f"{first} has {name}={one}, {run} {other}: their errors do not compare.")
    steps = configs[first].num_train_timesteps
    records = {run: read_metrics(Path(run) / METRICS_FILE) for run in options.runs}
    histories = {run: ErrorHistory.from_records(lines, steps) for run, lines in records.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"Error by timestep, last fifth of each run ({configs[first].prediction_type})"
    save_error_comparison(histories, make_scheduler(configs[first]).speed_areas, title, output)
    print(_table(histories))
    print(f"Saved {output}.")


def _table(histories: dict[str, ErrorHistory]) -> str:
    last = {run: history.merged(5) for run, history in histories.items()}
    edges = next(iter(last.values())).edges
    lines = ["timesteps  " + "  ".join(last)]
    for index, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        values = (f"{history.errors[-1, index]:{max(len(run), 9)}.5f}" for run, history in last.items())
        lines.append(f"{first:4d}-{end - 1:<4d}  " + "  ".join(values))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, __doc__, CompareConfig)
