"""The Chinese README says the same as the English one: its commands, examples, numbers, links and pictures."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def code(text: str) -> list[tuple[str, list[str]]]:
    """Languages and lines of all code blocks, without comments, which are translated; drawings are left out."""
    found = []
    for language, block in FENCE.findall(text):
        if not language:
            continue
        lines = (re.sub(r"(^|  )# .*", "", line).rstrip() for line in block.splitlines())
        found.append((language, [line for line in lines if line]))
    return found


def numbers(text: str) -> Counter[str]:
    """The numbers in running text and tables, and how often each is there."""
    prose = LINK.sub("]", FENCE.sub("", text))
    return Counter(re.findall(r"\d+(?:[.,:]\d+)*(?:e-?\d+)?", prose))


def links(text: str) -> list[str]:
    """Where links and pictures lead, but for those from one README to the other."""
    return sorted(link for link in LINK.findall(text) if not link.startswith("README"))


def test_they_link_to_one_another() -> None:
    assert "](README.zh-CN.md)" in ENGLISH and "](README.md)" in CHINESE


def test_commands_and_examples_are_the_same() -> None:
    assert code(CHINESE) == code(ENGLISH) and len(code(ENGLISH)) > 5


def test_numbers_are_the_same() -> None:
    ours, theirs = numbers(CHINESE), numbers(ENGLISH)
    assert (ours - theirs, theirs - ours) == (Counter(), Counter()), "only in the Chinese, only in the English README"


def test_links_are_the_same() -> None:
    assert links(CHINESE) == links(ENGLISH)


@pytest.mark.parametrize(
    ("found", "old", "new"),
    [(code, "train_data_dir=", "train_dir="), (numbers, "5.11 [", "5.12 ["), (numbers, "4:28", "4:27")],
)
def test_a_difference_is_seen(found, old: str, new: str) -> None:  # type: ignore[no-untyped-def]
    assert old in CHINESE and found(CHINESE.replace(old, new)) != found(ENGLISH)
