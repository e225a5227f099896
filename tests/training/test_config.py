"""The options of the training script: their ranges, and that SpeeD's are those of `SpeeDOptions`."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from range_ends import range_ends
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Setting, help_text, settings_of
from speed_diffusers.errors import InputError
from speed_diffusers.settings import SPEED_DEFAULTS, SPEED_KEYS, SpeeDOptions
from speed_diffusers.strategy import REGISTRIES
from speed_diffusers.training.config import TrainConfig, trainer_options
from speed_diffusers.training.ema import fitted_decay
from speed_diffusers.training.parts import make_scheduler

SETTINGS = settings_of(TrainConfig)
RANGED = {key: setting for key, setting in SETTINGS.items() if setting.interval is not None}
# What must be in order with another option is moved along with it, so that the range alone decides.
ALONG = {
    "beta_start": lambda value: {"beta_end": value},
    "beta_end": lambda value: {"beta_start": math.nextafter(0.0, 1.0)},
    "num_train_timesteps": lambda value: {"num_inference_steps": 1},
    "num_inference_steps": lambda value: {"num_train_timesteps": max(value, 2)},
    "lr_decay_steps": lambda value: (
        {"max_train_steps": min(value, 10**9)} if value > 0 else {"lr_scheduler": "constant"}
    ),
    "shuffle_buffer_size": lambda value: {"cache_latents": False},
    "speed_anneal_start": lambda value: {"speed_anneal_end": 1.0},
    "speed_anneal_end": lambda value: {"speed_anneal_start": 0.0},
}


def at_the_ends(setting: Setting) -> tuple[list[float], list[float]]:
    """The last values inside an option's range and the first outside, at each end that is finite."""
    assert setting.interval is not None
    text, inside, outside = setting.interval.text, [], []
    for end, is_closed, inwards in zip(setting.interval.ends, (text[0] == "[", text[-1] == "]"), (1, -1), strict=True):
        if math.isfinite(end):
            value = setting.item(end)
            inside.append(value if is_closed else neighbour(value, inwards))
            outside.append(neighbour(value, -inwards) if is_closed else value)
    return inside, outside


def neighbour(value: float, direction: int) -> float:
    """The next number of the same type."""
    return value + direction if isinstance(value, int) else math.nextafter(value, direction * math.inf)


def at(key: str, value: float) -> dict[str, float]:
    """The options that put one to a value."""
    needed = dict([SETTINGS[key].only_with or (key, value)])
    return {**needed, **ALONG.get(key, lambda value: {})(value), key: value}


@pytest.mark.parametrize("key", [key for key, setting in SETTINGS.items() if setting.only_with])
def test_what_means_nothing_without_another_is_given_with_it_alone(key: str, tmp_path: Path) -> None:
    setting, values = SETTINGS[key], {"muon_momentum": 0.5, "muon_ns_steps": 3, "lr_decay_steps": 7}
    other, needed = setting.only_with or ("", None)
    value = next(value for value in (values.get(key), *setting.choices, 2) if value not in (None, setting.default))
    without = {other: False if needed is True else "somebody/a-model" if needed is None else SETTINGS[other].default}
    said = "true" if needed is True else needed
    if key != "conditioning_init":  # which says why
        with pytest.raises(InputError, match=rf"^{key}=[\w.]+: only {other}={said} knows it\.$"):
            TrainConfig(**{**without, key: value})  # type: ignore[arg-type]
    # What a file says of it is forgotten with the other option, and only then.
    extra = "cache_latents: false\n" if other == "streaming" else ""
    file = tmp_path / "both.yaml"
    file.write_text(f"{extra}{key}: {value}\n" + (f"{other}: {said}\n" if needed is not None else ""))
    argv = [f"config={file}", "max_train_steps=10"]
    assert getattr(load_config(TrainConfig, argv, tmp_path), key) == value
    taken_back = load_config(TrainConfig, [*argv, *(f"{name}={chosen}" for name, chosen in without.items())], tmp_path)
    assert getattr(taken_back, key) == setting.default
    same = load_config(TrainConfig, [*argv, f"{other}={said}"], tmp_path)
    assert getattr(same, key) == value


@pytest.mark.parametrize("key", RANGED)
def test_the_ends_of_a_range_decide(key: str) -> None:
    setting = RANGED[key]
    inside, outside = at_the_ends(setting)
    assert outside, "a range without a finite end is none"
    for value in outside:
        with pytest.raises(InputError) as caught:
            TrainConfig(**at(key, value))  # type: ignore[arg-type]
        assert str(caught.value) == f"{key}={value}: {setting.interval.rule}."  # type: ignore[union-attr]
    for value in inside:
        assert getattr(TrainConfig(**at(key, value)), key) == value  # type: ignore[arg-type]


OF_THE_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "flow_shift",
    *(k for k in RANGED if k[:5] == "speed"),
)


