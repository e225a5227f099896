"""SpeeD schedulers are diffusers' schedulers: signatures, conversions, saving, sampling, and foreign hosts."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers import KarrasDiffusionSchedulers

from speed_diffusers import PRESETS, InputError, SpeeDDDIMScheduler, SpeeDDDPMScheduler, SpeeDSchedulerMixin
from speed_diffusers.functional import speed_tables
from speed_diffusers.schedulers import speed_scheduler
from speed_diffusers.settings import SPEED_DEFAULTS

HOSTS = [(SpeeDDDPMScheduler, DDPMScheduler), (SpeeDDDIMScheduler, DDIMScheduler)]
PAPER = {
    "speed_sampling": "asymmetric",
    "speed_weighting": "change_aware",
    "speed_k": 5.0,
    "speed_tau": None,
    "speed_r": 145.0,
    "speed_lambda": 0.6,
}
# None of these is a default, so that a conversion which loses a key shows.
SCHEDULE = {
    "num_train_timesteps": 500,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
OTHER_THAN_DEFAULT = {
    **SCHEDULE,
    "trained_betas": [0.1, 0.2, 0.5, 0.6],
    "variance_type": "fixed_large",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "clip_sample_range": 2.0,
    "sample_max_value": 1.5,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "rescale_betas_zero_snr": True,
}
SPEED = {"speed_k": 3.0, "speed_tau": 321, "speed_lambda": 0.8, "speed_r": 90.0}


def values_of(scheduler: ConfigMixin) -> dict[str, object]:
    """A scheduler's config without diffusers' own notes in it."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def is_compatible(name: str) -> bool:
    """Whether diffusers has the scheduler here and its schedule is given by betas."""
    cls = getattr(diffusers, name)
    return hasattr(cls, "from_config") and "beta_start" in inspect.signature(cls.__init__).parameters


COMPATIBLE = [e.name for e in KarrasDiffusionSchedulers if is_compatible(e.name)]


