"""Every page has its place in the site's navigation; `make docs`, which `.ci/run` runs, checks the site itself."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_navigation_has_every_page() -> None:
    listed = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted(["index.md", *pages, *notebooks])
