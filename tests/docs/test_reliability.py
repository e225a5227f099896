"""docs/reliability.md names tests: each is there, and every nightly test is named."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text("utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


def names_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE))


def test_every_named_test_exists() -> None:
    assert len(NAMED) > 50
    assert [f"{file}::{name}" for file, name in NAMED if name not in names_in(ROOT / file)] == []
    assert TEXT.count("`tests/") == len(NAMED) + TEXT.count("`tests/nightly`"), "a name that is not a test's"


def test_every_row_of_a_table_names_a_test() -> None:
    tables = TEXT.partition("## The nightly tier")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| what happens")]
    assert len(rows) > 25 and [row for row in rows if "::test_" not in row] == []


def test_every_test_of_the_nightly_tier_is_named() -> None:
    files = sorted((ROOT / "tests" / "nightly").glob("test_*.py"))
    written = {(str(file.relative_to(ROOT)), name) for file in files for name in names_in(file)}
    assert written and written <= set(NAMED)
    assert all("pytest.mark.nightly" in file.read_text("utf-8") for file in files)


def test_the_committed_outcome_is_of_all_these_tests_and_good() -> None:
    result = json.loads((ROOT / "benchmarks" / "nightly" / "result.json").read_text("utf-8"))
    outcomes = {test["name"]: test["outcome"] for test in result["tests"]}
    nightly = {name for name in NAMED if name[0].startswith("tests/nightly/")}
    assert {tuple(name.partition("[")[0].split("::")) for name in outcomes} == nightly
    assert set(outcomes.values()) == {"passed"}


def test_the_command_of_the_page_is_pytests(pytestconfig: pytest.Config) -> None:
    assert "pytest -m nightly --nightly-result outcome.json" in TEXT
    assert pytestconfig.getoption("--nightly-result") is None
    assert any(line.startswith("nightly:") for line in pytestconfig.getini("markers"))
