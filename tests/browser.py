"""A headless Chromium for the tests of pages, driven by Selenium."""

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest

PROGRAMS = ("chromium", "chromedriver")
NEEDED = "the tests of pages need Debian's chromium and chromium-driver, and the extras test and demo"

FILL = """
const [element, value] = arguments;
Object.getOwnPropertyDescriptor(Object.getPrototypeOf(element), "value").set.call(element, value);
element.dispatchEvent(new Event("input", { bubbles: true }));
element.dispatchEvent(new Event("change", { bubbles: true }));
"""


def require_packages(*names: str) -> None:
    """Skips a test where a package is missing; on CI that is a failure."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            _go_without(f"{name} is not installed")


def _go_without(problem: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{problem}: {NEEDED}")
    pytest.skip(f"{problem}: {NEEDED}")


@contextmanager
def chromium(*, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A browser window; the test is skipped where there is none, and fails on CI.

    Args:
        width: Of the page, in pixels.
        height: Likewise.

    Yields:
        Selenium's driver.
    """
    for name in PROGRAMS:
        if shutil.which(name) is None:
            _go_without(f"{name} was not found")
    require_packages("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    # A container has no user namespaces for the sandbox and little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        resize(driver, width, height)
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int = 900) -> None:
    """Makes the page so many pixels wide, narrower than a window can be too."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_for(driver: Any, condition: str | Callable[[], Any], seconds: float = 60.0) -> Any:
    """Waits until a JavaScript expression, or a function, gives something true, and returns that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition() if callable(condition) else driver.execute_script(f"return {condition}")
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {condition}\n{complaints(driver)}")


def complaints(driver: Any) -> list[str]:
    """Errors that the page has reported since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def overflow(driver: Any) -> int:
    """Pixels by which the page is wider than the window."""
    return int(driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth"))


def fill(driver: Any, selector: str, value: object) -> None:
    """Puts a value into a field or a slider, as typing or dragging does."""
    driver.execute_script(FILL, driver.find_element("css selector", selector), str(value))


def hover(driver: Any, selector: str, share: float) -> str:
    """Points at a chart, so far from its left in shares of its width, and returns what it says there."""
    from selenium.webdriver.common.action_chains import ActionChains

    chart = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", chart)
    area = chart.find_element("css selector", "rect[fill=transparent]")
    offset = round((share - 0.5) * float(area.get_attribute("width")))
    ActionChains(driver).move_to_element_with_offset(area, offset, 0).perform()
    tip = chart.find_element("css selector", ".chart-tip")
    return str(wait_for(driver, lambda: tip.text, 10))
