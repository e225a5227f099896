"""The notebooks run from the first cell to the last in a real kernel, and are committed without outputs."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


SHORTER = {
    "max_train_steps=60": "max_train_steps=20",
    "max_train_samples=2000": "max_train_samples=200",
    "num_score_images=None": "num_score_images=None num_inference_steps=4",
    "for _ in range(60)": "for _ in range(30)",
}
"""What the quick form of the test runs instead; the nightly one runs what is committed."""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SHORTER, pytest.param({}, marks=pytest.mark.nightly)], ids=["shorter", "whole"])
def test_the_quickstart_runs(changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell cell finds `accelerate` and `python` where a user's would: in the environment of the kernel.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for old, new in changes.items():
        changed = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        assert changed, old
        for cell in changed:
            cell.source = cell.source.replace(old, new)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises where a cell does, shell cells too
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name in ("generate", "samples", "plot", "compare"):
        assert any("image/png" in output.get("data", {}) for output in outputs[name]), name
    areas, losses = (
        "".join(output.text for output in outputs[name] if output.output_type == "stream") for name in ("areas", "own")
    )
    assert re.findall(r"^ *(\w+): timesteps", areas, re.MULTILINE) == ["acceleration", "deceleration", "convergence"]
    first, last = map(float, re.findall(r"\d\.\d+", losses))
    assert last < 0.5 * first
    for run in ("speed", "uniform"):
        assert (tmp_path / "runs" / run / "pipeline" / "model_index.json").is_file()