class SpeeDDPMSolver(SpeeDSchedulerMixin, DPMSolverMultistepScheduler):
    """What a reader of the mixin's docstring would write."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        speed_sampling: str = "asymmetric",
        speed_weighting: str = "change_aware",
        speed_k: float = 5.0,
        speed_tau: int | None = None,
        speed_r: float = 145.0,
        speed_lambda: float = 0.6,
    ) -> None:
        DPMSolverMultistepScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
        )
        _ = self.speed_tables


def test_the_schedulers_to_convert_from_are_the_known_ones() -> None:
    assert {"DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"} < set(
        COMPATIBLE
    )
    assert {"EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"} < set(
        COMPATIBLE
    )
    assert {"UniPCMultistepScheduler", "DEISMultistepScheduler"} < set(COMPATIBLE)


@pytest.mark.parametrize(("ours", "parent"), HOSTS)
def test_signature_is_the_parents_and_speeds(ours: type, parent: type) -> None:
    mine = inspect.signature(ours.__init__).parameters
    theirs = inspect.signature(parent.__init__).parameters
    assert {name: p.default for name, p in mine.items() if not name.startswith("speed_")} == {
        name: p.default for name, p in theirs.items()
    }
    assert {name: p.default for name, p in mine.items() if name.startswith("speed_")} == SPEED_DEFAULTS
    assert list(mine)[: len(theirs)] == list(theirs), "positional arguments would mean something else"


@pytest.mark.parametrize(("ours", "parent"), HOSTS)
def test_schedule_is_the_parents(ours: type, parent: type) -> None:
    for options in ({}, SCHEDULE, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 0.2, 0.5, 0.6]}):
        mine, theirs = ours(**options), parent(**options)
        assert torch.equal(mine.betas, theirs.betas)
        assert torch.equal(mine.alphas_cumprod, theirs.alphas_cumprod)
        assert {key: mine.config[key] for key in values_of(theirs)} == values_of(theirs)


@pytest.mark.parametrize(("ours", "parent"), HOSTS)
def test_every_parameter_reaches_the_parent(ours: type, parent: type) -> None:
    defaults = {name: p.default for name, p in inspect.signature(parent.__init__).parameters.items() if name != "self"}
    for name, default in defaults.items():
        value = OTHER_THAN_DEFAULT[name]
        assert value != default
        mine, theirs = ours(**{name: value}), parent(**{name: value})
        assert mine.config[name] == theirs.config[name] == value, name
        assert torch.equal(mine.betas, theirs.betas), name


def test_default_is_the_papers_preset() -> None:
    assert PRESETS["paper"] == PAPER | {"speed_draw": "independent"}
    config = SpeeDDDPMScheduler(**PRESETS["paper"]).config
    assert {key: config[key] for key in SPEED_DEFAULTS} == SPEED_DEFAULTS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers' own schedulers
@pytest.mark.parametrize("ours", [SpeeDDDPMScheduler, SpeeDDDIMScheduler])
@pytest.mark.parametrize("name", COMPATIBLE)
def test_conversion_keeps_schedule_and_speed_keys(ours: type, name: str) -> None:
    other = getattr(diffusers, name)
    shared = {key: value for key, value in SCHEDULE.items() if key in inspect.signature(other.__init__).parameters}
    assert {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"} <= set(shared)
    plain = other(**shared)
    converted = ours.from_config(plain.config)
    assert {key: converted.config[key] for key in shared} == shared
    assert torch.equal(converted.betas.float(), plain.betas.float())

    speed = ours(**SCHEDULE, **SPEED)
    there = other.from_config(speed.config)
    assert torch.equal(there.betas.float(), speed.betas)
    back = ours.from_config(there.config)
    expected = {**SCHEDULE, **SPEED}
    assert {key: back.config[key] for key in expected} == expected
    assert torch.equal(back.speed_tables.pmf, speed.speed_tables.pmf)
    assert torch.equal(back.speed_tables.weights, speed.speed_tables.weights)


def test_conversion_between_the_speed_schedulers() -> None:
    ddpm = SpeeDDDPMScheduler(**SCHEDULE, **SPEED)
    ddim = SpeeDDDIMScheduler.from_config(ddpm.config)
    assert {key: ddim.config[key] for key in {**SCHEDULE, **SPEED}} == {**SCHEDULE, **SPEED}
    again = SpeeDDDPMScheduler.from_config(ddim.config)
    assert {key: again.config[key] for key in values_of(ddpm)} == values_of(ddpm)


@pytest.mark.parametrize("ours", [SpeeDDDPMScheduler, SpeeDDDIMScheduler, SpeeDDPMSolver])
def test_saving_and_loading_is_the_identity(ours: type, tmp_path: Path) -> None:
    scheduler = ours(**SCHEDULE, **SPEED)
    scheduler.save_pretrained(tmp_path / "first")
    loaded = ours.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / n / "scheduler_config.json").read_text()) for n in ("first", "second"))
    assert first == second and first["_class_name"] == ours.__name__
    assert {key: first[key] for key in {**SCHEDULE, **SPEED}} == {**SCHEDULE, **SPEED}
    assert torch.equal(loaded.betas, scheduler.betas)
    assert torch.equal(loaded.speed_tables.pmf, scheduler.speed_tables.pmf)
    assert all(not isinstance(value, torch.Tensor) for value in scheduler.config.values())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("ours", [SpeeDDDPMScheduler, SpeeDDDIMScheduler, SpeeDDPMSolver])
def test_copies_work_alike(ours: type, clone: object) -> None:
    scheduler = ours(**SCHEDULE, **SPEED)
    scheduler.sample_timesteps(4)  # fills the working copies too
    twin = clone(scheduler)  # type: ignore[operator]
    assert twin.config == scheduler.config and twin is not scheduler
    for draw in (scheduler, twin):
        draw.drawn = draw.sample_timesteps(64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(twin.drawn, scheduler.drawn)
    assert torch.equal(twin.loss_weights(twin.drawn), scheduler.loss_weights(twin.drawn))


@pytest.mark.parametrize(("ours", "parent"), HOSTS)
def test_noising_and_sampling_are_the_parents_bit_for_bit(ours: type, parent: type) -> None:
    options = {**SCHEDULE, "clip_sample": False}
    mine, theirs = ours(**options), parent(**options)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 1, 250, 498, 499])
    assert torch.equal(mine.add_noise(clean, noise, timesteps), theirs.add_noise(clean, noise, timesteps))
    assert torch.equal(mine.get_velocity(clean, noise, timesteps), theirs.get_velocity(clean, noise, timesteps))
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(mine.timesteps, theirs.timesteps)
    extra = {"eta": 0.5} if parent is DDIMScheduler else {}
    samples = [noise, noise]
    for t in theirs.timesteps:
        samples = [
            scheduler.step(
                sample.sin(), t, sample, generator=torch.Generator().manual_seed(int(t)), **extra
            ).prev_sample
            for scheduler, sample in zip((mine, theirs), samples, strict=True)
        ]
        assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("ours", "parent"), [*HOSTS, (SpeeDDPMSolver, DPMSolverMultistepScheduler)], ids=["ddpm", "ddim", "dpm"]
)
def test_inference_scheduler_is_the_plain_host(ours: type, parent: type) -> None:
    scheduler = ours(**SCHEDULE, **SPEED)
    plain = scheduler.to_inference()
    assert type(plain) is parent
    assert [key for key in plain.config if key.startswith("speed_")] == []
    assert torch.equal(plain.betas, scheduler.betas)
    assert {key: plain.config[key] for key in SCHEDULE} == SCHEDULE


def test_areas_of_the_default() -> None:
    areas = SpeeDDDPMScheduler().speed_areas
    assert (areas.acceleration, areas.deceleration, areas.convergence) == (
        range(219),
        range(219, 700),
        range(700, 1000),
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"speed_sampling": "asymetric"}, "Unknown timestep density (speed_sampling) 'asymetric'. Did you mean "),
        ({"speed_weighting": "chnge_aware"}, "Unknown loss weighting (speed_weighting) 'chnge_aware'. Did you mean "),
        ({"speed_k": 0.5}, "speed_k=0.5: must lie in [1, 1e6]"),
        ({"speed_tau": 0}, "speed_tau=0: must be a whole number in [1, 500], or None"),
        ({"speed_tau": 501}, "speed_tau=501: must be a whole number in [1, 500], or None"),
        ({"speed_r": 1}, "speed_r=1: must be above 1."),
        ({"speed_lambda": 1.5}, "speed_lambda=1.5: must lie in [0.5, 1]"),
        ({"speed_lambda": 0.4}, "speed_lambda=0.4: must lie in [0.5, 1]"),
    ],
)
@pytest.mark.parametrize("ours", [SpeeDDDPMScheduler, SpeeDDDIMScheduler, SpeeDDPMSolver])
def test_bad_values_stop_at_construction(ours: type, value: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        ours(num_train_timesteps=500, **value)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_foreign_host_draws_and_weighs_alike() -> None:
    solver, reference = SpeeDDPMSolver(**SCHEDULE, **SPEED), SpeeDDDPMScheduler(**SCHEDULE, **SPEED)
    assert values_of(solver).items() >= {**SCHEDULE, **SPEED, "solver_order": 2}.items()
    timesteps = solver.sample_timesteps(256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(timesteps, reference.sample_timesteps(256, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(solver.loss_weights(timesteps), reference.loss_weights(timesteps))
    assert solver.speed_areas.convergence == range(321, 500)


@pytest.mark.parametrize("ours", [SpeeDDDPMScheduler, SpeeDDDIMScheduler])
def test_what_register_to_config_has_changed_is_exported_and_converted(ours: type) -> None:
    """Diffusers drops what was a default when the scheduler was made."""
    scheduler = ours()
    scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
    for made in (
        scheduler.to_inference(),
        speed_scheduler(scheduler, speed_k=3.0),
        ours.from_config(scheduler.config),
    ):
        assert made.config.prediction_type == "v_prediction", type(made)
    assert scheduler.to_inference().config.clip_sample is False
    late = DDPMScheduler()
    late.register_to_config(prediction_type="v_prediction")
    steps = torch.tensor([0, 500, 900])
    weights = speed_scheduler(late, speed_weighting="min_snr").loss_weights(steps)
    asked = SpeeDDDPMScheduler(prediction_type="v_prediction", speed_weighting="min_snr").loss_weights(steps)
    assert torch.equal(weights, asked)


def test_another_class_has_another_default_schedule() -> None:
    host = LCMScheduler()
    taken = SpeeDDDPMScheduler.from_config(host.config)
    assert torch.equal(taken.alphas_cumprod, host.alphas_cumprod)


def test_options_that_register_to_config_changes_take_effect() -> None:
    scheduler = SpeeDDDPMScheduler()
    made = scheduler.speed_strategy
    scheduler.register_to_config(clip_sample=False)
    assert scheduler.speed_strategy is made, "nothing that it depends on"
    scheduler.register_to_config(speed_sampling="uniform", speed_weighting="none")
    assert torch.equal(scheduler.loss_weights(torch.arange(3)), torch.ones(3))
    again = SpeeDDDPMScheduler.from_config(scheduler.config)
    assert (again.config.speed_sampling, again.config.speed_weighting) == ("uniform", "none")
    scheduler.register_to_config(speed_samplng="uniform")
    with pytest.raises(InputError, match="Did you mean 'speed_sampling'"):
        scheduler.sample_timesteps(1)


def test_uniform_over_any_config_is_the_plain_loop() -> None:
    for before in (PRESETS["official"], PRESETS["fast"], {"speed_anneal_start": 0.5, "speed_normalize_weights": True}):
        config = SpeeDDDPMScheduler(**before).config
        scheduler = SpeeDDDPMScheduler.from_config(config, **PRESETS["uniform"])
        drawn = scheduler.sample_timesteps(64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn, torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(0)))
        assert torch.equal(scheduler.loss_weights(drawn), torch.ones(64))


@pytest.mark.parametrize("option", ["sampling", "weighting"])
@pytest.mark.parametrize("length", [500, 999, 1200])
def test_functions_of_another_length_are_refused(option: str, length: int) -> None:
    with pytest.raises(
        InputError, match=rf"^speed_{option}=.* gives numbers of shape \({length},\); must be \(1000,\)"
    ):
        speed_tables(num_train_timesteps=1000, **{option: lambda process, settings: torch.ones(length)})  # type: ignore[arg-type]