@pytest.mark.parametrize("key", OF_THE_PROCESS)
def test_every_value_of_the_process_gives_sound_tables(key: str) -> None:
    setting = RANGED[key]
    flow = {"prediction_type": "flow_prediction"} if key == "flow_shift" else {}
    for value in range_ends(str(setting.interval), setting.item):
        # Two timesteps change at one constant rate, which change-aware weights refuse.
        config = TrainConfig(**{**at(key, value), **flow}, speed_weighting="min_snr")  # type: ignore[arg-type]
        tables = make_scheduler(config).speed_strategy.tables(0.5)
        assert bool((tables.pmf >= 0).all()) and float(tables.pmf.sum()) == pytest.approx(1.0), value
        weights = tables.weights.float()
        assert bool(torch.isfinite(weights).all() & (weights >= 0).all() & (weights > 0).any()), value
        if flow:
            sampler = FlowMatchEulerDiscreteScheduler(shift=value)
            sampler.set_timesteps(50)
            for step in sampler.timesteps:
                sample = sampler.step(torch.ones(1), step, torch.ones(1)).prev_sample
                assert bool(torch.isfinite(sample)), value


@pytest.mark.parametrize("key", [key for key in RANGED if key.startswith("adam_")])
def test_every_value_of_the_optimizer_steps_to_finite_weights(key: str) -> None:
    for value in range_ends(str(RANGED[key].interval), float):
        config = TrainConfig(**{key: value})  # type: ignore[arg-type]
        # DiT begins with layers whose gradients are exactly zero.
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW(
            [parameter],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        parameter.grad = torch.tensor([0.0, 0.5])
        optimizer.step()
        assert bool(torch.isfinite(parameter).all()), value


def test_the_longest_run_still_moves_its_ema_weights() -> None:
    assert fitted_decay(int(range_ends(str(RANGED["max_train_steps"].interval), int)[1])) < 1.0


@pytest.mark.parametrize("key", [key for key, setting in RANGED.items() if setting.optional])
def test_none_has_no_range(key: str, tmp_path: Path) -> None:
    assert getattr(TrainConfig(**{key: None}), key) is None  # type: ignore[arg-type]
    assert getattr(load_config(TrainConfig, [f"{key}=None"], tmp_path), key) is None


def test_ranges_are_checked_on_the_way_in_and_shown_in_help(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("speed_k: 0.5")
    with pytest.raises(InputError) as caught:
        load_config(TrainConfig, [f"config={path}"], tmp_path)
    assert str(caught.value) == f"{path}: speed_k=0.5: must lie in [1, 1e6]."
    text = help_text(TrainConfig, None)
    assert "  speed_k: a finite number in [1, 1e6], default 5.0\n" in text
    for key, setting in RANGED.items():
        assert f"\n  {key}: {setting.words} in {setting.interval}, default {setting.default}\n" in text


def test_every_number_has_a_range_or_says_why_not() -> None:
    numbers = {key for key, setting in SETTINGS.items() if setting.item in (int, float)}
    # tau's range depends on the number of timesteps.
    assert numbers - set(RANGED) == {"speed_tau"}


def test_the_options_of_speed_are_those_of_the_library() -> None:
    theirs = settings_of(TrainConfig)
    ours = {field.name: field for field in fields(SpeeDOptions)}
    assert [key for key in theirs if key.startswith("speed_")] == list(SPEED_KEYS) == list(SPEED_DEFAULTS)
    for key, name in SPEED_KEYS.items():
        assert theirs[key].default == SPEED_DEFAULTS[key], key
        assert theirs[key].interval == ours[name].metadata["interval"], key
        assert theirs[key].help.startswith(ours[name].metadata["help"]), key
    config = TrainConfig(speed_lambda=0.7, speed_k=3.0)  # type: ignore[call-arg]
    assert config.speed == {**SPEED_DEFAULTS, "speed_lambda": 0.7, "speed_k": 3.0}
    assert SpeeDOptions.from_config(config.speed, "epsilon") == SpeeDOptions(lambda_=0.7, k=3.0)


def test_every_option_that_is_a_path_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {key for key in SETTINGS if key.endswith(("_dir", "_path", "_checkpoint"))} - {"overwrite_output_dir"}
    paths |= {"score_reference", "feature_extractor"}
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(TrainConfig, [f"{key}=~/x" for key in paths], tmp_path)
    assert {key for key in SETTINGS if getattr(config, key) == str(tmp_path / "x")} == paths


@pytest.mark.parametrize("words", [["report_to="], ["--report_to", ""], ["report_to=None"], ["report_to=[]"]])
def test_no_trackers_in_every_way_to_say_so(words: list[str], tmp_path: Path) -> None:
    assert load_config(TrainConfig, words, tmp_path).report_to == []


def test_help_tells_what_may_be_chosen() -> None:
    for key, registry in REGISTRIES.items():
        setting = SETTINGS[key]
        assert set(setting.choices) == set(registry) or all(f"{name}:" in setting.help for name in registry), key


def test_the_trainers_options_are_taken_out_of_those_of_a_script_that_has_more() -> None:
    class Wider(TrainConfig):
        """Options of some script."""

    config = Wider(seed=3, speed_k=2.0)  # type: ignore[call-arg]
    assert trainer_options(config) == TrainConfig(seed=3, speed_k=2.0)  # type: ignore[call-arg]
    assert type(trainer_options(config)) is TrainConfig
