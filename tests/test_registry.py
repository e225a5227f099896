"""Registries and the one-line errors for unknown names."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from noise_schedules import process_named
from range_ends import range_ends
from speed_diffusers.errors import InputError, unknown_name
from speed_diffusers.presets import PRESETS
from speed_diffusers.process import ForwardProcess
from speed_diffusers.registry import Parameter, Registry, markdown_table
from speed_diffusers.settings import SpeeDOptions, SpeeDSettings
from speed_diffusers.strategy import SpeeDStrategy
from speed_diffusers.timesteps import DENSITIES, DRAWS, timestep_pmf
from speed_diffusers.weightings import WEIGHTINGS, timestep_weights


def fruit_registry() -> Registry:
    registry: Registry = Registry("fruit")

    @registry.register("pear", summary="Green.", reference="orchard")
    def pear() -> str:
        return "a pear"

    @registry.register("apple", summary="Red.", reference="orchard")
    def apple() -> str:
        return "an apple"

    return registry


def test_registry_is_a_mapping_in_order_of_registration() -> None:
    registry = fruit_registry()
    assert list(registry) == ["pear", "apple"]
    assert len(registry) == 2
    assert "pear" in registry and "plum" not in registry and 3 not in registry
    assert registry["pear"].function() == "a pear"
    assert (registry["apple"].summary, registry["apple"].reference) == ("Red.", "orchard")


def test_a_name_is_registered_once() -> None:
    registry = fruit_registry()
    with pytest.raises(ValueError, match="fruit 'pear' is registered already"):
        registry.register("pear", summary="", reference="")(lambda: "another")
    assert registry["pear"].function() == "a pear"


def test_decorated_function_stays_callable_under_its_own_name() -> None:
    registry = fruit_registry()

    @registry.register("fig", summary="", reference="")
    def fig(number: int) -> int:
        return number + 1

    assert fig(1) == 2 and registry["fig"].function is fig


def test_unknown_name_gives_the_nearest_and_all_allowed() -> None:
    with pytest.raises(InputError) as error:
        fruit_registry()["aple"]
    assert str(error.value) == "Unknown fruit 'aple'. Did you mean 'apple'? Allowed: apple, pear."


def test_name_unlike_any_other_gets_no_suggestion() -> None:
    assert str(unknown_name("fruit", "xyzzy", ["pear", "apple"])) == "Unknown fruit 'xyzzy'. Allowed: apple, pear."


def test_name_of_another_type_is_an_input_error() -> None:
    assert str(unknown_name("fruit", None, ["pear"])) == "Unknown fruit 'None'. Allowed: pear."


def test_input_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Unknown fruit"):
        raise unknown_name("fruit", "x", ["pear"])


SIZE = Parameter("size", 2.0, "(0, 10]", "how big")
COUNT = Parameter("count", 3, "[1, inf)", "how many", True)


def basket_registry() -> Registry:
    registry: Registry = Registry("basket")

    @registry.register("plain", summary="Empty.", reference="attic")
    def plain(where: str) -> str:
        return where

    @registry.register("full", summary="Not | empty.", reference="shop", parameters=(SIZE, COUNT))
    def full(where: str, *, size: float, count: float) -> str:
        return f"{count:g} of {size:g} {where}"

    return registry


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("full", {"size": 2.0, "count": 3.0}),
        ("full:size=7.5", {"size": 7.5, "count": 3.0}),
        ("full:count=1,size=1e-3", {"size": 1e-3, "count": 1.0}),
        (" full : size = 10 , count = 4 ", {"size": 10.0, "count": 4.0}),
        ("plain", {}),
    ],
)
def test_choice_is_a_name_with_values_for_every_parameter(text: str, arguments: dict[str, float]) -> None:
    choice = basket_registry().parse(text)
    assert (choice.name, choice.arguments) == (text.split(":")[0].strip(), arguments)
    assert basket_registry().parse(str(choice)).arguments == arguments
    assert choice.entry.function("here", **choice.arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fall:size=1", "Unknown basket 'fall'. Did you mean 'full'? Allowed: full, plain."),
        ("full:sise=1", "Unknown parameter of the basket 'full' 'sise'. Did you mean 'size'? Allowed: count, size."),
        ("full:size=0", "basket 'full:size=0': size=0 must be in (0, 10] (how big)."),
        ("full:size=10.1", "basket 'full:size=10.1': size=10.1 must be in (0, 10] (how big)."),
        ("full:size=nan", "basket 'full:size=nan': size=nan must be in (0, 10] (how big)."),
        ("full:count=inf", "basket 'full:count=inf': count=inf must be a whole number in [1, inf) (how many)."),
        ("full:count=1.5", "basket 'full:count=1.5': count=1.5 must be a whole number in [1, inf) (how many)."),
        ("full:size=big", "basket 'full:size=big': size=big is not a number."),
        ("full:size=1,size=2", "basket 'full:size=1,size=2': 'size' is given twice."),
        ("full:size", "basket 'full:size': cannot read 'size'; the form is 'full:size=2,count=3'."),
        ("full:", "basket 'full:': cannot read ''; the form is 'full:size=2,count=3'."),
        ("full:size=1,", "basket 'full:size=1,': cannot read ''; the form is 'full:size=2,count=3'."),
        ("plain:size=1", "basket 'plain:size=1': 'plain' has no parameters."),
        (7, "Unknown basket '7'. Allowed: full, plain."),
        (None, "Unknown basket 'None'. Allowed: full, plain."),
    ],
)
def test_bad_choice_is_one_line_with_what_is_allowed(text: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        basket_registry().parse(text)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ((), r"takes \['size'\], which are not its parameters"),
        ((COUNT,), r"takes \['size'\], which are not its parameters"),
        ((Parameter("size", 11.0, "(0, 10]", ""),), "has a default outside its range"),
    ],
)
def test_registration_and_signature_must_agree(parameters: tuple[Parameter, ...], message: str) -> None:
    registry = basket_registry()
    with pytest.raises(ValueError, match=message):

        @registry.register("third", summary="", reference="", parameters=parameters)
        def third(where: str, *, size: float) -> str:
            return where

    assert "third" not in registry


def test_table_lists_every_entry_with_parameters_ranges_and_source() -> None:
    assert markdown_table(basket_registry()).splitlines() == [
        "| name | what it does | parameters | source |",
        "|---|---|---|---|",
        "| `plain` | Empty. |  | attic |",
        "| `full` | Not \\| empty. | `size=2` in (0, 10]: how big<br>`count=3` in whole numbers of [1, inf): how many "
        "| shop |",
    ]


@pytest.mark.parametrize("registry", [DENSITIES, WEIGHTINGS, DRAWS], ids=["densities", "weightings", "draws"])
def test_every_entry_says_what_it_is_and_where_it_comes_from(registry: Registry) -> None:
    for name, entry in registry.items():
        assert entry.summary.endswith(".") and "\n" not in entry.summary, name
        assert len(entry.summary) < 120, name
        assert entry.reference, name
        assert entry.function.__doc__, name
        assert all(parameter.meaning for parameter in entry.parameters), name


@pytest.mark.parametrize("registry", [DENSITIES, WEIGHTINGS], ids=["densities", "weightings"])
def test_every_parameter_is_refused_outside_its_range(registry: Registry) -> None:
    for name, entry in registry.items():
        for parameter in entry.parameters:
            low, high = (float(end) for end in parameter.interval[1:-1].split(","))
            outside = [low - 1.0, *([low] if parameter.interval[0] == "(" else [])]
            outside += [] if high == float("inf") else [high + 1.0]
            for value in outside:
                with pytest.raises(InputError) as error:
                    registry.parse(f"{name}:{parameter.name}={value}")
                assert parameter.interval in str(error.value) and "\n" not in str(error.value)


def test_every_density_and_weighting_is_sound_on_one_process() -> None:
    from diffusers import DDPMScheduler

    process = ForwardProcess.from_scheduler(DDPMScheduler())
    settings = SpeeDSettings.resolve(process)
    for name in DENSITIES:
        pmf = timestep_pmf(name, process, settings)
        assert pmf.shape == (1000,) and bool((pmf > 0).all()), name
        assert float(pmf.sum()) == pytest.approx(1.0, abs=1e-12), name
    for name in WEIGHTINGS:
        weights = timestep_weights(name, process, settings)
        assert weights.shape == (1000,) and bool((weights >= 0).all()), name


process_of = cache(process_named)
# Processes on which everything is defined, and what a network may predict on them.
VARIANCE_PRESERVING, FLOW = ("epsilon", "v_prediction", "sample"), ("flow_prediction",)
SWEPT = {
    "linear": VARIANCE_PRESERVING,
    "linear, T=10": VARIANCE_PRESERVING,
    "cosine, zero terminal SNR": VARIANCE_PRESERVING,
    "flow, shift 3": FLOW,
}


def choices_at_the_ends(name: str, parameters: tuple[Parameter, ...]) -> Iterator[tuple[str, int]]:
    """Choices with every parameter at its default or an end of its range, and how many are not at their default."""
    values = [[p.default, *range_ends(p.interval, int if p.whole else float)] for p in parameters]
    for combined in itertools.product(*values):
        changed = {p.name: value for p, value in zip(parameters, combined, strict=True) if value != p.default}
        given = ",".join(f"{key}={value!r}" for key, value in changed.items())
        yield (f"{name}:{given}" if given else name), len(changed)


def fault_of_density(pmf: Tensor) -> str | None:
    if not bool(torch.isfinite(pmf).all()) or bool((pmf < 0).any()):
        return "not finite or negative"
    return None if abs(float(pmf.sum()) - 1.0) < 1e-9 else f"sums to {float(pmf.sum())}"


def fault_of_weights(weights: Tensor) -> str | None:
    used = weights.float()  # as a loss takes them
    if not bool(torch.isfinite(used).all()) or bool((used < 0).any()):
        return "not finite or negative"
    return None if bool((used > 0).any()) else "all 0"


@pytest.mark.parametrize(
    ("registry", "name"),
    [(registry, name) for registry in (DENSITIES, WEIGHTINGS) for name in registry],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_value_inside_the_ranges_is_sound(
    registry: Registry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry with one parameter at an end of its range is sound everywhere; with several it is, or is refused."""
    caplog.set_level(logging.ERROR)  # that a schedule never settles is no news here
    faults = []
    for (schedule, predictions), (text, changed) in itertools.product(
        SWEPT.items(), choices_at_the_ends(name, registry[name].parameters)
    ):
        for predicted in predictions:
            process = process_of(schedule)
            settings = replace(SpeeDSettings.resolve(process, SpeeDOptions(prediction_type=predicted)), progress=1.0)
            try:
                if registry is DENSITIES:
                    fault = fault_of_density(timestep_pmf(text, process, settings))
                else:
                    fault = fault_of_weights(timestep_weights(text, process, settings))
            except InputError as error:
                empty = name == "range_bias" and "no timestep" in str(error)
                undefined = name == "t_sample" and "the pivot of the authors' code does not exist" in str(error)
                assert "\n" not in str(error)
                fault = None if changed > 1 or empty or undefined else str(error)
            if fault:
                faults.append(f"{text} on {schedule}, {predicted}: {fault}")
    assert faults == []


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (option, name)
        for option, registry in (("sampling", DENSITIES), ("weighting", WEIGHTINGS))
        for name, entry in registry.items()
        if entry.learns
    ],
)
def test_what_learns_stays_sound_at_the_ends_of_its_ranges(option: str, name: str) -> None:
    process = process_of("linear, T=10")
    errors = torch.tensor([0.0, 1e30, 1e-30, *[1.0] * 6, torch.inf], dtype=torch.float64)
    faults = []
    registry = {"sampling": DENSITIES, "weighting": WEIGHTINGS}[option]
    for text, _ in choices_at_the_ends(name, registry[name].parameters):
        strategy = SpeeDStrategy(process, SpeeDOptions(**{"weighting": "none", option: text}))  # type: ignore[arg-type]
        for _ in range(1001 if "history=1000" in text else 11):  # until it has seen enough to leave uniform draws
            strategy.update(errors.nan_to_num(posinf=1.0), torch.ones(10))
        strategy.update(errors, torch.ones(10))
        tables = strategy.latest_tables
        fault = fault_of_density(tables.pmf) or fault_of_weights(tables.weights)
        faults += [f"{text}: {fault}"] if fault else []
    assert faults == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "p2:k=1e-9,gamma=10"}, "speed_weighting='p2:k=1e-09,gamma=10': the weights run from "),
        ({"weighting": lambda process, settings: -torch.ones(1000)}, "the weights run from -1 to -1; in float32"),
        (
            {"sampling": lambda process, settings: torch.zeros(1000)},
            "the probabilities run from nan to nan; they must be",
        ),
        (
            {"sampling": lambda process, settings: torch.full((1000,), torch.nan)},
            "the probabilities run from nan to nan",
        ),
    ],
)
def test_tables_that_train_nothing_are_refused_whoever_made_them(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        SpeeDStrategy(process_of("cosine, zero terminal SNR"), SpeeDOptions(**options))  # type: ignore[arg-type]
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_0_wherever_one_draws_have_no_mean_to_scale_by() -> None:
    options = SpeeDOptions(sampling="gaussian:mean=-20,std=1e-6", lambda_=1.0, normalize_weights=True)
    with pytest.raises(InputError, match="speed_weighting='change_aware': the weights run from nan to nan"):
        SpeeDStrategy(process_of("linear"), options)


def test_presets_name_registered_functions() -> None:
    assert set(PRESETS) >= {"paper", "uniform"}
    for preset in PRESETS.values():
        DENSITIES.parse(preset["speed_sampling"])
        WEIGHTINGS.parse(preset["speed_weighting"])
        assert preset.get("speed_draw", "independent") in DRAWS


def test_presets_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        PRESETS["paper"] = {}  # type: ignore[index]
