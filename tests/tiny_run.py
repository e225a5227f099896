"""A training run in small, for the tests of checkpoints."""

import contextlib
import copy
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speed_diffusers import SpeeDDDPMScheduler
from speed_diffusers.models import build_dit
from speed_diffusers.objective import denoising_loss, drop_labels
from speed_diffusers.training.checkpoints import load_checkpoint, read_state, save_checkpoint
from speed_diffusers.training.ema import ExponentialMovingAverage
from speed_diffusers.training.step_draws import StepDraws

DIT = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 2,
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_embeds_ada_norm": 1000,
}


class Run:
    """DiT, AdamW, average, draws keyed by the step."""

    def __init__(self, seed: int = 0, *, fused: bool = True, model: nn.Module | None = None) -> None:
        self.model = build_dit(DIT, torch.Generator().manual_seed(seed)) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.01, fused=fused)
        self.ema = ExponentialMovingAverage(self.model, 0.9)
        self.scheduler = SpeeDDDPMScheduler()
        self.step = 0

    def train(self, steps: int) -> list[float]:
        losses = []
        latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        for _ in range(steps):
            draws = StepDraws.at_step(
                self.scheduler,
                seed=1,
                step=self.step,
                latent_shape=(8, 4, 4, 4),
                class_dropout_prob=0.1,
                random_flip=False,
                device=torch.device("cpu"),
            )
            rows = drop_labels(torch.arange(8), draws.dropped)
            loss = denoising_loss(self.model, self.scheduler, latents, rows, draws.timesteps, draws.noise).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            self.step += 1
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, **state: Any) -> Path:
        return save_checkpoint(
            folder,
            step=self.step,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            state=state,
            is_main_process=True,
        )

    def load(self, folder: Path) -> None:
        load_checkpoint(folder, model=self.model, ema=self.ema, optimizer=self.optimizer)
        self.step = read_state(folder)["step"]

    def state(self) -> dict[str, Tensor]:
        """Parameters, averages, moments and step counts, as copies."""
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"ema/{name}": value for name, value in self.ema.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, values in self.optimizer.state.items():
            found |= {f"optimizer/{names[id(parameter)]}/{key}": value for key, value in values.items()}
        return copy.deepcopy(found)


def light_run(width: int = 8) -> Run:
    """A run of one linear layer, one step done: for the tests that look at files only."""
    torch.manual_seed(0)
    run = Run(model=nn.Linear(width, width))
    run.model(torch.ones(1, width)).sum().backward()
    run.optimizer.step()
    return run


def saved_steps(folder: Path, *steps: int) -> Run:
    """Checkpoints of a light run at the given steps."""
    run = light_run()
    for step in steps:
        run.step = step
        run.save(folder)
    return run


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail as they do on a full disk; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
