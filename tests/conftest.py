"""Shared by all tests: no network, one thread, scripts importable, tiny real parts."""

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# What torch, diffusers and all tests keep in memory is gone through less often; it took a twelfth of the time.
gc.set_threshold(50_000, 20, 20)

# Before any import that reads them: caches in a folder of this process, no telemetry, no Hub.
CACHES = tempfile.TemporaryDirectory(prefix="speed_diffusers_tests_")
os.environ["HF_DATASETS_CACHE"] = CACHES.name
os.environ["HF_MODULES_CACHE"] = CACHES.name
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from PIL import Image  # noqa: E402

from forked import Forker, forking  # noqa: E402
from loopback_hub import LoopbackHub, running_hub  # noqa: E402
from nightly_result import NightlyResult  # noqa: E402
from tiny_pictures import save_dot  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets the outcome of the tests that take minutes be kept; see docs/reliability.md."""
    parser.addoption("--nightly-result", metavar="FILE", help="write the outcome of the tests marked nightly as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the outcome where it is asked for, by the process that collects it from the others."""
    file = config.getoption("--nightly-result")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(NightlyResult(Path(file)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two processes with two threads each stall one another on a small machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Starts scripts in processes of their own without the ten seconds that their imports take."""
    with forking() as made:
        yield made


@pytest.fixture
def fresh_accelerate() -> Callable[[], None]:
    """Lets a process set accelerate up anew: resets its state now, and again each time it is called."""

    def reset() -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()

    reset()
    return reset


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a real AutoencoderKL with few channels: 4 latent channels, factor 4, fixed weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 2 classes with 13 images each, 32x32."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for index in range(13):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of latents for all tests of a process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def error_map() -> None:
    """Asked for by a test of what a run draws of its errors; see `tiny_options`."""


@pytest.fixture
def tiny_options(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tiny_vae: Path,
    image_folder: Path,
    cache_dir: Path,
    tmp_path: Path,
) -> list[str]:
    """Command line of a run of 12 steps that takes a second or two: 26 images, batches of 4.

    Its map of errors is a dot: the picture of a user's run would take a third of that time.
    """
    if "error_map" not in request.fixturenames:
        from speed_diffusers.training import results

        monkeypatch.setattr(results, "save_error_map", save_dot)
    return [
        "config=quickstart/fashion_mnist",
        f"train_data_dir={image_folder}",
        "dataset_name=None",
        f"pretrained_vae_model_name_or_path={tiny_vae}",
        f"cache_dir={cache_dir}",
        f"output_dir={tmp_path / 'run'}",
        "model=DiT-tiny/4",
        "train_batch_size=4",
        "max_train_steps=12",
        "lr_warmup_steps=2",
        "logging_steps=1",
        "checkpointing_steps=5",
        "num_validation_images=2",
        "num_score_images=None",
        "num_inference_steps=2",
        "report_to=[]",
    ]


@pytest.fixture
def train(tiny_options: list[str], fresh_accelerate: Callable[[], None]) -> Callable[..., Path]:
    """Trains a tiny run in a folder, which it returns: `train(folder, *options)`; options replace those of the run."""
    from speed_diffusers.train_scripts import train_dit_speed

    def run(folder: Path, *options: str) -> Path:
        fresh_accelerate()
        given = {"output_dir", *(option.split("=")[0] for option in options)}
        kept = [option for option in tiny_options if option.split("=")[0] not in given]
        train_dit_speed.main([*kept, f"output_dir={folder}", *options])
        return folder

    return run


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub on this machine that the real client asks, in this process, with a token that may write."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from speed_diffusers.hub import upload

    home = tmp_path_factory.mktemp("huggingface")
    with running_hub() as server:
        # What the client reads from the environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setattr(sys.modules[upload.__module__], "SECONDS_BETWEEN_TRIES", (0.01, 0.01))
        disable_progress_bars()
        yield server
        enable_progress_bars()
