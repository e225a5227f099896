"""Checkpoints of a model sharded by FSDP2, as far as one process on a CPU can show them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from speed_diffusers.models import build_dit, export_transformer
from speed_diffusers.training.checkpoints import full_tensors
from tiny_run import DIT, Run


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_run(seed: int = 0) -> Run:
    model = build_dit(DIT, torch.Generator().manual_seed(seed))
    mesh = init_device_mesh("cpu", (1,))
    for block in model.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Run(model=model)


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_run_saves_whole_tensors_and_goes_on_exactly(tmp_path: Path) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    run = sharded_run()
    assert all(isinstance(average, DTensor) for average in run.ema.state_dict().values())
    run.train(3)
    folder = run.save(tmp_path / "run")
    expected = run.train(3)
    resumed = sharded_run(seed=1)
    resumed.load(folder)
    assert resumed.train(3) == expected
    for name, average in full_tensors(run.ema.state_dict()).items():
        assert torch.equal(average, full_tensors(resumed.ema.state_dict())[name])
    # The same file goes into a model that is not sharded, and out to the stock class.
    plain = Run(seed=2)
    plain.load(folder)
    assert plain.train(3) == pytest.approx(expected, rel=1e-6)
    export_transformer(run.model.transformer.config, full_tensors(run.ema.state_dict()))
