"""The worked examples of CONTRIBUTING.md do what it says, each pasted where it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
EXAMPLES = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in TEXT.split("\n## ")
    if "```python" in section
}

# Module that an example is pasted into, at its end or before the line given here, and a program that uses it.
PLACES = {
    "Adding a density": ("speed_diffusers/timesteps/position.py", None),
    "Adding a weighting": ("speed_diffusers/weightings/fixed.py", None),
    "Adding a metric": ("speed_diffusers/metrics/frechet.py", None),
    "Adding a feature extractor": ("speed_diffusers/metrics/extractors.py", None),
    "Adding an option": ("speed_diffusers/training/config.py", "    lr_warmup_steps: int"),
}

USES = {
    "Adding a density": """
from speed_diffusers import SpeeDDDPMScheduler, speed_scheduler
from speed_diffusers.training.config import TrainConfig
for scheduler in (SpeeDDDPMScheduler(), speed_scheduler({"_class_name": "FlowMatchHeunDiscreteScheduler"})):
    scheduler = speed_scheduler(scheduler, speed_sampling="change_proportional", speed_weighting="none")
    pmf, change = scheduler.speed_tables.pmf, scheduler.speed_strategy.process.change
    assert abs(pmf - change / change.sum()).max() < 1e-12 and len(scheduler.sample_timesteps(8)) == 8
assert "change_proportional: Each timestep as often" in help_text(TrainConfig, None)
""",
    "Adding a weighting": """
from speed_diffusers import SpeeDDDPMScheduler
from speed_diffusers.errors import InputError
scheduler = SpeeDDDPMScheduler(speed_weighting="snr_power:power=1", prediction_type="sample")
assert abs(scheduler.speed_tables.weights - 1).max() < 1e-9, "SNR^-1 on epsilon is 1 on x_0"
try:
    SpeeDDDPMScheduler(speed_weighting="snr_power:power=3")
except InputError as error:
    assert "power=3 must be in [0, 2]" in str(error), error
else:
    raise AssertionError
""",
    "Adding a metric": """
import torch
from speed_diffusers.metrics import METRICS, Reference, Samples, statistics_of
from speed_diffusers.train_scripts.evaluate import EvaluateConfig
features = torch.randn(10, 3)
shifted = statistics_of([features + torch.tensor([3.0, 4.0, 0.0])])
samples = Samples(features, statistics_of([features]), None, None, Reference("r", "", shifted, None))
assert abs(METRICS["mean_distance"].function(samples)["mean_distance"] - 5) < 1e-5
assert "mean_distance" in EvaluateConfig().metrics and "mean_distance" in help_text(EvaluateConfig, None)
""",
    "Adding a feature extractor": """
import torch
from speed_diffusers.metrics import load_extractor
features, logits = load_extractor("mean_colour")(torch.full((2, 3, 4, 4), 0.5))
assert logits is None and torch.equal(features, torch.full((2, 3), 0.5))
""",
    "Adding an option": """
from pathlib import Path
from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.training.config import TrainConfig
argv = ["lr_num_cycles=3", "lr_scheduler=cosine_with_restarts"]
assert load_config(TrainConfig, argv, Path("train_scripts")).lr_num_cycles == 3
assert "lr_num_cycles: a whole number in [1, inf), default 1" in help_text(TrainConfig, None)
try:
    load_config(TrainConfig, ["lr_num_cycles=0"], Path("train_scripts"))
except InputError as error:
    assert str(error) == "lr_num_cycles=0: must be at least 1.", error
else:
    raise AssertionError
""",
}

# A finder that gives modules of the library another source, so that nothing is written into the checkout; then each
# use, and what went wrong in which.
PASTED = """
import importlib.abc, importlib.machinery, importlib.util, json, sys, traceback

class Pasted(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        return self.source_to_code(SOURCES[name].encode(), self.path)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in SOURCES:
            return importlib.util.spec_from_file_location(name, FILES[name], loader=Pasted(name, FILES[name]))

sys.meta_path.insert(0, Finder())
from speed_diffusers.config.schema import help_text

wrong = {}
for section, use in USES.items():
    try:
        exec(use, {"help_text": help_text})
    except Exception:
        wrong[section] = traceback.format_exc()
print(json.dumps(wrong))
"""


def test_every_example_has_its_place_and_use() -> None:
    assert EXAMPLES.keys() == PLACES.keys() == USES.keys()
    assert all(len(examples) == 1 for examples in EXAMPLES.values())
    assert len({file for file, _ in PLACES.values()}) == len(PLACES), "each is pasted into a file of its own"


def test_each_example_is_one_edit_in_one_place() -> None:
    sources, files = {}, {}
    for section, (example,) in EXAMPLES.items():
        file, before = PLACES[section]
        source = (ROOT / file).read_text("utf-8")
        if before is None:
            source += f"\n\n{example}"
        else:
            assert source.count(before) == 1
            source = source.replace(before, f"    {example.strip()}\n{before}")
        module = file.removesuffix(".py").replace("/", ".")
        sources[module], files[module] = source, str(ROOT / file)
    program = f"SOURCES, FILES, USES = {sources!r}, {files!r}, {USES!r}\n{PASTED}"
    # In a process of its own, so that no other test meets the new names.
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    wrong = json.loads(run.stdout.splitlines()[-1])
    assert wrong == {}, "\n".join(f"{section}: {trace}" for section, trace in wrong.items())
