"""DiT's own network and diffusers': the tensors of the one as those of the other, both ways.

DiT's own code (facebookresearch/DiT) and SpeeD's official code name the same tensors alike. Against them diffusers'
class splits query, key and value, gives each block an embedder of its own, computes the position embedding instead of
storing it, and differs in two constants: frequencies of the timestep (`models.FREQ_SHIFT`: 1, there 0) and the epsilon
of one layer norm (`norm_eps`: 1e-5, there 1e-6). The second is a key of its config, the first one that we add.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from ..errors import InputError
from ..models import DIT_SIZES, FREQ_SHIFT, NULL_CLASS, export_transformer
from ..randomness import keyed_generator

FREQUENCIES = 256
"""Sines and cosines that a timestep is told by."""

ORIGINAL_CONSTANTS: dict[str, float] = {FREQ_SHIFT: 0, "norm_eps": 1e-6}
"""What DiT's own code computes with, by key of the config."""

STOCK_CONSTANTS: dict[str, float] = {FREQ_SHIFT: 1, "norm_eps": 1e-5}
"""What diffusers' class computes with if its config says nothing."""

# Layers of both by name: there, and in the training form of `models`, in which one embedder stands beside the blocks.
EMBEDDERS = {
    "x_embedder.proj": "transformer.pos_embed.proj",
    "t_embedder.mlp.0": "embedder.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "embedder.timestep_embedder.linear_2",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
"""Layers of diffusers that are one there, `attn.qkv`, one below the other."""
FINAL_LAYER = {
    "final_layer.adaLN_modulation.1": "transformer.proj_out_1",
    "final_layer.linear": "transformer.proj_out_2",
}
POSITIONS, LABEL_TABLE = "pos_embed", "y_embedder.embedding_table.weight"
OUR_LABEL_TABLE = "embedder.class_embedder.embedding_table.weight"
PARTS = ("weight", "bias")


@dataclass(frozen=True)
class OriginalShape:
    """What the tensors of DiT's own network tell of it; the number of attention heads they do not tell."""

    width: int
    depth: int
    patch_size: int
    in_channels: int
    out_channels: int
    sample_size: int
    num_classes: int | None
    """The label table has a row more, the last, for no class; None: there is no table."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "OriginalShape":
        """Reads the shape from a state dict.

        Args:
            state: DiT's own names to tensors.

        Raises:
            InputError: They are not those of a DiT; the message names some that are missing, too many or misshaped.
        """
        sizes = {name: tuple(value.shape) for name, value in state.items()}
        needed = {"x_embedder.proj.weight": 4, POSITIONS: 3, "final_layer.linear.weight": 2}
        for name, dimensions in needed.items():
            if len(sizes.get(name, ())) != dimensions or 0 in sizes[name]:
                raise InputError(f"not a DiT: {_has(sizes, name)}, but must have {name} with {dimensions} dimensions.")
        width, in_channels, patch_size, _ = sizes["x_embedder.proj.weight"]
        outputs = sizes["final_layer.linear.weight"][0]
        tokens = math.isqrt(sizes[POSITIONS][1])
        table = sizes.get(LABEL_TABLE)
        blocks = {int(found[1]) for name in sizes if (found := re.match(r"blocks\.(\d{1,4})\.", name))}
        shape = cls(
            width=width,
            depth=max(blocks, default=-1) + 1,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=outputs // patch_size**2,
            sample_size=tokens * patch_size,
            num_classes=None if table is None else (table or (0,))[0] - 1,
        )
        shape._check(sizes)
        return shape

    def _check(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        expected = self.tensors()
        if missing := sorted(set(expected) - set(sizes)):
            raise InputError(f"not a DiT: it lacks {len(missing)} of its tensors, such as {missing[0]}.")
        if unknown := sorted(set(sizes) - set(expected)):
            raise InputError(f"not a DiT: {len(unknown)} of its tensors are none of DiT's, such as {unknown[0]}.")
        for name, size in expected.items():
            if sizes[name] != size:
                raise InputError(f"not a DiT: {_has(sizes, name)}, but DiT's would be {list(size)}.")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise InputError(
                f"not a DiT: it has {self.out_channels} output channels for {self.in_channels} input channels; "
                "allowed: as many, or twice as many (with a learned variance)."
            )
        if self.width % 4 or not self.depth or self.num_classes == 0:
            raise InputError(f"not a DiT: width {self.width}, {self.depth} blocks, {self.num_classes} classes.")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that such a network has."""
        width, pixels = self.width, self.patch_size**2
        found: dict[str, tuple[int, ...]] = {
            POSITIONS: (1, (self.sample_size // self.patch_size) ** 2, width),
            "x_embedder.proj.weight": (width, self.in_channels, self.patch_size, self.patch_size),
            "x_embedder.proj.bias": (width,),
        }
        if self.num_classes is not None:
            found[LABEL_TABLE] = (self.num_classes + 1, width)
        layers = {
            "t_embedder.mlp.0": (width, FREQUENCIES),
            "t_embedder.mlp.2": (width, width),
            "final_layer.linear": (pixels * self.out_channels, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
        }
        for block in range(self.depth):
            layers |= {
                f"blocks.{block}.attn.qkv": (3 * width, width),
                f"blocks.{block}.attn.proj": (width, width),
                f"blocks.{block}.mlp.fc1": (4 * width, width),
                f"blocks.{block}.mlp.fc2": (width, 4 * width),
                f"blocks.{block}.adaLN_modulation.1": (6 * width, width),
            }
        for name, size in layers.items():
            found |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
        return found

    def heads(self, num_attention_heads: int | None) -> int:
        """The number of attention heads.

        Args:
            num_attention_heads: As the user gives it; None: that of the known DiT of this width and depth.

        Raises:
            InputError: There is no such DiT, or the number does not divide the width.
        """
        if num_attention_heads is None:
            for size in DIT_SIZES.values():
                if (size.num_layers, size.num_attention_heads * size.attention_head_dim) == (self.depth, self.width):
                    return size.num_attention_heads
            raise InputError(
                f"No known DiT has {self.depth} blocks of width {self.width}, and tensors do not tell the number of "
                f"attention heads: give num_attention_heads=N, which must divide {self.width}."
            )
        if self.width % num_attention_heads:
            raise InputError(f"num_attention_heads={num_attention_heads}: must divide the width, {self.width}.")
        return num_attention_heads


def _has(sizes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"it has {name} of shape {list(sizes[name])}" if name in sizes else f"it has no {name}"


def transformer_of(
    state: Mapping[str, Tensor],
    *,
    num_attention_heads: int | None = None,
    constants: Mapping[str, float] = ORIGINAL_CONSTANTS,
) -> DiTTransformer2DModel:
    """Diffusers' transformer that computes what DiT's own network with these weights does.

    With at most 1000 classes rows of the label table stay where they are; with more, the last row, which is "no
    class", becomes row 1000 and the classes from there on move by one (`models.label_to_embedding_row`). A network
    without labels gets a label table of zeros.

    Args:
        state: State dict of DiT's own network, floating-point.
        num_attention_heads: None: as the known DiT of this size has it.
        constants: What it computes with, as `ORIGINAL_CONSTANTS`.

    Raises:
        InputError: The tensors are not those of a DiT with DiT's position embedding, or the heads cannot be told.
    """
    shape = OriginalShape.of(state)
    heads = shape.heads(num_attention_heads)
    _check_positions(state[POSITIONS])
    ours: dict[str, Tensor] = {}
    for theirs, our in _layers(shape.depth).items():
        for part in PARTS:
            ours[f"{our}.{part}"] = state[f"{theirs}.{part}"]
    for block in range(shape.depth):
        for part in PARTS:
            for name, value in zip(QKV, state[f"blocks.{block}.attn.qkv.{part}"].chunk(3), strict=True):
                ours[f"transformer.transformer_blocks.{block}.{name}.{part}"] = value
    table = state.get(LABEL_TABLE)
    num_classes = NULL_CLASS if shape.num_classes is None else shape.num_classes
    if table is None:
        ours[OUR_LABEL_TABLE] = torch.zeros(num_classes + 1, shape.width)
    else:
        ours[OUR_LABEL_TABLE] = torch.empty_like(table)
        ours[OUR_LABEL_TABLE][rows_of_classes(num_classes)] = table
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": shape.width // heads,
        "num_layers": shape.depth,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "patch_size": shape.patch_size,
        "sample_size": shape.sample_size,
        "num_embeds_ada_norm": num_classes,
        "norm_type": "ada_norm_zero",
        **constants,
    }
    return export_transformer(config, ours)


def original_state(transformer: DiTTransformer2DModel, *, null_row: int | None = None) -> dict[str, Tensor]:
    """The state dict of DiT's own network with a transformer's weights; the inverse of `transformer_of`.

    A label table of zeros alone is left out: its network has no labels.

    Args:
        transformer: Diffusers', in float32.
        null_row: Row of its label table that means "no class"; None: row 1000, or the last if there are fewer.

    Raises:
        InputError: DiT's own network cannot have these weights: blocks have different embedders, or layers are others.
    """
    config: Any = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for key, value in (
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
        ("norm_type", "ada_norm_zero"),
    ):
        if config[key] != value:
            raise InputError(f"DiT's own network has {key}={value}, the transformer {config[key]}.")
    state = transformer.state_dict()
    embedders = [f"transformer_blocks.{block}.norm1.emb." for block in range(config["num_layers"])]
    first = {name.removeprefix(embedders[0]): name for name in state if name.startswith(embedders[0])}
    for block, prefix in enumerate(embedders):
        if any(not torch.equal(state[name], state[prefix + tail]) for tail, name in first.items()):
            raise InputError(
                f"The conditioning embedders of blocks 0 and {block} differ, but DiT's own network has one for all."
            )
    ours = {f"transformer.{name}": value for name, value in state.items()}
    ours |= {f"embedder.{tail}": state[name] for tail, name in first.items()}
    grid = config["sample_size"] // config["patch_size"]
    theirs = {POSITIONS: torch.from_numpy(position_embedding(width, grid)).float()[None]}
    for their, our in _layers(config["num_layers"]).items():
        theirs |= {f"{their}.{part}": ours[f"{our}.{part}"] for part in PARTS}
    for block in range(config["num_layers"]):
        for part in PARTS:
            names = [f"transformer.transformer_blocks.{block}.{name}.{part}" for name in QKV]
            theirs[f"blocks.{block}.attn.qkv.{part}"] = torch.cat([ours[name] for name in names])
    table = ours[OUR_LABEL_TABLE]
    if table.any():
        theirs[LABEL_TABLE] = table[rows_of_classes(len(table) - 1, null_row)]
    return {name: theirs[name].detach().clone() for name in OriginalShape.of(theirs).tensors()}


def _layers(depth: int) -> dict[str, str]:
    """Layers by DiT's own name, with that of the training form; query, key and value are not among them."""
    blocks = {
        f"blocks.{block}.{their}": f"transformer.transformer_blocks.{block}.{our}"
        for block in range(depth)
        for their, our in BLOCK.items()
    }
    return {**EMBEDDERS, **blocks, **FINAL_LAYER}


def rows_of_classes(num_classes: int, null_row: int | None = None) -> Tensor:
    """Where each row of DiT's own label table, the classes' and then the last, "no class", lies in that of diffusers.

    Returns:
        int64 (num_classes + 1,).
    """
    if null_row is None:
        null_row = min(num_classes, NULL_CLASS)
    classes = torch.arange(num_classes)
    return torch.cat([classes + (classes >= null_row), torch.tensor([null_row])])


def position_embedding(width: int, grid: int) -> npt.NDArray[np.float64]:
    """DiT's position embedding: sines and cosines of a patch's column, then of its row, a quarter of the width each.

    The frequencies are those of Vaswani et al. (arXiv 1706.03762, section 3.5), from 1 down to 1/10000.

    Args:
        width: Of the network; a multiple of 4.
        grid: Patches along a side.

    Returns:
        float64 (grid x grid, width), row by row.
    """
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter) / quarter)
    angles = np.arange(grid)[:, None] * frequencies
    one_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    columns = np.broadcast_to(one_axis[None, :], (grid, grid, width // 2))
    rows = np.broadcast_to(one_axis[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], axis=2).reshape(grid * grid, width)


def _check_positions(positions: Tensor) -> None:
    grid, width = math.isqrt(positions.shape[1]), positions.shape[2]
    expected = torch.from_numpy(position_embedding(width, grid)).float()
    # Sines of other machines may differ in the last bit, and half precision has fewer.
    if not torch.allclose(positions[0].float(), expected, rtol=0, atol=4 * torch.finfo(positions.dtype).eps):
        raise InputError("its pos_embed is not DiT's (sines and cosines), and diffusers computes no other.")


@torch.no_grad()
def prediction_difference(transformer: DiTTransformer2DModel, constants: Mapping[str, float]) -> float:
    """How far predictions are from those of the same weights with other constants, on noise at a few timesteps.

    Args:
        transformer: On the CPU, in evaluation mode.
        constants: As `ORIGINAL_CONSTANTS` or `STOCK_CONSTANTS`.

    Returns:
        Root mean square of the difference over that of the predictions.
    """
    config: Any = transformer.config
    generator = keyed_generator(0, "conversion", 0)
    timesteps = torch.tensor([250, 500, 750, 999])
    shape = (len(timesteps), config["in_channels"], config["sample_size"], config["sample_size"])
    noise = torch.randn(shape, generator=generator)
    rows = torch.randint(0, config["num_embeds_ada_norm"] + 1, (len(timesteps),), generator=generator)

    def predict() -> Tensor:
        return cast(Tensor, transformer(noise, timestep=timesteps, class_labels=rows, return_dict=False)[0])

    own = predict()
    before = constants_of(transformer)
    try:
        _set_constants(transformer, constants)
        other = predict()
    finally:
        _set_constants(transformer, before)
    return float((own - other).square().mean().sqrt() / own.square().mean().sqrt())


def constants_of(transformer: DiTTransformer2DModel) -> dict[str, float]:
    """What a transformer computes with, as `ORIGINAL_CONSTANTS`."""
    return {key: transformer.config.get(key, stock) for key, stock in STOCK_CONSTANTS.items()}


def _set_constants(transformer: DiTTransformer2DModel, constants: Mapping[str, float]) -> None:
    for module in transformer.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = constants[FREQ_SHIFT]
    for block in transformer.transformer_blocks:
        cast(Any, block).norm3.eps = constants["norm_eps"]
