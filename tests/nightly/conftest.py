"""Shared by the tests that take minutes: runs whose files fail."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faulty_runs import RUN, FaultyRuns
from forked import forking
from speed_diffusers.models import build_dit, export_transformer
from tiny_run import DIT

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `file_faults.c` compiles to."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("faults") / "file_faults.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(library),
        str(HERE / "file_faults.c"),
    ]
    subprocess.run([*command, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def faulty_runs(
    fault_library: Path, tiny_vae: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultyRuns]:
    """Runs that can be made to fail, of a network so small that they take a second."""
    place = tmp_path_factory.mktemp("faulty")
    network = build_dit({**DIT, "sample_size": 8}, torch.Generator().manual_seed(0))
    export_transformer(network.transformer.config, network.state_dict()).save_pretrained(place / "network")
    options = [f"train_data_dir={image_folder}", "dataset_name=None", f"pretrained_vae_model_name_or_path={tiny_vae}"]
    options += [f"pretrained_model_name_or_path={place / 'network'}", "num_score_images=None", *RUN]
    with forking({"LD_PRELOAD": str(fault_library)}) as forker:
        yield FaultyRuns(forker, options, place)
