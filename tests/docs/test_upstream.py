"""The faults of diffusers on docs/upstream.md are still there: each block runs and asserts its claim."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "upstream.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))


def test_every_section_has_a_block() -> None:
    assert len(SECTIONS) == PAGE.count("\n## ") == PAGE.count("```python") == 5
    assert all("assert " in block for block in SECTIONS.values())


@pytest.mark.parametrize("title", SECTIONS)
def test_the_fault_is_still_there(title: str) -> None:
    exec(compile(SECTIONS[title], title, "exec"), {})
