"""The text of `--help`, and what cannot be a schema."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from config_settings import Settings, load
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import help_text


def test_help_lists_every_setting_with_type_default_and_meaning():
    text = help_text(Settings, "Trains.\n\n    python train.py\n")
    assert text.startswith("Trains.\n\n    python train.py\n\nSettings: key=value")
    assert "  config: a YAML file" in text
    for key in asdict(Settings()):
        assert f"\n  {key}: " in text
    assert "train_batch_size: a whole number, default 8\n      Images per device and micro-step.\n" in text
    assert "class_ids: a list of whole numbers, default []" in text
    assert "crops: a list of whole numbers or None, default None" in text
    assert "sampling: text, default paper\n      How steps are drawn. One of paper, uniform, none.\n" in text
    assert "patch_size: a whole number, default 2\n      One of 2, 4, 8." in text
    assert help_text(Settings, None).startswith("Settings: ")


def test_a_default_shown_in_help_can_be_typed():
    lines = re.findall(r"^  (\w+): .*, default (.*)$", help_text(Settings, None), flags=re.M)
    assert load(*(f"{key}={value}" for key, value in lines)) == Settings()


def test_a_schema_that_cannot_be_settings_is_a_programming_error():
    @dataclass
    class Nested:
        optimizer: dict[str, float] = field(default_factory=dict)

    @dataclass
    class Reserved:
        config: str = "a"

    for schema in (Nested, Reserved):
        with pytest.raises(TypeError, match="cannot be a setting"):
            load_config(schema, [], Path())
