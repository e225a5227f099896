"""What makes the transformer's blocks cheaper without changing what they compute: recomputed activations, compilation.

Both work on the blocks where they stand, so names of parameters, checkpoints and exports are those of a plain model.
"""

from typing import Any, cast

from torch.utils.checkpoint import checkpoint

from ..models import TrainableDiT
from .config import TrainConfig


def prepare_blocks(core: TrainableDiT, config: TrainConfig) -> None:
    """Does to the blocks of a model what the options of a run ask for.

    Args:
        core: The model in training form; changed in place.
        config: Options of the run.
    """
    if config.gradient_checkpointing:
        recompute_activations(core, config.gradient_checkpointing)
    if config.compile:
        compile_blocks(core, config.compile_backend)


def recomputed_blocks(num_layers: int, share: float) -> list[int]:
    """Which blocks are run again in the backward pass: share * num_layers of them, rounded, spread evenly.

    Args:
        num_layers: Number of blocks.
        share: Of the blocks, in [0, 1].
    """
    count = round(share * num_layers)
    return [layer for layer in range(num_layers) if (layer + 1) * count // num_layers > layer * count // num_layers]


def recompute_activations(core: TrainableDiT, share: float) -> None:
    """Lets a share of the blocks keep their input alone and run again in the backward pass (arXiv 1604.06174).

    Args:
        core: The model in training form; changed in place.
        share: Of the blocks, in [0, 1].
    """
    blocks = core.transformer.transformer_blocks
    recomputed = {id(blocks[layer]) for layer in recomputed_blocks(len(blocks), share)}

    def run(block: Any, *inputs: Any) -> Any:
        if id(block) not in recomputed:
            return block(*inputs)
        # Nothing in a block is random, so there is no state of a generator to keep and put back.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    core.transformer.enable_gradient_checkpointing(run)


def compile_blocks(core: TrainableDiT, backend: str) -> None:
    """Compiles each block when it first runs; all share one compilation, for they differ in their weights alone.

    What stands around the blocks is left as it is: one block is compiled in seconds, all of them together in minutes.

    Args:
        core: The model in training form; changed in place.
        backend: Of `torch.compile`.
    """
    # The patches come transposed; as they lie, the first block would be compiled for itself.
    core.transformer.pos_embed.register_forward_hook(lambda module, inputs, output: output.contiguous())
    for block in core.transformer.transformer_blocks:
        # Batches have one size in a run; kernels for any size would be slower.
        cast(Any, block).compile(backend=backend, dynamic=False)
