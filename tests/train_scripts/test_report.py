"""The page of a report: what it says against the files of the runs, and that it is one file."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reported_runs import reported_runs
from speed_diffusers.config.load import save_config
from speed_diffusers.error_bins import ErrorHistory
from speed_diffusers.errors import InputError
from speed_diffusers.reports.strategy_plot import density_over_log_snr, relative_density
from speed_diffusers.reports.web_page import image_url, web_page
from speed_diffusers.train_scripts import report
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import make_scheduler
from speed_diffusers.training.report_data import (
    MAX_RECORDS,
    ReportedRun,
    in_words,
    logged_curves,
    report_data,
    run_names,
)
from speed_diffusers.training.run_folder import load_run_config
from speed_diffusers.training.tracking import read_metrics

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def data_of(page: Path) -> dict[str, Any]:
    """What lies in a page for its scripts."""
    (text,) = DATA.findall(page.read_text("utf-8"))
    return json.loads(text)


def test_a_page_says_what_the_folders_hold(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = reported_runs(train, tmp_path)
    output = tmp_path / "pages" / "report.html"
    report.main([f"runs={folders[0]},{folders[1]}", f"output={output}"])
    assert f"Saved {output}: 2 run(s), 6 grids, " in capsys.readouterr().out
    data = data_of(output)
    assert data["title"] == "Training report: speed, uniform"
    for index, (folder, run) in enumerate(zip(folders, data["runs"], strict=True)):
        check_curves(folder, run)
        check_grids(folder, run)
        check_strategy(folder, data["strategies"][0]["strategies"][index])
    check_scores(data["scores"])
    options = {option["name"]: option for option in data["options"]}
    assert {name for name, option in options.items() if option["differs"]} == {
        "speed_sampling",
        "speed_weighting",
        "learning_rate",
        "output_dir",
    }
    assert options["learning_rate"]["values"] == ["0.001", "0.003"]
    assert options["speed_sampling"]["default"] == "asymmetric" and len(options) == len(vars(TrainConfig()))
    check_one_file(output)


def check_curves(folder: Path, run: dict[str, Any]) -> None:
    records = read_metrics(folder / "metrics.jsonl")
    assert run["step"] == run["max_steps"] == 12 and run["global_batch"] == 4 and run["images"] == 48
    assert run["log"]["step"] == [line["step"] for line in records]
    assert run["log"]["seconds"] == pytest.approx([line["seconds"] for line in records], rel=1e-4)
    for name, values in run["log"]["values"].items():
        assert values == pytest.approx([line[name] for line in records], rel=1e-4), name
    validated = read_metrics(folder / "validation" / "loss.jsonl")
    assert run["validation"]["loss"] == pytest.approx([line["validation_loss"] for line in validated], rel=1e-4)
    assert run["validation"]["step"] == [5, 10, 12] and run["validation"]["images"] == [20, 40, 48]
    assert dict(
        zip(map("{:g}".format, run["validation"]["log_snr"]), run["validation"]["by_log_snr"], strict=True)
    ) == pytest.approx(validated[-1]["error_by_log_snr"], rel=1e-4)
    history = ErrorHistory.from_records(records, 1000)
    assert np.array(run["errors"]["map"], float) == pytest.approx(history.errors, rel=1e-4, nan_ok=True)
    assert run["errors"]["steps"] == [0.0, *history.steps]
    # Every image of the training was drawn somewhere.
    widths = np.diff(run["errors"]["edges"])
    assert (np.array(run["errors"]["drawn"]) * widths).sum() / 1000 == pytest.approx(1, abs=1e-3)


def check_grids(folder: Path, run: dict[str, Any]) -> None:
    assert [grid["step"] for grid in run["grids"]] == [5, 10, 12]
    pictures = [folder / "validation" / "step-0000005.png", folder / "samples.png"]
    for grid, path in zip((run["grids"][0], run["grids"][2]), pictures, strict=True):
        kind, _, text = grid["url"].partition(",")
        assert kind == "data:image/webp;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), float)
        saved = np.asarray(Image.open(path).convert("RGB"), float)
        assert shown.shape == saved.shape and np.abs(shown - saved).mean() < 8


def check_strategy(folder: Path, shown: dict[str, Any]) -> None:
    scheduler = make_scheduler(load_run_config(folder))
    tables = scheduler.speed_strategy.tables(0.0)
    assert shown["strategy"] == {"speed": "paper", "uniform": "uniform"}[folder.name]
    at = np.unique(np.linspace(0, 999, 400).round().astype(int))
    points = np.unique(np.concatenate((at, [0, 218, 219, 699, 700, 999])))
    for name, values in (
        ("density", relative_density(tables)),
        ("density_over_log_snr", density_over_log_snr(tables)),
        ("weight", tables.weights),
    ):
        assert shown[name] == pytest.approx(values[points].tolist(), rel=1e-4), name


def check_scores(scores: dict[str, Any]) -> None:
    (protocol,) = scores["protocols"]
    assert "10 images of 32x32" in protocol["words"] and protocol["parts"]["num_images"] == "10"
    assert list(scores["names"])[0] == "frechet_distance"
    found = {(row["run"], row["step"]): row["values"]["frechet_distance"] for row in scores["rows"]}
    assert found == {(0, 5): 9.5, (0, 10): 8.25, (1, 5): 8.5, (1, 10): 7.25}


def check_one_file(page: Path) -> None:
    """Nothing outside of it is named, and the browser is told to load nothing."""
    text = page.read_text("utf-8")
    assert "default-src 'none'" in text
    outside = DATA.sub("", text).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|<link|<script src|@import|url\((?!#)", outside)
    # The machine's folders are nobody's business.
    assert str(page.parent.parent) not in text


def test_an_unfinished_run_has_a_page_and_what_differs_in_kind_is_told_apart(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    run = train(tmp_path / "run", "max_train_steps=3", "checkpointing_steps=None")
    (tmp_path / "begun").mkdir()
    save_config(TrainConfig(prediction_type="flow_prediction"), tmp_path / "begun" / "config.yaml")
    damaged = tmp_path / "run" / "validation" / "step-0000002.png"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no picture")
    data = report_data([run, tmp_path / "begun"], max_grids=5, max_image_width=100)
    done, begun = data["runs"]
    assert begun["step"] == 0 and begun["errors"] is None and begun["log"]["step"] == [] and begun["grids"] == []
    assert [grid["step"] for grid in done["grids"]] == [3]
    # An epsilon network's errors and a flow's are no errors of the same thing, nor are their timesteps.
    assert (done["target"], begun["target"]) == (0, 1) and len(data["targets"]) == len(data["strategies"]) == 2
    assert [each["name"] for each in data["strategies"][1]["areas"]] == ["acceleration", "deceleration", "convergence"]
    kind, _, text = done["grids"][0]["url"].partition(",")
    assert Image.open(io.BytesIO(base64.b64decode(text))).width == 100
    web_page("both", data)


def test_names_cannot_end_the_script_that_they_lie_in() -> None:
    name = "</script><script>alert(1)</script><!--scripts-->"
    page = web_page(name, {"runs": [{"name": name}]})
    (text,) = DATA.findall(page)
    assert json.loads(text)["title"] == json.loads(text)["runs"][0]["name"] == name
    assert page.count("<script") == 2


def test_long_runs_are_thinned_and_what_is_no_number_is_left_out() -> None:
    records = [{"step": step, "loss": float(step), "seconds": 2.0 * step} for step in range(1, 10 * MAX_RECORDS + 1)]
    records[0]["loss"], records[1]["loss"] = float("nan"), "much"
    run = ReportedRun("long", TrainConfig(), records, [], {}, [])
    log = logged_curves(run)
    assert len(log["step"]) == MAX_RECORDS and log["step"][-1] == 10 * MAX_RECORDS
    assert log["values"]["loss"][0] == pytest.approx(np.mean(range(3, 11)))
    assert log["seconds"][-1] == pytest.approx(20 * MAX_RECORDS)


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a" / "seed0", tmp_path / "b" / "seed0"]) == ["a/seed0", "b/seed0"]
    assert run_names([tmp_path / "a" / "seed0", tmp_path / "a" / "seed1"]) == ["seed0", "seed1"]
    assert run_names([tmp_path / "a"]) == ["a"]


def test_values_are_written_as_on_a_command_line(tmp_path: Path) -> None:
    values = [True, None, [0.05, 0.1], [], 1e-4, str(tmp_path / "x"), {"eta": 0.0}]
    assert [*map(in_words, values)] == ["true", "None", "0.05, 0.1", "none", "0.0001", "x", "eta=0"]


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n")
    assert image_url(tmp_path / "x.png", 100) is None and "x.png" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "runs is empty"),
        (["runs=nowhere"], "nowhere is no run"),
        (["runs=a,./a"], "one is given twice"),
        (["runs=a", "output=report.htm"], "must be a file that ends in .html"),
        (["runs=a", "max_grids=0"], r"max_grids=0: must lie in \[1, 1000\]"),
        (["run=a"], "Did you mean 'runs'"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        report.main(options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
