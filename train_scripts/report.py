"""One web page about one or several runs: samples over training, curves, errors, densities, scores, options.

    python train_scripts/report.py runs=runs/quickstart
    python train_scripts/report.py runs=runs/speed,runs/uniform output=comparison.html

The page is one file that needs no network: open it in a browser, attach it, publish it. Runs may be unfinished; what
they have not written yet is left out. Scores are those that evaluate.py or the runs themselves have left in `scores/`.
"""

from dataclasses import dataclass
from pathlib import Path

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_output_file, write_text
from speed_diffusers.reports.web_page import web_page
from speed_diffusers.training.report_data import report_data

SCRIPT_DIR = Path(__file__).resolve().parent


@dataclass
class ReportConfig(Options):
    """Options of `report.py`."""

    runs: list[str] = option([], "Folders of runs, one or more.", path=True)
    output: str = option("report.html", "HTML file to write.", path=True)
    title: str | None = option(None, "Title of the page; None: made of the runs' names.")
    max_grids: int = option(24, "Grids of samples per run at most, evenly spread over it.", interval="[1, 1000]")
    max_image_width: int = option(1000, "Wider grids are made smaller, in pixels.", interval="[64, 10^4]")


def main(argv: list[str]) -> None:
    """Writes the page.

    Raises:
        InputError: Wrong options, or a folder is no run; nothing has been written.
    """
    config = load_config(ReportConfig, argv, SCRIPT_DIR)
    if not config.runs:
        raise InputError("runs is empty: give the folders of runs, runs=FOLDER,FOLDER.")
    folders = [Path(run) for run in config.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"runs={','.join(config.runs)}: one is given twice.")
    output = check_output_file("output", config.output, ".html")
    data = report_data(folders, max_grids=config.max_grids, max_image_width=config.max_image_width)
    names = [run["name"] for run in data["runs"]]
    page = web_page(config.title or f"Training report: {', '.join(names)}", data)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    grids = sum(len(run["grids"]) for run in data["runs"])
    print(f"Saved {output}: {len(names)} run(s), {grids} grids, {len(page.encode()) / 1e6:.1f} MB.")


if __name__ == "__main__":
    run_script(main, __doc__, ReportConfig)
