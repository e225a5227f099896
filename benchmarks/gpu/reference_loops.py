"""The training loops of facebookresearch/DiT and of fast-DiT, as they are written, one optimizer step at a time.

Both are under a non-commercial licence, so nothing of them is here: a checkout that the caller names is imported and
its `train.main` is run. What it takes from elsewhere is given to it: latents in memory and no autoencoder, or a folder
of images and an autoencoder, a folder for its results, and on a CPU what it asks of CUDA. Its model, diffusion,
optimizer, EMA, order of operations and its `loss.item()` in every step stay its own.

It runs on a thread of its own, which waits after each step until the next is asked for; so two loops can take turns in
one process.
"""

import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from speed_diffusers.errors import InputError
from speed_diffusers.models import DIT_SIZES, MODEL_NAMES

DIT, FAST_DIT = LOOPS = ("DiT", "fast-DiT")
REPOSITORIES = {DIT: "github.com/facebookresearch/DiT", FAST_DIT: "github.com/chuanyangjin/fast-DiT"}
README_PRECISION = {DIT: "no", FAST_DIT: "fp16"}
"""What the commands of their README files train with (both let float32 products round to TF32)."""

_MODULES = ("train", "models", "diffusion")
_SAMPLES, _LENGTH = 512, 200_000


class _Stop(Exception):
    """Ends a loop between two steps."""


@dataclass(frozen=True)
class Encoding:
    """What a loop encodes in its steps, where latents are not given to it.

    Attributes:
        images: Folder with a folder of images for each class.
        autoencoder: Folder of an AutoencoderKL.
        num_workers: Processes that read the images.
    """

    images: Path
    autoencoder: Path
    num_workers: int


