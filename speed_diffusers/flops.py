"""What a DiT computes for one image, by formula: the yardstick for how much of a device a step uses."""

from collections.abc import Mapping
from typing import Any


def forward_macs(config: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one forward pass for one image; what DiT's paper calls its Gflops.

    Counted from the architecture (Peebles and Xie, arXiv 2212.09748, section 3.2): matrix products alone. Norms,
    activations and sums are left out, as is usual.

    Args:
        config: As `dit_config` makes it, or the config of a `DiTTransformer2DModel`.
    """
    patch = config["patch_size"]
    tokens = (config["sample_size"] // patch) ** 2
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # Query, key, value and output are 4 d^2 a token, the feed-forward of ratio 4 is 8 d^2; adaLN is 6 d^2 an image.
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    embedder = 256 * width + width**2
    patches_in = tokens * patch**2 * config["in_channels"] * width
    patches_out = tokens * patch**2 * config["out_channels"] * width
    head = 2 * width**2
    return int(config["num_layers"] * block + embedder + patches_in + patches_out + head)


def training_flops(config: Mapping[str, Any]) -> int:
    """Floating-point operations of forward and backward pass for one image: 6 a multiply-accumulate.

    Two for the product and the sum, and the backward pass costs twice the forward pass. What gradient checkpointing
    computes again does not count: it is no part of the model.

    Args:
        config: As in `forward_macs`.
    """
    return 6 * forward_macs(config)
