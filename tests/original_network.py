"""DiT's own network as a function of its state dict, written from the paper (Peebles and Xie, arXiv 2212.09748).

What the paper leaves open (names and order of the tensors, frequencies, epsilons) are facts of the released
checkpoints. It shares nothing with the code under test: no layer of diffusers, no constant, no name that is looked up.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def random_state(
    *, width: int, depth: int, patch: int = 2, channels: int = 4, out: int = 8, side: int = 8, rows: int | None = 11
) -> dict[str, Tensor]:
    """A state dict whose every layer has an effect; `rows` of the label table, or None for no labels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    layers = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for block in range(depth):
        layers |= {
            f"blocks.{block}.attn.qkv": (3 * width, width),
            f"blocks.{block}.attn.proj": (width, width),
            f"blocks.{block}.mlp.fc1": (4 * width, width),
            f"blocks.{block}.mlp.fc2": (width, 4 * width),
            f"blocks.{block}.adaLN_modulation.1": (6 * width, width),
        }
    layers |= {
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch * patch * out, width),
    }
    state = {
        "pos_embed": positions(width, side // patch).float()[None],
        "x_embedder.proj.weight": draw(width, channels, patch, patch),
        "x_embedder.proj.bias": draw(width),
    }
    for name, shape in layers.items():
        state |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    if rows is not None:
        state["y_embedder.embedding_table.weight"] = torch.randn(rows, width, generator=generator)
    return state


def positions(width: int, grid: int) -> Tensor:
    """Two-dimensional sines and cosines in float64, (grid * grid, width), token by token in reading order."""
    table = torch.empty(grid * grid, width, dtype=torch.float64)
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        for index in range(width // 4):
            frequency = 1.0 / 10000 ** (index / (width / 4))
            for half, place in ((0, column), (width // 2, row)):
                table[token, half + index] = math.sin(place * frequency)
                table[token, half + width // 4 + index] = math.cos(place * frequency)
    return table


def predict(state: dict[str, Tensor], sample: Tensor, timestep: Tensor, label: Tensor, *, heads: int) -> Tensor:
    """Predicts (B, out, H, W) from noisy latents (B, C, H, W), timesteps (B,) and rows of the label table (B,)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    kernel = state["x_embedder.proj.weight"]
    width, _, patch, _ = kernel.shape
    # Each patch, flattened channel by channel, through one linear layer; then its place is added.
    patches = F.unfold(sample, patch, stride=patch).transpose(1, 2)
    tokens = F.linear(patches, kernel.flatten(1), state["x_embedder.proj.bias"]) + state["pos_embed"]

    # 128 frequencies from 1 down to 10000^(-127/128): cosines, then sines.
    angles = timestep[:, None].float() * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
    condition = linear(
        "t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    )
    if "y_embedder.embedding_table.weight" in state:
        condition = condition + state["y_embedder.embedding_table.weight"][label]
    condition = F.silu(condition)

    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    for block in (f"blocks.{index}" for index in range(depth)):
        # adaLN-Zero (section 3.2): shift, scale and gate of the attention, then those of the feed-forward layer.
        parts: Any = linear(f"{block}.adaLN_modulation.1", condition).split(width, dim=1)
        mixed = modulated(tokens, parts[0], parts[1])
        query, key, value = (
            part.unflatten(2, (heads, width // heads)).transpose(1, 2)
            for part in linear(f"{block}.attn.qkv", mixed).split(width, dim=2)
        )
        shares = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(width / heads), dim=-1)
        attended = (shares @ value).transpose(1, 2).flatten(2)
        tokens = tokens + parts[2][:, None] * linear(f"{block}.attn.proj", attended)
        hidden = linear(f"{block}.mlp.fc1", modulated(tokens, parts[3], parts[4]))
        tokens = tokens + parts[5][:, None] * linear(f"{block}.mlp.fc2", F.gelu(hidden, approximate="tanh"))

    shift, scale = linear("final_layer.adaLN_modulation.1", condition).split(width, dim=1)
    pixels = linear("final_layer.linear", modulated(tokens, shift, scale))
    # A token's outputs are its patch's pixels, row by row, with the channels of a pixel together.
    grid = sample.shape[-1] // patch
    image = pixels.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))
    return image.permute(0, 5, 1, 3, 2, 4).reshape(len(sample), -1, grid * patch, grid * patch)