class _Latents(Dataset[tuple[Any, Any]]):
    """Latents and labels in memory, so many that no epoch ends while steps are measured."""

    def __init__(self, latent_shape: tuple[int, ...], *, as_features: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(_SAMPLES, *latent_shape, generator=generator)
        self.labels = torch.randint(0, 1000, (_SAMPLES,), generator=generator)
        self.as_features = as_features

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        latent, label = self.latents[index % _SAMPLES], self.labels[index % _SAMPLES]
        # fast-DiT's files of features hold a batch of one.
        return (latent[None], label[None]) if self.as_features else (latent, int(label))


class _Repeated(Dataset[Any]):
    """A dataset over and over, so that no epoch ends while steps are measured."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


class _NoAutoencoder:
    """Stands in for the autoencoder where what comes are latents already."""

    @classmethod
    def from_pretrained(cls, name: str) -> "_NoAutoencoder":
        return cls()

    def to(self, device: object) -> "_NoAutoencoder":
        return self

    def encode(self, latents: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=latents.clone))


class _OnCPU:
    """The torch module for a script that asks for CUDA, on a CPU: its one device is the CPU."""

    class _Devices:
        def __rmod__(self, rank: int) -> torch.device:
            return torch.device("cpu")

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            device_count=self._Devices,
            set_device=lambda device: None,
            synchronize=lambda: None,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def backward_noted() -> Iterator[dict[int, float]]:
    """Notes when the last `loss.backward()` of each thread came to its end; gives the times by thread."""
    ended: dict[int, float] = {}
    backward = Tensor.backward

    def noted(loss: Tensor, *args: Any, **options: Any) -> None:
        backward(loss, *args, **options)
        ended[threading.get_ident()] = time.perf_counter()

    Tensor.backward = noted  # type: ignore[method-assign, assignment]
    try:
        yield ended
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]


class ReferenceLoop:
    """One of the two loops, stopped after its first step; a context manager, which ends it.

    Args:
        loop: One of `LOOPS`.
        checkout: Folder of the repository.
        model: Size and patch, such as "DiT-XL/2".
        batch_size: Images of a step.
        device: Where it trains.
        results_dir: A folder for what it would write.
        mixed_precision: For accelerate, which fast-DiT uses: "no", "fp16" or "bf16".
        sample_size: Side of the latents.
        encoding: Images and autoencoder of DiT's loop; None gives it latents. fast-DiT's knows latents alone.
        backward_ended: From `backward_noted`, if steps are to be taken apart by the host's clock, which is that of the
            work where nothing is left to a device.

    Attributes:
        milliseconds: Of each step from the second on: of its forward and backward pass, from the call of the network
            to the end of `backward`, and of all else. Empty without `backward_ended`.

    Raises:
        InputError: The folder holds no such loop, or no such model is known.
    """

    def __init__(
        self,
        loop: str,
        checkout: Path,
        *,
        model: str,
        batch_size: int,
        device: torch.device,
        results_dir: Path,
        mixed_precision: str = "no",
        sample_size: int = 32,
        encoding: Encoding | None = None,
        backward_ended: dict[int, float] | None = None,
    ) -> None:
        if not all((checkout / name).exists() for name in ("train.py", "models.py", "diffusion")):
            raise InputError(f"{checkout}: is no checkout of {REPOSITORIES[loop]}; clone it and name its folder.")
        if model not in MODEL_NAMES:
            raise InputError(f"model={model}: allowed: {', '.join(MODEL_NAMES)}.")
        self.loop, self.device = loop, device
        self.milliseconds: list[tuple[float, float]] = []
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closing, self._error = False, ""
        self._error_type: type[BaseException] | None = None
        self._backward_ended = backward_ended
        self._forward_began = self._step_began = time.perf_counter()
        self._environment = self._environment_of(mixed_precision)
        self._train = _imported(checkout)
        self._prepare(model, sample_size, encoding)
        self._arguments = Namespace(
            model=model,
            image_size=8 * sample_size,
            num_classes=1000,
            epochs=1,
            global_batch_size=batch_size,
            global_seed=0,
            vae="ema",
            num_workers=encoding.num_workers if encoding else 0,  # latents lie in memory already
            log_every=10**9,
            ckpt_every=10**9,
            results_dir=str(results_dir),
            data_path=str(encoding.images) if encoding else "",
            feature_path="",
        )
        self._thread = threading.Thread(target=self._run, name=loop, daemon=True)

    def __enter__(self) -> "ReferenceLoop":
        self._thread.start()
        self._wait()
        self.milliseconds.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing = True
        self._go.release()
        self._thread.join(60)

    def step(self) -> None:
        """Takes the next optimizer step as far as the host is concerned; its loss is read when another begins."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error_type is not None:
            raise self._error_type(self._error)

    def _run(self) -> None:
        try:
            with self._environment:
                self._train.main(self._arguments)
        except _Stop:
            pass
        except BaseException as error:  # noqa: BLE001  # told on the thread that asks for steps
            # Not the exception itself, whose frames would keep the tensors.
            self._error_type = type(error) if isinstance(error, torch.OutOfMemoryError) else RuntimeError
            self._error = f"{type(error).__name__}: {error}"
        finally:
            if dist.is_initialized() and self.loop == DIT:
                dist.destroy_process_group()
            # Its modules and their model are let go of.
            self.__dict__.pop("_train", None)
            self._done.release()

    def _prepare(self, model: str, sample_size: int, encoding: Encoding | None) -> None:
        """Gives the loop what it would take from disk, from the network or from CUDA, and the places to stop at."""
        train, is_fast = self._train, self.loop == FAST_DIT
        size = DIT_SIZES[model.removeprefix("DiT-").split("/")[0]]
        train.DiT_models = {
            model: partial(
                train.models_of_checkout.DiT,
                depth=size.num_layers,
                hidden_size=size.num_attention_heads * size.attention_head_dim,
                num_heads=size.num_attention_heads,
                patch_size=int(model.split("/")[1]),
            )
        }
        latents = _Latents((4, sample_size, sample_size), as_features=is_fast)
        train.AutoencoderKL = _NoAutoencoder
        if encoding is not None:
            load = partial(AutoencoderKL.from_pretrained, encoding.autoencoder)
            train.AutoencoderKL = SimpleNamespace(from_pretrained=lambda name: load())
        train.create_logger = lambda folder: logging.getLogger(f"reference {self.loop}")
        if is_fast:
            train.CustomDataset = lambda features_dir, labels_dir: latents
        elif encoding is None:
            train.ImageFolder = lambda path, transform: latents
        else:
            image_folder = train.ImageFolder
            train.ImageFolder = lambda path, transform: _Repeated(image_folder(path, transform=transform))
        if self.device.type == "cpu":
            train.torch = _OnCPU()
            if not is_fast:
                init, wrapped = dist.init_process_group, train.DDP
                train.dist = SimpleNamespace(
                    **{name: getattr(dist, name) for name in ("get_rank", "get_world_size", "barrier", "all_reduce")},
                    init_process_group=lambda backend: init("gloo"),
                    ReduceOp=dist.ReduceOp,
                    destroy_process_group=dist.destroy_process_group,
                )
                train.DDP = lambda module, device_ids: wrapped(module)
        create_diffusion, update_ema = train.create_diffusion, train.update_ema

        def diffusion_with_mark(*args: Any, **options: Any) -> Any:
            diffusion = create_diffusion(*args, **options)
            losses = diffusion.training_losses

            def with_marked_network(network: Any, *args: Any, **options: Any) -> Any:
                def marked(*args: Any, **options: Any) -> Any:
                    self._forward_began = time.perf_counter()
                    return network(*args, **options)

                return losses(marked, *args, **options)

            diffusion.training_losses = with_marked_network
            return diffusion

        def update_and_wait(*args: Any, **options: Any) -> None:
            update_ema(*args, **options)
            if options.get("decay") != 0:  # which copies, before the first step
                self._between_steps()

        train.create_diffusion, train.update_ema = diffusion_with_mark, update_and_wait

    def _between_steps(self) -> None:
        if self._backward_ended is not None:
            passes = self._backward_ended[threading.get_ident()] - self._forward_began
            whole = time.perf_counter() - self._step_began
            self.milliseconds.append((1e3 * passes, 1e3 * (whole - passes)))
        self._done.release()
        self._go.acquire()
        if self._closing:
            raise _Stop
        self._step_began = time.perf_counter()

    @contextlib.contextmanager
    def _environment_of(self, mixed_precision: str) -> Iterator[None]:
        """What accelerate or a launcher of one process would have set, while the loop runs."""
        given = {"ACCELERATE_MIXED_PRECISION": mixed_precision}
        if self.loop == DIT:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _imported(checkout: Path) -> ModuleType:
    """The loop's module from a checkout, whose modules are left to it alone."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _MODULES}
    sys.path.insert(0, str(checkout))
    try:
        train = importlib.import_module("train")
        train.models_of_checkout = sys.modules["models"]
        return train
    finally:
        sys.path.remove(str(checkout))
        for name in list(sys.modules):
            if name.split(".")[0] in _MODULES:
                del sys.modules[name]
        sys.modules.update(kept)
