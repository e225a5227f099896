"""The page of a report in a real browser: what it shows, what moves when one chooses, and that nothing is loaded."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import chromium, complaints, fill, hover, overflow, resize, wait_for
from reported_runs import reported_runs
from speed_diffusers.train_scripts import report

pytestmark = pytest.mark.demo


@pytest.fixture
def page(train: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The page of two runs in a browser, and the data that lie in it."""
    runs = reported_runs(train, tmp_path)
    output = tmp_path / "report.html"
    report.main([f"runs={runs[0]},{runs[1]}", f"output={output}"])
    with chromium() as driver:
        driver.get(output.as_uri())
        wait_for(driver, "document.documentElement.dataset.ready")
        yield driver, json.loads(driver.execute_script("return document.getElementById('data').textContent"))


def test_a_report_in_a_browser(page: tuple[Any, dict[str, Any]]) -> None:
    driver, data = page

    def run(script: str, *arguments: Any) -> Any:
        return driver.execute_script(f"return {script}", *arguments)

    def click(selector: str) -> None:
        run("document.querySelector(arguments[0]).click()", selector)

    sections = ["overview", "samples", "curves", "errors", "strategies", "scores", "configuration"]
    assert run("[...document.querySelectorAll('section')].map((each) => each.id)") == sections
    overview = run("document.querySelector('#overview tbody').innerText")
    assert "speed" in overview and "uniform" in overview and "7.25" in overview
    # Every chart has a line of each run; maps have their cells.
    for name in ("Fréchet distance", "Validation loss", "Training loss", "Density", "Loss weight"):
        drawn = run("[...document.querySelectorAll(`[data-chart='${arguments[0]}'] path.series`)].length", name)
        assert drawn == 2, name
    assert run("document.querySelectorAll('#errors canvas').length") == 2
    colours = "const map = document.querySelector('#errors canvas'); const pixels = map.getContext('2d')"
    colours += ".getImageData(0, 0, map.width, map.height).data; return new Set(new Uint32Array(pixels.buffer)).size"
    assert driver.execute_script(colours) > 10

    # The slider goes from grid to grid of the training.
    last = run("document.querySelector('#samples img').src")
    assert last == data["runs"][0]["grids"][-1]["url"] and run("document.querySelector('#samples img').naturalWidth")
    fill(driver, ".player input", 0)
    assert run("document.querySelector('#samples img').src") == data["runs"][0]["grids"][0]["url"]
    assert "5" in run("document.querySelector('.player output').textContent")

    # Progress by steps, images or time, for curves and slider alike.
    label = "document.querySelector(\"[data-chart='Validation loss'] svg\").textContent"
    assert "optimizer steps" in run(label)
    click("#axis [data-value=images]")
    assert "images seen" in run(label) and "48" in run("document.querySelector('.player output').textContent")
    click("#axis [data-value=seconds]")
    assert "training time in seconds" in run(label)
    click("#axis [data-value=step]")

    # A pointer over a chart is told the numbers of the file.
    said = hover(driver, "[data-chart='Validation loss']", 0.99)
    losses = [each["validation"]["loss"][-1] for each in data["runs"]]
    assert "12" in said and [float(word) for word in re.findall(r"\d\.\d+", said)] == pytest.approx(losses, rel=2e-3)
    click("#strategies [data-value=timesteps]")
    said = hover(driver, "[data-chart='Density']", 0.3)
    assert [float(word) for word in re.findall(r"\n(\d[.\d]*)", said)] == pytest.approx([1.316, 1.0], abs=2e-3)

    # A run that is hidden is hidden everywhere.
    click("#runs button")
    assert run("document.querySelectorAll(\"[data-chart='Density'] path.series\").length") == 1
    assert run("document.querySelector('#samples figure').hidden")
    assert run("[...document.querySelectorAll('#scores tbody tr')].filter((each) => !each.hidden).length") > 0
    click("#runs button")

    names = "[...document.querySelectorAll('#differences tbody th')].map((each) => each.textContent)"
    assert run(names) == ["speed_sampling", "speed_weighting", "learning_rate", "output_dir"]
    fill(driver, "#configuration input", "learning_rate")
    shown = run("[...document.querySelectorAll('#options tbody tr')].filter((each) => !each.hidden).length")
    assert 0 < shown < 10

    before = run("getComputedStyle(document.body).backgroundColor")
    click("#theme")
    assert run("getComputedStyle(document.body).backgroundColor") != before
    for width in (1280, 390):
        resize(driver, width)
        assert overflow(driver) <= 0, width
    assert complaints(driver) == []
