"""The tables in docs/ are what docs/make_tables.py makes of the code; no call to a strategy waits for a device."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from speed_diffusers.generation import SAMPLERS
from speed_diffusers.metrics import METRICS
from speed_diffusers.process import ForwardProcess
from speed_diffusers.registry import Registry
from speed_diffusers.settings import SPEED_KEYS, SpeeDSettings
from speed_diffusers.timesteps import DENSITIES, DRAWS, timestep_pmf
from speed_diffusers.training.profiling import OperationCounter
from speed_diffusers.weightings import WEIGHTINGS

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load("docs/make_tables.py")
BENCHMARK = load("benchmarks/timestep_calls.py")
TEXTS = {page.name: page.read_text("utf-8") for page in MAKER.PAGES}
MARK = r"<!-- made: (\w+) -->"


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if re.search(MARK, text)])
@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_a_page_are_what_the_code_makes(page: str) -> None:
    assert MAKER.with_tables(TEXTS[page]) == TEXTS[page], "run: python docs/make_tables.py"


def test_the_committed_scores_are_the_libraries_to_a_thousandth() -> None:
    result = json.loads(MAKER.SCORE_LIBRARIES.read_text("utf-8"))
    for numbers in result["numbers"].values():
        assert numbers["speed_diffusers"] == pytest.approx(numbers["torch-fidelity"], rel=1e-3)
        # Of what torchmetrics does not draw otherwise.
        for name in ("fid", "kernel_distance"):
            assert numbers["speed_diffusers"][name] == pytest.approx(numbers["torchmetrics"][name], rel=1e-3)


def test_every_table_has_its_page() -> None:
    assert sorted(re.findall(MARK, "".join(TEXTS.values()))) == sorted(MAKER.MADE)


@pytest.mark.filterwarnings("ignore")
def test_a_stale_table_is_made_anew() -> None:
    page = TEXTS["scheduler.md"]
    stale = page.replace("| `145.0` |", "| `146.0` |")
    assert stale != page and MAKER.with_tables(stale) == page


@pytest.mark.parametrize(
    ("page", "registry"),
    [
        ("strategies.md", DENSITIES),
        ("strategies.md", WEIGHTINGS),
        ("strategies.md", DRAWS),
        ("scheduler.md", SPEED_KEYS),
        ("generation.md", SAMPLERS),
        ("scoring.md", METRICS),
    ],
)
def test_every_name_is_on_its_page(page: str, registry: Registry[object]) -> None:
    assert [name for name in registry if f"| `{name}` |" not in TEXTS[page]] == []


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


@pytest.mark.parametrize("recipe", MAKER.RECIPES)
def test_equal_settings_are_equal_and_go_the_way_that_the_page_says(recipe: str) -> None:
    process = ForwardProcess.rectified_flow(1000)
    (row,) = (line for line in MAKER.equal_settings_table().splitlines() if line.startswith(f"| {recipe} |"))
    choices = re.findall(r"`([a-z_]+:[^`]+)`", row)
    assert [choice.split(":")[0] for choice in choices] == ["gaussian", "logit_normal", "edm"]
    settings = SpeeDSettings.resolve(process)
    first, *others = (timestep_pmf(choice, process, settings) for choice in choices)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=0)
    # diffusers' scripts draw u and take entry u T of a table that begins with the most noise.
    mean, std = map(float, re.findall(r"--logit_(?:mean|std) (\S+)", row.rstrip("`| ")))
    scheme = {"weighting_scheme": "logit_normal", "logit_mean": mean, "logit_std": std}
    u = compute_density_for_timestep_sampling(**scheme, batch_size=200_000, generator=torch.Generator().manual_seed(0))
    theirs = 999 - (u * 1000).long()
    assert float(theirs.double().mean()) == pytest.approx(float((first * torch.arange(1000)).sum()), abs=2.0)
