"""Registries and the one-line errors for unknown names."""

import pytest

from speed_diffusers.errors import InputError, unknown_name
from speed_diffusers.presets import PRESETS
from speed_diffusers.process import ForwardProcess, SpeeDSettings
from speed_diffusers.registry import Registry
from speed_diffusers.timesteps import DENSITIES, timestep_pmf
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


@pytest.mark.parametrize("registry", [DENSITIES, WEIGHTINGS], ids=["densities", "weightings"])
def test_every_entry_says_what_it_is_and_where_it_comes_from(registry: Registry) -> None:
    for name, entry in registry.items():
        assert entry.summary.endswith(".") and "\n" not in entry.summary, name
        assert len(entry.summary) < 120, name
        assert entry.reference, name
        assert entry.function.__doc__, name


def test_every_density_and_weighting_is_sound_on_one_process() -> None:
    from diffusers import DDPMScheduler

    process = ForwardProcess.from_scheduler(DDPMScheduler())
    settings = SpeeDSettings.resolve(process, k=5.0, tau=None, r=145.0, lambda_=0.6)
    for name in DENSITIES:
        pmf = timestep_pmf(name, process, settings)
        assert pmf.shape == (1000,) and bool((pmf > 0).all()), name
        assert float(pmf.sum()) == pytest.approx(1.0, abs=1e-12), name
    for name in WEIGHTINGS:
        weights = timestep_weights(name, process, settings)
        assert weights.shape == (1000,) and bool((weights >= 0).all()), name


def test_presets_name_registered_functions() -> None:
    assert set(PRESETS) >= {"paper", "uniform"}
    for preset in PRESETS.values():
        assert preset["speed_sampling"] in DENSITIES
        assert preset["speed_weighting"] in WEIGHTINGS


def test_presets_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        PRESETS["paper"] = {}  # type: ignore[index]
