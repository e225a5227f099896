"""The outcome of the tests that take minutes, as a file to commit."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "accelerate", "diffusers", "datasets", "safetensors", "tensorboard")


class NightlyResult:
    """A plugin that writes JSON at the end: versions, and of each test outcome, seconds, numbers, date and commit.

    What the file holds of other tests stays, so that they may be run one after the other.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith("tests/nightly/"):
            return
        test = self.tests.setdefault(report.nodeid, {"name": report.nodeid, "outcome": "interrupted", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 1)
        if report.when == "call" or report.outcome != "passed":
            test["outcome"] = report.outcome
        test["numbers"] = dict(report.user_properties)

    def pytest_sessionfinish(self) -> None:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
        )
        at = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": described.stdout.strip() or "unknown"}
        known = json.loads(self.path.read_text())["tests"] if self.path.is_file() else []
        tests = {test["name"]: test for test in known} | {name: test | at for name, test in self.tests.items()}
        result = {
            "machine": f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "tests": sorted(tests.values(), key=lambda test: str(test["name"])),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n")
