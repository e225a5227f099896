"""Intervals, and that the range of an option is checked on every road to it and shown in `--help`."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Interval, Options, help_text, option, settings_of
from speed_diffusers.errors import InputError

INF = math.inf


@dataclass
class Ranged(Options):
    """Options with a range each, of every kind."""

    PREFIX = "my_"

    k: float = option(5.0, "How often.", interval="[1, inf)")
    steps: int | None = option(None, "How many.", interval="[1, inf)")
    norm: float | None = option(1.0, "At most.", interval="(0, inf)")
    shares: list[float] = option([0.0, 1.0], "Where.", interval="[0, 1]")
    seed: int = option(0, "Of everything.", interval="[0, 2^63)")
    lambda_: float = option(0.6, "Upper end.", interval="[0.5, 1]")
    name: str = option("plain", "What.", choices=("plain", "fancy"))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("[0, 1]", [0, 0.5, 1, 1.0], [-1e-9, 1.0000001, -INF, INF]),
        ("[0, 1)", [0, 0.999999], [1, 1.0, -1]),
        ("(0, 1]", [1e-300, 1], [0, 0.0, -0.0, 2]),
        ("(0, 1)", [0.5], [0, 1]),
        ("[1, inf)", [1, 1.5, 1e308, 10**18], [0.999999, 0, -1, INF]),
        ("(1, inf)", [1.0000001], [1, 0, INF]),
        ("(-inf, 0]", [0, -1e308], [1e-9, -INF]),
        ("[-inf, inf]", [0, -1e308, 1e308, INF, -INF], []),
        ("(0, inf]", [1e-308, INF], [0, -INF]),
        ("[0, 2^63)", [0, 2**63 - 1], [2**63, -1, 2.0**63]),
        ("[2^-1, 2^2]", [0.5, 4], [0.49, 4.01]),
    ],
)
def test_an_interval_holds_what_mathematics_says(text: str, inside: list[float], outside: list[float]) -> None:
    interval = Interval(text)
    assert [value for value in inside if value not in interval] == []
    assert [value for value in outside if value in interval] == []
    assert math.nan not in interval
    assert str(interval) == text


def test_a_number_too_large_for_a_float_is_a_number_all_the_same() -> None:
    huge = 10**400
    assert huge in Interval("[1, inf)") and huge not in Interval("[0, 2^63)") and -huge not in Interval("[1, inf)")


def test_ends() -> None:
    assert Interval("[1, inf)").ends == (1.0, INF)
    assert Interval("[0, 2^63)").ends == (0.0, 2.0**63)
    assert Interval("(-0.5, 1e3]").ends == (-0.5, 1000.0)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[1, inf)", "must be at least 1"),
        ("(0, inf)", "must be above 0"),
        ("[0, 1)", "must lie in [0, 1)"),
        ("[0, 2^63)", "must lie in [0, 2^63)"),
    ],
)
def test_a_rule_is_what_a_person_would_say(text: str, rule: str) -> None:
    assert Interval(text).rule == rule


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "k=0.5: must be at least 1."),
        (math.nan, "k=nan: must be at least 1."),
        (INF, "k=inf: must be at least 1."),
        (True, "k=True: must be a number."),
        ("2", "k='2': must be a number."),
        (None, "k=None: must be a number."),
    ],
)
def test_what_is_required_is_one_line(value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Interval("[1, inf)").require("k", value)
    assert str(caught.value) == message
    Interval("[1, inf)").require("k", 1)


OUTSIDE = [
    ("k", "0.5", 0.5, "must be at least 1."),
    ("steps", "0", 0, "must be at least 1."),
    ("shares", "0.5,1.5", [0.5, 1.5], "must lie in [0, 1]."),
    ("seed", str(2**63), 2**63, "must lie in [0, 2^63)."),
]


@pytest.mark.parametrize(("key", "text", "value", "rule"), OUTSIDE)
def test_a_range_is_checked_on_the_command_line_in_yaml_and_by_the_constructor(
    key: str, text: str, value: object, rule: str, tmp_path: Path
) -> None:
    number = value[-1] if isinstance(value, list) else value
    with pytest.raises(InputError) as caught:
        load_config(Ranged, [f"{key}={text}"], tmp_path)
    assert str(caught.value) == f"{key}={number}: {rule}"
    path = tmp_path / "given.yaml"
    path.write_text(f"{key}: {text}")
    with pytest.raises(InputError) as caught:
        load_config(Ranged, [f"config={path}"], tmp_path)
    assert str(caught.value) == f"{path}: {key}={number}: {rule}", "the file is to blame, not the command line"
    with pytest.raises(InputError) as caught:
        Ranged(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"my_{key}={number}: {rule}"


def test_none_is_allowed_where_the_type_has_it_and_nowhere_else(tmp_path: Path) -> None:
    assert Ranged(steps=None, norm=None) == load_config(Ranged, ["steps=None", "norm=None"], tmp_path)
    with pytest.raises(InputError, match=r"^my_k=None: must be a number\.$"):
        Ranged(k=None)  # type: ignore[arg-type]


def test_a_field_that_python_must_spell_otherwise_is_named_as_users_know_it() -> None:
    with pytest.raises(InputError, match=r"^my_lambda=2: must lie in \[0.5, 1\]\.$"):
        Ranged(lambda_=2)


def test_help_shows_ranges_choices_and_defaults() -> None:
    text = help_text(Ranged, None)
    for line in (
        "  k: a finite number in [1, inf), default 5.0\n      How often.\n",
        "  steps: a whole number or None in [1, inf), default None\n      How many.\n",
        "  shares: a list of finite numbers in [0, 1], default [0.0, 1.0]\n",
        "  seed: a whole number in [0, 2^63), default 0\n",
        "  name: text, default plain\n      What. One of plain, fancy.",
    ):
        assert line in text


def test_a_default_that_is_a_list_is_everybodys_own() -> None:
    first, second = Ranged(), Ranged()
    first.shares.append(0.5)
    assert second.shares == [0.0, 1.0] == settings_of(Ranged)["shares"].default
