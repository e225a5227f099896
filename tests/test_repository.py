"""What must hold for the repository as a whole: docstrings, versions, citation, configuration files."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import speed_diffusers

ROOT = Path(__file__).resolve().parent.parent
LIBRARY_FILES = sorted(path for top in ("speed_diffusers", "pipelines") for path in (ROOT / top).rglob("*.py"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(paths: list[Path]) -> list[object]:
    """The paths as test parameters with readable ids."""
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def undocumented(path: Path) -> list[str]:
    """Public functions, classes and methods of a file that have no docstring, and the module itself."""

    def visit(node: ast.Module | ast.ClassDef | Function, name: str) -> Iterator[str]:
        if ast.get_docstring(node) is None:
            yield name
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
                    yield from visit(child, f"{name}.{child.name}")

    return list(visit(ast.parse(path.read_text("utf-8")), path.stem))


@pytest.mark.parametrize("path", relative(LIBRARY_FILES))
def test_everything_public_in_the_library_has_a_docstring(path: Path) -> None:
    # A protocol's methods are described by the protocol.
    protocols = re.findall(r"^class (\w+)\(.*\bProtocol\b.*\):", path.read_text("utf-8"), re.MULTILINE)
    missing = [name for name in undocumented(path) if not any(f".{protocol}." in name for protocol in protocols)]
    assert missing == []


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == speed_diffusers.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", changelog, re.MULTILINE)
    assert newest is not None, "CHANGELOG.md has no '## VERSION' heading"
    assert newest.group(1) == speed_diffusers.__version__


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2405.17403" in paper["url"]
    assert len(paper["authors"]) == 9


def test_install_files_ask_for_the_training_extra() -> None:
    assert (ROOT / "requirements.txt").read_text("utf-8") == "-e .[train]\n"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert [part for part in environment["dependencies"] if isinstance(part, dict)] == [{"pip": ["-e .[train]"]}]


def test_accelerate_configs_are_the_promised_ones() -> None:
    names = {path.stem for path in ACCELERATE_CONFIGS}
    assert names == {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2"}


@pytest.mark.parametrize("path", relative(ACCELERATE_CONFIGS))
def test_accelerate_config_is_understood_and_explained(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises on a key that accelerate does not know
    # -1: not given, so accelerate asks for --num_processes instead of leaving GPUs idle.
    assert config.num_processes == {"multi_gpu": -1, "fsdp2": -1, "multi_node": 16}.get(path.stem, 1)
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.search(r"\S  +# \w", line)] == [], "every key needs a comment"


def test_fsdp_wraps_the_blocks_of_dit() -> None:
    from diffusers import DiTTransformer2DModel

    config = load_config_from_file(str(ROOT / "accelerate_configs" / "fsdp2.yaml"))
    dit = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=4, num_layers=1, sample_size=2)
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == type(dit.transformer_blocks[0]).__name__


def test_cpu_config_lets_torch_use_every_core(tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text("import os, torch\nprint(os.environ['ACCELERATE_USE_CPU'], torch.get_num_threads())\n")
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    # accelerate counts cores only where nobody has chosen a number of threads.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [*launcher, "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", str(psutil.cpu_count(logical=False))]
