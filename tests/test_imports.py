"""Imports go one way: scripts -> library, and inside the library objective -> schedulers -> ... -> errors.

The rules are tables at the top of this file. A new module of the library fails here until it is given its place.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "speed_diffusers"

# What computes SpeeD: usable in anybody's training loop. A room imports lower ones only, never its own height.
HEART = {
    "errors": 0,
    "presets": 0,
    "registry": 1,
    "process": 2,
    "settings": 3,
    "predictions": 3,
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

# What surrounds it, with the rooms of the library that each must not know. The heart never imports any of these.
ROOMS: dict[str, set[str]] = {
    "randomness": set(HEART) - {"errors"},
    "ema": set(HEART) - {"errors"},
    "error_bins": set(HEART) - {"errors"},
    "feedback": set(HEART) - {"errors"},
    "draws": {"objective", "models"},
    "embedded": set(HEART),
    "data": {"objective", "schedulers"},
    "config": {"objective"},
    "train_config": set(),
    "metrics": {"objective"},
    "plots": {"objective"},
    "strategy_plot": {"objective", "models", "schedulers"},
    "training_cost": set(HEART) - {"errors"},
    "profiling": set(HEART) - {"errors"},
    "flops": set(HEART) - {"errors"},
    # Stands at the top of the repository and is installed inside the library, of which it imports nothing.
    "pipelines": set(),
    "sampling": {"objective"},
    "samplers": set(HEART) - {"errors", "registry"},
    "checkpoints": {"objective"},
    "checkpoint_folders": set(HEART) - {"errors"},
    "export": {"objective"},
    "guard": set(HEART) - {"errors"},
    "tracking": {"objective"},
    "hub": {"objective"},
}

# Packages by import name, with the name under which setup.py requires them. The heart works with the core alone.
CORE = {name: name for name in ("torch", "diffusers", "numpy", "safetensors", "huggingface_hub")}
TRAIN = {name: name for name in ("accelerate", "datasets", "filelock", "matplotlib", "omegaconf", "pyarrow", "tqdm")}
TRAIN |= {"PIL": "pillow", "yaml": "pyyaml"}
EVAL = {"cleanfid": "clean-fid", "scipy": "scipy"}
ANY_EXTRA = {*CORE, *TRAIN, *EVAL}
PIPELINE = {"torch", "diffusers"}
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
    package = module if is_package else module.rpartition(".")[0]
    top, room, *_ = [*module.split("."), ""]
    names = imported_names(source, package)
    if top == LIBRARY:
        complaints = {_complaint(room, name) for name in names}
    elif top == "pipelines":
        # A pipeline is a file to be used by itself, so only the package's list of them may import its files.
        complaints = {_outside_complaint(name, PIPELINE | ({top} if is_package else set())) for name in names}
    else:
        # A script sees its neighbours by their bare names, because Python puts its folder on the path.
        neighbours = {path.stem for path in (ROOT / "train_scripts").glob("*.py")}
        complaints = {_outside_complaint(name, ANY_EXTRA | {LIBRARY} | neighbours) for name in names}
    return sorted(f"{module}: {complaint}" for complaint in complaints if complaint)


def _complaint(room: str, name: str) -> str | None:
    """What is wrong with a module of the library's `room` importing `name`; the package itself is room ""."""
    if name.split(".")[0] != LIBRARY:
        return _outside_complaint(name, set(CORE) if room in HEART else ANY_EXTRA)
    target = [*name.split("."), ""][1]
    if room in ("", target) or target == "__version__":
        return None
    if target not in HEART and target not in ROOMS:
        return f"imports {name}; inside the library import from the room that defines the name"
    if room in HEART and target in ROOMS:
        return f"imports {name}; {room} may not know {target}"
    if room in HEART and HEART[target] >= HEART[room]:
        return f"imports {name}; {target} is not below {room}"
    if room in ROOMS and target in ROOMS[room]:
        return f"imports {name}; {room} may not know {target}"
    return None


def _outside_complaint(name: str, allowed: set[str]) -> str | None:
    """What is wrong with importing the top-level package of `name` from outside this library."""
    top = name.split(".")[0]
    if top in allowed or top in PYTHON:
        return None
    return f"imports {name}; only the standard library and {', '.join(sorted(allowed))} are allowed here"


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the library, the scripts and the pipelines."""
    found = []
    for top in (LIBRARY, "train_scripts", "pipelines"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), [pytest.param(name, path, id=name) for name, path in modules()])
def test_module_imports_only_what_its_room_may(module: str, path: Path) -> None:
    source = path.read_text("utf-8")
    assert forbidden_arrows(source, module, is_package=path.name == "__init__.py") == []


def test_every_module_of_the_library_has_its_place() -> None:
    rooms = {name.split(".")[1] for name, _ in modules() if name.startswith(f"{LIBRARY}.")}
    assert rooms - set(HEART) - set(ROOMS) == set(), "give the new room its place in HEART or ROOMS"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("speed_diffusers.process", "from .timesteps import DENSITIES"),
        ("speed_diffusers.process", "from speed_diffusers.registry import Registry\nfrom . import schedulers"),
        ("speed_diffusers.errors", "from .registry import Registry"),
        ("speed_diffusers.timesteps", "from .weightings import WEIGHTINGS"),
        ("speed_diffusers.weightings", "def late():\n    from .schedulers.mixin import SpeeDSchedulerMixin"),
        ("speed_diffusers.schedulers.ddpm", "from ..objective import denoising_loss"),
        ("speed_diffusers.schedulers.ddpm", "from .. import models"),
        ("speed_diffusers.objective", "import speed_diffusers.data.images"),
        ("speed_diffusers.models", "from .schedulers import SpeeDDDPMScheduler"),
        ("speed_diffusers.data.images", "from speed_diffusers import SpeeDDDPMScheduler"),
        ("speed_diffusers.data.images", "import train_scripts.train_dit_speed"),
        ("speed_diffusers.metrics.features", "from train_scripts import train_dit_speed"),
        ("speed_diffusers.models", "import accelerate"),
        ("speed_diffusers.timesteps", "def late():\n    import yaml"),
        ("speed_diffusers.sampling", "import pandas"),
        ("pipelines.pipeline_dit", "from speed_diffusers import SpeeDDDPMScheduler"),
        ("pipelines.pipeline_dit", "import accelerate"),
        ("pipelines.pipeline_dit", "from .pipeline_dit_speed import SpeeDDiTPipeline"),
        ("speed_diffusers.models", "from .pipelines import SpeeDDiTPipeline"),
        ("train_scripts.sample", "import pandas"),
    ],
)
def test_the_checker_sees_forbidden_arrows(module: str, source: str) -> None:
    assert forbidden_arrows(source, module)


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
    assert {*CORE.values(), *TRAIN.values(), *EVAL.values()} - required == set()


def test_library_imports_without_the_training_packages() -> None:
    settings = f"TRAIN = {set(TRAIN)!r}\nHEART = {list(HEART)!r}\n"
    run = subprocess.run(
        [sys.executable, "-c", settings + IMPORT_WATCHED], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("imported")
