"""The training script with its model sharded by FSDP2 over processes on CPUs.

Started once for each rank, with torchrun's environment, a folder for what the processes meet by, and the options of
runs that follow one another, split by `--`. Accelerate shards on accelerators alone; told after it has been made that
it is to, it does on CPUs too.
"""

import os
import sys

import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from speed_diffusers.train_scripts import train_dit_speed
from speed_diffusers.training import setup
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import make_accelerator


def make_sharding_accelerator(config: TrainConfig) -> Accelerator:
    """As the trainer makes it, then as `accelerate_configs/fsdp2.yaml` has it."""
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


def main(folder: str, *options: str) -> None:
    """Takes one run after the other, each with a process group of its own."""
    end = options.index("--") if "--" in options else len(options)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/{len(options)}", rank=rank, world_size=size)
    train_dit_speed.main(list(options[:end]))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    if rest := options[end + 1 :]:
        main(folder, *rest)


if __name__ == "__main__":
    setup.make_accelerator = make_sharding_accelerator
    main(*sys.argv[1:])
