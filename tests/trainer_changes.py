"""What is done to a trainer in a process of its own before it starts; see `forked.py`."""

import ctypes
import hashlib
import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor

from speed_diffusers.error_bins import ErrorBins
from speed_diffusers.models import TrainableDiT
from speed_diffusers.training import checkpoints, setup, step
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import make_accelerator
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.step_draws import StepDraws
from speed_diffusers.training.stop_request import StopRequest

RANK = "RANK"


def sharded() -> None:
    """Shards the model by FSDP2, as `accelerate_configs/fsdp2.yaml` has it.

    Accelerate shards on accelerators alone; told after it has been made that it is to, it does on CPUs too.
    """

    def make(config: TrainConfig) -> Accelerator:
        accelerator = make_accelerator(config)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BasicTransformerBlock"],
            cpu_ram_efficient_loading=False,
        )
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator

    setup.make_accelerator = make


def float64() -> None:
    """Trains in double precision, in which sums in another order differ by 1e-16 and not by 1e-7."""
    make_model, latents_of, single, add = setup.make_model, step.latents_of, Tensor.float, ErrorBins.add

    def make(*arguments: Any) -> TrainableDiT:
        return make_model(*arguments).double()

    setup.make_model = make
    step.latents_of = lambda *arguments: latents_of(*arguments).double()
    ErrorBins.add = lambda self, steps, errors: add(self, steps, errors.to(torch.float32))  # type: ignore[method-assign]
    # The loss is taken in float32 whatever the network's precision; here in no less than there is.
    Tensor.float = lambda self, *arguments, **options: (  # type: ignore[method-assign]
        self if self.dtype == torch.float64 else single(self, *arguments, **options)
    )


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def ledger(folder: str) -> None:
    """Writes down what each image of each step meets: hashes of its moments, timestep, noises, drop and flip.

    One line of JSON for each image, in a file for each rank.
    """
    path = Path(folder) / f"ledger-{os.environ.get(RANK, '0')}.jsonl"
    latents_of, draws_of = step.latents_of, step.draws_of
    every: list[tuple[int, StepDraws]] = []

    def draws(run: TrainingRun, number: int) -> StepDraws:
        every.append((number, draws_of(run, number)))
        return every[-1][1]

    def latents(run: TrainingRun, batch: dict[str, Tensor], own: StepDraws) -> Tensor:
        number, whole = every[-1]
        noises = [digest(noise) for noise in whole.noise]
        with path.open("a") as file:
            for index, moments in enumerate(batch["moments"]):
                drawn = {name: digest(value[index]) for name, value in vars(own).items()}
                line = {"step": number, "place": noises.index(drawn["noise"]), "image": digest(moments)}
                file.write(json.dumps(line | {"label": int(batch["labels"][index])} | drawn) + "\n")
        return latents_of(run, batch, own)

    step.draws_of, step.latents_of = draws, latents


def at_step(number: int, what: Callable[[], object], *, rank: str | None = None) -> None:
    """Does something once, before the forward pass of an optimizer step (from 1), on one rank or on all."""
    draws_of = step.draws_of

    def draws(run: TrainingRun, index: int) -> StepDraws:
        if index + 1 == number and rank in (None, os.environ.get(RANK, "0")):
            what()
        return draws_of(run, index)

    step.draws_of = draws


def killed(number: str) -> None:
    """The process is killed before a step."""
    at_step(int(number), lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_within_save(number: str) -> None:
    """The process is killed while it writes the checkpoint of a step, when half of its files are there."""
    saved = checkpoints.save_tensors

    def save(tensors: Any, path: Path, *arguments: Any) -> None:
        saved(tensors, path, *arguments)
        if path.parent.name.endswith(f"-{number}") and path.name.startswith("ema"):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_tensors = save


def dies(number: str) -> None:
    """Rank 1 is killed before a step."""
    at_step(int(number), lambda: os.kill(os.getpid(), signal.SIGKILL), rank="1")


def stalls(number: str) -> None:
    """Rank 1 sleeps before a step, and is not woken."""
    at_step(int(number), lambda: time.sleep(3600), rank="1")


def stopped(which: str) -> None:
    """A rank receives SIGTERM before a step: "1,7" is rank 1 before step 7."""
    rank, number = which.split(",")
    StopRequest.SECONDS_BETWEEN_LOOKS = 0.01  # these runs take less than five seconds
    at_step(int(number), lambda: os.kill(os.getpid(), signal.SIGTERM), rank=rank)


def poisoned(which: str) -> None:
    """A rank's latents of a step are NaN: "1,7" is rank 1 in step 7."""
    rank, number = which.split(",")
    latents_of, bad = step.latents_of, []
    at_step(int(number), lambda: bad.append(True), rank=rank)

    def latents(*arguments: Any) -> Tensor:
        found = latents_of(*arguments)
        return found * float("nan") if bad and bad.pop() else found

    step.latents_of = latents


def counted(folder: str) -> None:
    """Writes down how many images each rank has generated for grids and scores."""
    # The package has a function of the module's name.
    module = importlib.import_module("speed_diffusers.generation.generate")
    made = module.speed_pipeline

    path = Path(folder) / f"generated-{os.environ.get(RANK, '0')}.txt"

    class Counting:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.pipeline = made(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipeline, name)

        def __call__(self, *inputs: Any, **keywords: Any) -> Any:
            with path.open("a") as file:
                file.write(f"{len(keywords['class_labels'])}\n")
            return self.pipeline(*inputs, **keywords)

    module.speed_pipeline = Counting


def faults(settings: str) -> None:
    """Lets files fail as `nightly/file_faults.c` does: JSON with folders, number, full, and listing."""
    given = json.loads(settings)
    listing = given.get("listing")
    arm = ctypes.CDLL(None).faults_arm
    arm(
        ":".join(given["folders"]).encode(),
        given.get("number", 0),
        int(given.get("full", False)),
        None if listing is None else listing.encode(),
    )
