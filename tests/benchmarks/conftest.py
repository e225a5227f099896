"""Shared by the tests of benchmarks: a stand-in for the checkouts of reference loops."""

from collections.abc import Callable
from pathlib import Path

import pytest

MODELS = """
import torch
from torch import nn


class DiT(nn.Module):
    def __init__(self, input_size, num_classes, depth, hidden_size, num_heads, patch_size):
        super().__init__()
        self.sizes = input_size, num_classes, depth, hidden_size, num_heads, patch_size
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x, t, y):
        assert x.shape[1:] == (4, 32, 32) and t.shape == y.shape == x.shape[:1]
        return self.layer(x)


DiT_models = {}
"""
DIFFUSION = """
class Diffusion:
    num_timesteps = 1000

    def training_losses(self, model, x, t, model_kwargs):
        return {"loss": (model(x, t, **model_kwargs) - x).square()}


def create_diffusion(timestep_respacing):
    return Diffusion()
"""
# The shape of both loops in our own words: what is given to them, and where they can be stopped.
TRAIN = """
from copy import deepcopy

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, ToTensor

from diffusers.models import AutoencoderKL
from diffusion import create_diffusion
from models import DiT_models

CustomDataset = None
seen = []


def create_logger(folder):
    raise AssertionError("writes files")


def update_ema(ema, model, decay=0.9999):
    seen.append(decay)


def main(args):
    assert torch.cuda.is_available()
    if READS_IMAGES:
        dist.init_process_group("nccl")
        assert dist.get_world_size() == 1
    accelerator = Accelerator()
    log = create_logger(args.results_dir)
    model = DiT_models[args.model](input_size=args.image_size // 8, num_classes=args.num_classes)
    assert model.sizes == (32, 1000, 6, 128, 4, 8)
    autoencoder = AutoencoderKL.from_pretrained(args.vae).to(accelerator.device)
    ema, diffusion = deepcopy(model), create_diffusion(timestep_respacing="")
    optimizer = torch.optim.AdamW(model.parameters())
    if READS_IMAGES:
        data = ImageFolder(args.data_path, transform=Compose([CenterCrop(args.image_size), ToTensor()]))
    else:
        data = CustomDataset("a", "b")
    loader = DataLoader(data, batch_size=args.global_batch_size, num_workers=args.num_workers)
    if READS_IMAGES:
        model = DDP(model, device_ids=[0])
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    update_ema(ema, model, decay=0)
    for x, y in loader:
        if not READS_IMAGES:
            x, y = x.squeeze(1), y.squeeze(1)
        x = autoencoder.encode(x).latent_dist.sample()
        if FAILS:
            raise ValueError("a bug of theirs")
        t = torch.randint(0, diffusion.num_timesteps, (len(x),))
        loss = diffusion.training_losses(model, x, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        update_ema(ema, model)
    raise AssertionError("came to an end")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Callable[..., Path]:
    """A folder that looks like a checkout of a reference loop."""

    def make(loop: str, *, fails: bool = False) -> Path:
        folder = tmp_path / f"checkout {loop}"
        (folder / "diffusion").mkdir(parents=True)
        (folder / "models.py").write_text(MODELS)
        (folder / "diffusion" / "__init__.py").write_text(DIFFUSION)
        (folder / "train.py").write_text(
            TRAIN.replace("FAILS", str(fails)).replace("READS_IMAGES", str(loop == "DiT"))
        )
        return folder

    return make
