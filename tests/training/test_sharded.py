"""A model sharded by FSDP2, as far as CPUs can show it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from forked import Forker, run_options
from run_outputs import final_tensors, metrics
from speed_diffusers.errors import InputError
from speed_diffusers.models import build_dit, export_transformer
from speed_diffusers.training import parts
from speed_diffusers.training.checkpoints import full_tensors
from speed_diffusers.training.config import TrainConfig
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
def test_a_sharded_run_saves_whole_tensors_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
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


def test_a_run_over_two_processes_is_that_of_one_and_checkpoints_go_both_ways(
    forker: Forker, train: Callable[..., Path], tiny_options: list[str], tmp_path: Path
) -> None:
    short = ["max_train_steps=4", "checkpointing_steps=2", "lr_warmup_steps=1", "num_validation_images=1"]
    alone = train(tmp_path / "alone", *short)
    runs = {
        "sharded": ["train_batch_size=2"],
        "taken-over": ["train_batch_size=1", f"resume_from_checkpoint={alone / 'checkpoint-2'}"],
        "bf16": ["train_batch_size=2", "max_train_steps=1", "mixed_precision=bf16"],
    }
    for name, options in runs.items():
        command = run_options(run_options(tiny_options, tmp_path / name, *short), tmp_path / name, *options)
        forker.run(tmp_path / "output", command, size=2, changes=["sharded"])
    back = train(tmp_path / "back", *short, f"resume_from_checkpoint={tmp_path / 'sharded' / 'checkpoint-2'}")
    expected = final_tensors(alone, 4)
    for folder in (tmp_path / "sharded", tmp_path / "taken-over", back):
        for mine, line in zip(reversed(metrics(folder)), reversed(metrics(alone)), strict=False):
            assert (mine["step"], mine["loss"]) == (line["step"], pytest.approx(line["loss"], rel=1e-4))
            assert mine["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
        found = final_tensors(folder, 4)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
        assert (folder / "pipeline" / "model_index.json").is_file()
    assert metrics(tmp_path / "bf16")[0]["loss"] == pytest.approx(metrics(alone)[0]["loss"], rel=0.02)


def test_what_fsdp_would_do_harm_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(mixed_precision="bf16", distributed_type=DistributedType.FSDP, num_processes=1)
    monkeypatch.setattr(parts, "Accelerator", lambda **options: made)
    assert parts.make_accelerator(TrainConfig()) is made
    with pytest.raises(InputError, match="mixed_precision=bf16 prediction_type=flow_prediction: FSDP"):
        parts.make_accelerator(TrainConfig(prediction_type="flow_prediction"))
    with pytest.raises(InputError, match="optimizer=muon: works on whole matrices, which FSDP shards"):
        parts.make_accelerator(TrainConfig(optimizer="muon"))


def test_deepspeed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(mixed_precision="bf16", distributed_type=DistributedType.DEEPSPEED, num_processes=1)
    monkeypatch.setattr(parts, "Accelerator", lambda **options: made)
    with pytest.raises(InputError, match=r"^DeepSpeed is not supported; .* take accelerate_configs/fsdp2.yaml\.$"):
        parts.make_accelerator(TrainConfig())
