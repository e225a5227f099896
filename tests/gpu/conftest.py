"""Shared by the tests that need a GPU: which device they run on, and runs of the trainer that are ready to step."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_units import TESTS_DEVICE
from latent_runs import forget_the_last_run, latent_run_config
from speed_diffusers.training.config import TrainConfig


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU; or what an environment variable names, so that the tests can be tried where there is none."""
    name = os.environ.get(TESTS_DEVICE, "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    forget_the_last_run()
    # Float32 as it is, unless a run is told otherwise.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(name)
    forget_the_last_run()


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for what a CPU has nothing of."""
    if device.type != "cuda":
        pytest.skip("a CPU has nothing of the kind")
    return device


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of autoencoder and cached latents for all tests."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def model(device: torch.device) -> str:
    """A small network, with 256 tokens an image as DiT-XL/2 has; on a CPU with fewer."""
    return "DiT-tiny/2" if device.type == "cuda" else "DiT-tiny/8"


@pytest.fixture
def run_config(work_dir: Path, tmp_path: Path, model: str) -> Callable[..., TrainConfig]:
    """Options of a small run on latents of 4x32x32: `run_config(**options)`."""

    def config(**options: Any) -> TrainConfig:
        small = {"model": model, "train_batch_size": 8, "max_train_samples": 32, "output_dir": str(tmp_path / "run")}
        return latent_run_config(work_dir, **small | options)

    return config
