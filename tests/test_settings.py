"""SpeeD's options: ranges, tau, one spelling in schedulers and library, and functions in place of names."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from speed_diffusers import (
    ForwardProcess,
    InputError,
    SpeeDDDIMScheduler,
    SpeeDDDPMScheduler,
    SpeeDFlowMatchEulerDiscreteScheduler,
    SpeeDOptions,
    SpeeDStrategy,
    functional,
    speed_scheduler,
)
from speed_diffusers.schedulers import speed_scheduler_class
from speed_diffusers.settings import SPEED_DEFAULTS, SPEED_KEYS, SpeeDSettings
from speed_diffusers.timesteps import DENSITIES
from speed_diffusers.weightings import WEIGHTINGS

SPELLED_OUT = [SpeeDDDPMScheduler, SpeeDDDIMScheduler, SpeeDFlowMatchEulerDiscreteScheduler]


def process_of(**config: object) -> ForwardProcess:
    return ForwardProcess.from_scheduler(DDPMScheduler(**config))


def test_settings_of_the_paper() -> None:
    settings = SpeeDSettings.resolve(process_of())
    assert (settings.k, settings.tau, settings.lambda_, settings.tau_found) == (5.0, 700, 0.6, True)


def test_given_tau_wins_over_r() -> None:
    settings = SpeeDSettings.resolve(process_of(), SpeeDOptions(tau=321))
    assert settings.tau == 321 and settings.tau_found


def test_process_that_starts_settled_keeps_one_step_before_tau() -> None:
    process = ForwardProcess(torch.tensor([0.999, 0.9995, 0.9999], dtype=torch.float64))
    assert process.first_settled_step(145) == 0
    assert SpeeDSettings.resolve(process).tau == 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ({"k": 0.99}, r"speed_k=0.99: must lie in \[1, 1e6\]"),
        ({"k": -5}, "speed_k=-5: "),
        ({"k": float("nan")}, "speed_k=nan: "),
        ({"k": float("inf")}, "speed_k=inf: "),
        ({"tau": 0}, r"speed_tau=0: must be a whole number in \[1, 1000\]"),
        ({"tau": 1001}, r"speed_tau=1001: .*\[1, 1000\]"),
        ({"tau": 7.5}, "speed_tau=7.5: must be a whole number"),
        ({"tau": float("nan")}, "speed_tau=nan: must be a whole number"),
        ({"tau": float("inf")}, "speed_tau=inf: must be a whole number"),
        ({"r": 1.0}, "speed_r=1.0: must be above 1"),
        ({"r": float("nan")}, "speed_r=nan: "),
        ({"r": float("inf")}, "speed_r=inf: "),
        ({"lambda_": 0.49}, r"speed_lambda=0.49: must lie in \[0.5, 1\]"),
        ({"lambda_": 5.0}, r"speed_lambda=5.0: must lie in \[0.5, 1\]"),
        ({"lambda_": float("nan")}, "speed_lambda=nan: "),
    ],
)
def test_numbers_outside_their_range_are_refused(number: dict[str, float], message: str) -> None:
    numbers = {"k": 5.0, "tau": None, "r": 145.0, "lambda_": 0.6} | number
    with pytest.raises(InputError, match=f"^{message}") as error:
        SpeeDSettings.resolve(process_of(), SpeeDOptions(**numbers))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [{"k": 1}, {"tau": 1}, {"tau": 1000}, {"lambda_": 0.5}, {"lambda_": 1.0}])
def test_ends_of_the_ranges_are_allowed(number: dict[str, float]) -> None:
    numbers = {"k": 5.0, "tau": None, "r": 145.0, "lambda_": 0.6} | number
    settings = SpeeDSettings.resolve(process_of(), SpeeDOptions(**numbers))  # type: ignore[arg-type]
    assert all(getattr(settings, name) == value for name, value in number.items())


def test_share_of_the_timesteps_as_tau() -> None:
    assert [
        SpeeDSettings.resolve(process_of(num_train_timesteps=t), SpeeDOptions(tau=0.7)).tau
        for t in (2, 10, 1000, 10_000)
    ] == [
        1,
        7,
        700,
        7000,
    ]
    assert SpeeDSettings.resolve(process_of(), SpeeDOptions(tau=1e-9)).tau == 1


def test_keys_and_defaults_are_the_papers() -> None:
    assert SPEED_DEFAULTS == {
        "speed_sampling": "asymmetric",
        "speed_weighting": "change_aware",
        "speed_k": 5.0,
        "speed_tau": None,
        "speed_r": 145.0,
        "speed_lambda": 0.6,
        "speed_draw": "independent",
        "speed_normalize_weights": False,
        "speed_anneal_start": 1.0,
        "speed_anneal_end": 1.0,
    }
    assert {key: name for key, name in SPEED_KEYS.items() if key != f"speed_{name}"} == {"speed_lambda": "lambda_"}


@pytest.mark.parametrize("scheduler", SPELLED_OUT)
def test_what_a_scheduler_spells_out_is_what_the_options_are(scheduler: type) -> None:
    parameters = inspect.signature(scheduler.__init__).parameters.values()
    spelled = {each.name: each.default for each in parameters if each.name.startswith("speed_")}
    assert spelled == SPEED_DEFAULTS and list(spelled) == list(SPEED_DEFAULTS)


@pytest.mark.parametrize("scheduler", [*SPELLED_OUT, speed_scheduler_class("PNDMScheduler")])
def test_the_docstring_of_a_scheduler_lists_every_option_once(scheduler: type) -> None:
    text = scheduler.__doc__ or ""
    assert re.findall(r"^        (speed_\w+): \S", text, re.M) == list(SPEED_KEYS)


def test_options_are_read_from_any_config() -> None:
    config = {"speed_lambda": 0.8, "speed_k": 3.0, "beta_start": 0.1, "speed_of_light": 3e8}
    options = SpeeDOptions.from_config(config, "v_prediction")
    assert options == SpeeDOptions(lambda_=0.8, k=3.0, prediction_type="v_prediction")
    with pytest.raises(InputError, match=r"^speed_lambda=2: must lie in \[0.5, 1\]\.$"):
        replace(options, lambda_=2)


# Functions of one's own


def decreasing(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """Unnormalised, unlike anything registered."""
    return torch.linspace(settings.k, 1.0, process.num_train_timesteps, dtype=torch.float64)


class Halved:
    """A weighting that is an object, which has no name of its own."""

    def __call__(self, process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
        return WEIGHTINGS["change_aware"].function(process, settings) / 2


@pytest.mark.parametrize("sampling", ["asymmetric", "uniform", "logit_normal:mean=0.5"])
@pytest.mark.parametrize("weighting", ["change_aware", "min_snr:gamma=3", "none"])
def test_functions_give_the_tables_of_their_names(sampling: str, weighting: str) -> None:
    density, weights = DENSITIES.parse(sampling), WEIGHTINGS.parse(weighting)

    def my_density(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
        return density(process, settings)

    def my_weights(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
        return weights(process, settings)

    schedule = {"alphas_cumprod": DDPMScheduler().alphas_cumprod, "k": 3.0, "normalize_weights": True}
    named = functional.speed_tables(**schedule, sampling=sampling, weighting=weighting)
    by_function = functional.speed_tables(**schedule, sampling=my_density, weighting=my_weights)
    assert torch.equal(by_function.pmf, named.pmf) and torch.equal(by_function.weights, named.weights)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_registered_function_is_as_good_as_its_name(name: str) -> None:
    process = process_of()
    named = SpeeDStrategy(process, SpeeDOptions(sampling=name))
    by_function = SpeeDStrategy(process, SpeeDOptions(sampling=DENSITIES[name].function))
    assert torch.equal(named.tables(0.5).pmf, by_function.tables(0.5).pmf)
    assert (named.is_loss_aware, named.needs_progress) == (by_function.is_loss_aware, by_function.needs_progress)
    draws = [
        functional.draw(strategy.tables(0.5), 64, torch.Generator().manual_seed(0))
        for strategy in (named, by_function)
    ]
    assert torch.equal(*draws)


def test_functions_that_nobody_has_registered() -> None:
    tables = functional.speed_tables(num_train_timesteps=10, k=4.0, sampling=decreasing, weighting=Halved())
    expected = torch.linspace(4.0, 1.0, 10, dtype=torch.float64)
    torch.testing.assert_close(tables.pmf, expected / expected.sum())
    whole = functional.speed_tables(num_train_timesteps=10, k=4.0)
    assert torch.equal(2 * tables.weights, whole.weights)
    assert "decreasing" not in DENSITIES


@pytest.mark.parametrize("key", ["speed_sampling", "speed_weighting"])
def test_a_scheduler_takes_names_only(key: str) -> None:
    message = rf"^{key}=<function decreasing at .*>: a scheduler's config holds names only; register the function"
    for make in (
        lambda: SpeeDDDPMScheduler(**{key: decreasing}),
        lambda: speed_scheduler(DDPMScheduler(), **{key: decreasing}),
    ):
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("lamda_", "lambda_"), ("sampleing", "sampling"), ("speed_k", None), ("lambda", "lambda_")]
)
def test_an_unknown_option_of_the_tables_names_the_nearest(name: str, nearest: str | None) -> None:
    hint = rf" Did you mean '{nearest}'\?" if nearest else ""
    with pytest.raises(InputError, match=rf"^Unknown SpeeD option '{name}'\.{hint}.* Allowed: anneal_end, .*"):
        functional.speed_tables(num_train_timesteps=10, **{name: 1})
