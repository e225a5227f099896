"""What must hold for the repository as a whole: proportions, docstrings, versions, configuration files."""

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
SCRIPT_FILES = sorted((ROOT / "train_scripts").rglob("*.py"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# One function may be longer: the training loop, which is to be read in one piece.
LOOP_FILE = ROOT / "train_scripts" / "train_dit_speed.py"
MAX_LOOP_LINES = 80

# Built from pieces, so that this file does not match itself.
FORBIDDEN_TEXT = {
    "a package registry's host": rb"\b(?:" + rb"py" + rb"pi\.org|python" + rb"hosted\.org|npm" + rb"js\.(?:org|com)"
    rb"|ana" + rb"conda\.org|deb\.debian" + rb"\.org|download\.py" + rb"torch\.org)\b",
    "a path of somebody's machine": rb"(?<![\w./-])/(?:" + rb"work|root|home/\w+|tmp/" + rb"dev)/",
    "an access token": rb"\b(?:hf_" + rb"[A-Za-z0-9]{20,}|gh" + rb"[pousr]_[A-Za-z0-9]{30,})\b",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def repository_files() -> list[Path]:
    """Files that are committed or would be, or a skip where there is no git checkout to ask."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def relative(paths: list[Path]) -> list[object]:
    """The paths as test parameters with readable ids."""
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length of every function of a file: lines from `def` to the end, without the docstring."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            yield node.name, lines


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


@pytest.mark.parametrize("path", relative(LIBRARY_FILES + SCRIPT_FILES))
def test_file_and_functions_keep_their_proportions(path: Path) -> None:
    num_lines = len(path.read_text("utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines; split the file"
    too_long = [(name, lines) for name, lines in functions(path) if lines > MAX_FUNCTION_LINES]
    if path == LOOP_FILE:
        assert len(too_long) <= 1, f"only the training loop may be this long: {too_long}"
        assert all(lines <= MAX_LOOP_LINES for _, lines in too_long), too_long
    else:
        assert too_long == []


@pytest.mark.parametrize("path", relative(LIBRARY_FILES))
def test_everything_public_in_the_library_has_a_docstring(path: Path) -> None:
    # A protocol's methods are described by the protocol.
    protocols = re.findall(r"^class (\w+)\(.*\bProtocol\b.*\):", path.read_text("utf-8"), re.MULTILINE)
    missing = [name for name in undocumented(path) if not any(f".{protocol}." in name for protocol in protocols)]
    assert missing == []


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN_TEXT[what])
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode(errors='replace')}"
        for path in repository_files()
        if (match := pattern.search(path.read_bytes()))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a package registry's host", "https://" + "py" + "pi.org/simple"),
        ("a path of somebody's machine", "see " + "/wo" + "rk/main/README.md"),
        ("a path of somebody's machine", '"/ho' + 'me/ada/data"'),
        ("an access token", "HF_TOKEN=hf" + "_" + "a1B2" * 8),
    ],
)
def test_the_search_finds_forbidden_text(what: str, text: str) -> None:
    assert re.search(FORBIDDEN_TEXT[what], text.encode())


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
