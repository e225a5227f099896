"""A slip in the name of an option of SpeeD is an error on every road into a scheduler."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from speed_diffusers import (
    InputError,
    SpeeDDDIMScheduler,
    SpeeDDDPMScheduler,
    SpeeDFlowMatchEulerDiscreteScheduler,
    speed_scheduler,
)

CLASSES = [SpeeDDDPMScheduler, SpeeDDDIMScheduler, SpeeDFlowMatchEulerDiscreteScheduler]
SLIP = {"speed_sample": "uniform"}

ROADS: dict[str, Callable[[type], object]] = {
    "constructor": lambda cls: cls(**SLIP),
    "from_config, keyword": lambda cls: cls.from_config(cls().config, **SLIP),
    "from_config, key": lambda cls: cls.from_config({**cls().config, **SLIP}),
    "factory, keyword": lambda cls: speed_scheduler(cls(), **SLIP),
    "factory, config": lambda cls: speed_scheduler({**cls().config, "_class_name": cls.__name__, **SLIP}),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("road", ROADS)
def test_an_unknown_option_names_the_nearest(cls: type, road: str) -> None:
    with pytest.raises(InputError, match="Unknown SpeeD option 'speed_sample'. Did you mean 'speed_sampling'"):
        ROADS[road](cls)


def test_a_saved_file_with_an_unknown_option_is_refused(tmp_path: Path) -> None:
    SpeeDDDPMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **SLIP}))
    with pytest.raises(InputError, match="Unknown SpeeD option 'speed_sample'"):
        SpeeDDDPMScheduler.from_pretrained(tmp_path)


def test_keys_of_others_pass_as_diffusers_has_it() -> None:
    scheduler = SpeeDDDPMScheduler.from_config({**DDPMScheduler().config, "of_a_later_version": 1})
    assert scheduler.config["of_a_later_version"] == 1


@pytest.mark.parametrize("host", [DDPMScheduler, PNDMScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_class_of_the_factory_knows_itself_and_its_host_as_compatible(host: type) -> None:
    scheduler = speed_scheduler(host())
    assert {type(scheduler), host} <= set(scheduler.compatibles)
    assert set(host().compatibles) <= set(scheduler.compatibles)


def test_betas_that_do_not_fit_the_number_of_timesteps_are_named() -> None:
    with pytest.raises(InputError, match="has 2 trained_betas, but num_train_timesteps=1000: set it to 2"):
        speed_scheduler(DDPMScheduler(trained_betas=[0.1, 0.2]))


def test_one_timestep_is_trained_as_in_diffusers_without_speed() -> None:
    plain = SpeeDDDPMScheduler(num_train_timesteps=1, speed_sampling="uniform", speed_weighting="none")
    timesteps = plain.sample_timesteps(3)
    assert timesteps.tolist() == [0, 0, 0] and plain.loss_weights(timesteps).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match="num_train_timesteps=1: .*at least 2.*speed_sampling='uniform'"):
        SpeeDDDPMScheduler(num_train_timesteps=1)
