"""docs/strategies.md says what the registries say, and its examples run; no call waits for a device."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from speed_diffusers.timesteps import DENSITIES, DRAWS
from speed_diffusers.training.profiling import OperationCounter
from speed_diffusers.weightings import WEIGHTINGS

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = (ROOT / "docs" / "strategies.md").read_text("utf-8")
BENCHMARK = load("benchmarks/timestep_calls.py")


@pytest.mark.filterwarnings("ignore")
def test_the_tables_are_what_the_code_makes() -> None:
    maker = load("docs/make_strategies.py")
    assert set(re.findall(r"<!-- made: (\w+) -->", PAGE)) == set(maker.MADE)
    assert maker.with_tables(PAGE) == PAGE, "run: python docs/make_strategies.py"
    assert maker.with_tables(PAGE.replace("0.69%", "0.70%")) == PAGE


def test_everything_registered_is_on_the_page() -> None:
    for registry in (DENSITIES, WEIGHTINGS, DRAWS):
        assert all(f"| `{name}` |" in PAGE for name in registry)


def test_the_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/strategies.md", "exec"), {})


@pytest.mark.parametrize("label", BENCHMARK.strategies())
def test_no_call_waits_for_the_device(label: str) -> None:
    assert BENCHMARK.host_syncs(BENCHMARK.scheduler_of(BENCHMARK.strategies()[label])) == 0


@pytest.mark.parametrize(
    "call",
    [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: bool(x.any())],
)
def test_the_count_sees_a_call_that_waits(call: object) -> None:
    with OperationCounter() as counter, pytest.raises((RuntimeError, NotImplementedError)):
        call(torch.ones(4, device="meta"))  # type: ignore[operator]
    assert counter.host_waits.total() >= 1


def test_the_benchmark_has_a_row_for_everything() -> None:
    rows = BENCHMARK.strategies()
    for kind, registry in (("sampling", DENSITIES), ("weighting", WEIGHTINGS), ("draw", DRAWS)):
        assert {f"{kind} {name}" for name in registry} <= set(rows)
