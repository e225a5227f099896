"""Versions of other packages: what is newer than anything tried is told once, and nothing else."""

import warnings

import pytest

from speed_diffusers import version
from speed_diffusers.version import NEWEST_TRIED, warn_of_untried


@pytest.mark.parametrize(("found", "warns"), [("0.36.0", 0), ("0.42.7", 0), ("0.43.0.dev0", 1), ("1.0.0", 1)])
def test_newer_versions_than_were_tried_warn(found: str, warns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEWEST_TRIED, "diffusers", "0.42")
    monkeypatch.setattr(version.metadata, "version", lambda package: found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_untried("diffusers")
    assert len(caught) == warns
    if warns:
        assert f"tried with diffusers up to 0.42, but {found} is installed" in str(caught[0].message)


def test_what_is_installed_here_is_what_was_tried() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untried(*NEWEST_TRIED)
