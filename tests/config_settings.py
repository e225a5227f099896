"""A dataclass of settings with one field of every type, and ways to load it, for the tests of config."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError


@dataclass(frozen=True)
class Settings:
    """One field of every type that a setting can have."""

    train_batch_size: int = field(default=8, metadata={"help": "Images per device and micro-step."})
    max_train_steps: int | None = None
    num_train_epochs: int | None = field(default=None, metadata={"instead_of": "max_train_steps"})
    learning_rate: float = 1e-4
    guidance_scale: float | None = None
    use_ema: bool = False
    push_to_hub: bool | None = None
    output_dir: str = "runs/tiny"
    mixed_precision: str = "no"
    model: str | None = None
    class_ids: list[int] = field(default_factory=list)
    class_labels: list[str] = field(default_factory=lambda: ["cat", "dog"])
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    crops: list[int] | None = None
    sampling: str = field(
        default="paper", metadata={"help": "How steps are drawn.", "choices": ("paper", "uniform", "none")}
    )
    patch_size: int = field(default=2, metadata={"choices": lambda: [2, 4, 8]})
    trackers: list[str] = field(default_factory=list, metadata={"choices": ("tensorboard", "wandb")})
    cache_dir: str | None = field(default=None, metadata={"path": True})
    runs: list[str] = field(default_factory=list, metadata={"path": True})

    def __post_init__(self) -> None:
        if self.train_batch_size < 1:
            raise InputError(f"train_batch_size: {self.train_batch_size} is below 1")


def load(*argv: str) -> Settings:
    """Settings from a command line alone."""
    return load_config(Settings, argv, Path("no folder"))


def load_yaml(text: str, folder: Path) -> Settings:
    """Settings from the text of a YAML file alone."""
    path = folder / "given.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Settings, [f"config={path}"], folder)


def message(*argv: str) -> str:
    """The one-line error that a command line gives."""
    with pytest.raises(InputError) as caught:
        load(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_message(text: str, folder: Path) -> str:
    """The one-line error that a YAML file gives, without the file's name, which must lead."""
    with pytest.raises(InputError) as caught:
        load_yaml(text, folder)
    where, _, rest = str(caught.value).partition(": ")
    assert where == str(folder / "given.yaml") and "\n" not in rest
    return rest
