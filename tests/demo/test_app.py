"""The app in a real browser, started as a Space starts it: strategies live, images from a model and a checkpoint."""

import io
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from browser import chromium, complaints, fill, hover, overflow, require_packages, resize, wait_for
from free_port import free_port
from speed_diffusers.generation.generate import GenerationSettings, class_samples
from speed_diffusers.reports.plots import save_class_grid
from speed_diffusers.reports.strategy_plot import area_shares, density_over_log_snr
from speed_diffusers.reports.strategy_report import strategy_tables
from speed_diffusers.schedulers import speed_scheduler
from speed_diffusers.training.snapshots import load_latest, put_weights

pytestmark = pytest.mark.demo
DEMO = Path(__file__).resolve().parents[2] / "demo"
CODE = "document.querySelector('.cm-content').innerText"
TABLE = "document.querySelector('#charts table')?.innerText"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the app listens: a copy of its folder, without the rest of the checkout."""
    require_packages("gradio", "selenium")
    folder = tmp_path_factory.mktemp("space") / "demo"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    environment = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder.parent / "files")}
    with (folder.parent / "log").open("w") as log:
        app = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=os.environ | environment, stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(None, lambda: _answers(url) or app.poll() is not None, 200)
        assert app.poll() is None, (folder.parent / "log").read_text()
        yield url
    finally:
        app.terminate()
        app.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def driver(address: str) -> Iterator[Any]:
    """A browser with the app in it."""
    with chromium(width=1366) as driver:
        driver.get(address)
        wait_for(driver, TABLE)
        yield driver


def choose(driver: Any, selector: str, option: str) -> None:
    """Takes an option of a dropdown, or writes one that it does not list."""
    from selenium.webdriver.common.keys import Keys

    field = driver.find_element("css selector", f"{selector} input")
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", field)
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(option, Keys.ENTER)
    field.send_keys(Keys.ESCAPE)


def click(driver: Any, selector: str, text: str) -> None:
    """Clicks on what bears a text, whatever icon stands behind it."""
    (found,) = [each for each in driver.find_elements("css selector", selector) if each.text.startswith(text)]
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", found)
    found.click()


def toast(word: str) -> str:
    """Where the message is found in which a word stands; messages stay for some seconds."""
    texts = "[...document.querySelectorAll('.toast-body')].map((each) => each.innerText)"
    return f"{texts}.find((text) => text.includes('{word}'))"


def rows(driver: Any) -> dict[str, list[float]]:
    """The table under the charts: name of each strategy to its shares of the draws, in percent."""
    lines = driver.execute_script(f"return {TABLE}").splitlines()[1:]
    return {line.split("\t")[0]: [float(share) for share in re.findall(r"([\d.]+) %", line)] for line in lines}


def in_percent(tables: Any, areas: Any) -> Any:
    return pytest.approx([100 * share for share in area_shares(tables, areas).values()], abs=0.06)


def test_strategies_are_shown_live(driver: Any) -> None:
    scheduler = speed_scheduler(DDPMScheduler())
    areas = scheduler.speed_areas
    tables = strategy_tables(scheduler, ["paper", "uniform"])
    assert rows(driver) == {name: in_percent(each, areas) for name, each in tables.items()}
    assert "convergence 700–999" in driver.execute_script(f"return {TABLE}")
    for name in ("Density", "Loss weight", "Density × weight"):
        assert len(driver.find_elements("css selector", f"[data-chart='{name}'] path.series")) == 2
        bands = driver.execute_script(f"return document.querySelector(\"[data-chart='{name}']\").textContent")
        assert all(area in bands for area in vars(areas))

    # Over log SNR the numbers under the pointer are p(log SNR) at the nearest timestep.
    said = hover(driver, "[data-chart='Density']", 0.5)
    log_snr = scheduler.speed_strategy.process.log_snr
    at = float(re.search(r"log SNR (−?[\d.]+)", said)[1].replace("−", "-"))
    step = int((log_snr - at).abs().argmin())
    shown = [float(word) for word in re.findall(r"\n([\d.]+)", said)]
    assert shown == pytest.approx([float(density_over_log_snr(each)[step]) for each in tables.values()], rel=5e-3)

    # Over timesteps a density is relative to uniform draws.
    click(driver, "#coordinate label", "Timesteps")
    wait_for(driver, "document.querySelector(\"[data-chart='Density'] svg\").textContent.includes('timestep')")
    said = hover(driver, "[data-chart='Density']", 0.3)
    assert [float(word) for word in re.findall(r"\n([\d.]+)", said)] == pytest.approx([1.316, 1.0], abs=2e-3)

    choose(driver, "#strategies", "logit_normal:mean=0+none")
    wait_for(driver, f"{TABLE}.includes('logit_normal')")
    choose(driver, "#schedule", "rectified flow (SD3, Flux)")
    wait_for(driver, f"!{TABLE}.includes('convergence 700–999')")
    flow = speed_scheduler(FlowMatchEulerDiscreteScheduler())
    tables = strategy_tables(flow, ["paper", "uniform", "logit_normal:mean=0+none"])
    assert rows(driver) == {name: in_percent(each, flow.speed_areas) for name, each in tables.items()}
    assert "SpeeDFlowMatchEulerDiscreteScheduler()" in driver.find_element("css selector", ".cm-content").text

    # One's own: choosing a part of it shows it, and the code beside it makes that scheduler.
    click(driver, "button", "One of your own")
    choose(driver, "#density", "gaussian")
    wait_for(driver, f"{TABLE}.includes('your own: gaussian')")
    fill(driver, "#density-values textarea, #density-values input", "mean=-1,std=1")
    wait_for(driver, f"{TABLE}.includes('your own: gaussian:mean=-1,std=1')")
    code = wait_for(driver, f"{CODE}.includes('mean=-1') && {CODE}")
    made: dict[str, Any] = {}
    exec(code.replace("\N{NO-BREAK SPACE}", " ").partition("timesteps =")[0], made)
    (shares,) = [shares for name, shares in rows(driver).items() if name.startswith("your own")]
    assert shares == in_percent(made["scheduler"].speed_strategy.tables(0.0), flow.speed_areas)

    # What changes in training is told how far it is, and what learns is told the errors.
    choose(driver, "#density", "clts")
    wait_for(driver, f"{CODE}.includes('progress=step')")
    choose(driver, "#density", "infonoise")
    code = wait_for(driver, f"{CODE}.includes('scheduler.update_speed(') && {CODE}")
    assert "progress" not in code

    # What does not exist is one line, and what was shown stays.
    choose(driver, "#strategies", "papr")
    assert "Did you mean 'paper'?" in wait_for(driver, toast("papr"))
    assert complaints(driver) == []


def picture(driver: Any, address: str) -> Any:
    """The picture that the app shows, as uint8 (height, width, 3)."""
    source = wait_for(driver, "document.querySelector('#picture img')?.src", 120)
    with urllib.request.urlopen(source, timeout=30) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def expected(pipeline: Any, rows: dict[int, str], name: str, path: Path) -> Any:
    """What the script for samples would have made."""
    settings = GenerationSettings(guidance_scale=1.5, num_inference_steps=3)
    images = class_samples(pipeline, list(rows), 2, settings)
    save_class_grid(images, list(rows.values()), f"{name}, guidance 1.5", path)
    return np.asarray(Image.open(path).convert("RGB"))


def generate(driver: Any) -> None:
    """Two images of three steps per class."""
    fill(driver, "#images input[type=number]", 2)
    fill(driver, "#steps input[type=number]", 3)
    driver.find_element("css selector", "#generate").click()


def test_images_of_a_model_and_of_a_checkpoint(
    driver: Any, address: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    click(driver, "button[role=tab]", "Images")
    assert "2.9 M parameters" in wait_for(driver, "document.querySelector('#about')?.innerText")
    choose(driver, "#classes", "Sneaker")
    generate(driver)
    shown = picture(driver, address)
    wanted = expected(load_latest("embedded"), {7: "Sneaker"}, "embedded", tmp_path / "embedded.png")
    assert shown.shape == wanted.shape and np.abs(shown.astype(int) - wanted).max() <= 1
    first = driver.execute_script("return document.querySelector('#picture img').src")

    run = train(tmp_path / "run")
    fill(driver, "#model textarea, #model input", run)
    click(driver, "#model button", "Open")
    wait_for(driver, "document.querySelector('#checkpoint input')?.offsetParent")
    choose(driver, "#checkpoint", "checkpoint-5")
    generate(driver)
    wait_for(driver, lambda: driver.find_element("css selector", "#picture img").get_attribute("src") != first, 120)
    pipeline = load_latest(str(run))
    put_weights(pipeline, run / "checkpoint-5", "ema")
    wanted = expected(pipeline, {0: "cat", 1: "dog"}, str(run), tmp_path / "run.png")
    shown = picture(driver, address)
    assert shown.shape == wanted.shape and np.abs(shown.astype(int) - wanted).max() <= 1

    fill(driver, "#model textarea, #model input", tmp_path / "nothing")
    click(driver, "#model button", "Open")
    assert "Could not load the pipeline" in wait_for(driver, toast("nothing"))
    assert complaints(driver) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_telephone_in_either_theme(driver: Any, address: str, theme: str) -> None:
    resize(driver, 390, 844)
    driver.get(f"{address}?__theme={theme}")
    wait_for(driver, TABLE)
    assert overflow(driver) <= 0
    bright = driver.execute_script("return getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", bright)[:3])) > 384) == (theme == "light")
    assert complaints(driver) == []


def test_the_folder_is_a_space_of_the_present_gradio() -> None:
    require_packages("gradio")
    _, front, text = (DEMO / "README.md").read_text("utf-8").split("---\n", 2)
    space = yaml.safe_load(front)
    assert (DEMO / space["app_file"]).is_file() and space["sdk"] == "gradio"
    assert space["sdk_version"].split(".")[0] == version("gradio").split(".")[0]
    assert len(space["short_description"]) <= 60 and "--repo-type space" in text
    needed = (DEMO / "requirements.txt").read_text("utf-8").split()
    assert needed == ["speed-diffusers[train]"]
