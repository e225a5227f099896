"""DiT as it should be trained with diffusers: its sizes, initialisation, one conditioning embedder, and export.

`DiTTransformer2DModel` gives every block its own timestep and label embedder, each with its own random label dropout,
and leaves the initialisation to torch's defaults. Here one embedder stands beside the transformer during training, its
output travels through the blocks' `timestep` argument, and `export` copies it into every block again, so that the
stock class computes the same function bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, Timesteps
from torch import Tensor, nn

from .config.schema import Interval
from .errors import InputError, unknown_name

NULL_CLASS = 1000
"""Row of the label table that means "no class": the literal that the stock `DiTPipeline` guides with."""

FREQ_SHIFT = "freq_shift"
"""Key of a transformer's config, named as in diffusers' UNets: the frequencies of a timestep's sines and cosines are
10000^(-i / (128 - freq_shift)), i = 0 to 127. The stock DiT knows no such key and has 1, DiT's own code has 0."""

STOCK_FREQ_SHIFT = 1

PATCH_SIZES = (2, 4, 8)

CONDITIONING_INITS = ("dit", "unit")
"""How the embedders of timestep and label begin: as in DiT, or so that their sum has unit size whatever the width."""

DIT_EMBEDDER_STD = 0.02

SILU_POWER = 0.3557755
"""E[silu(x)^2] for standard normal x, by quadrature."""

FUSED, FUSED_GAIN = (".to_q", ".to_k", ".to_v"), 2**-0.5
"""Layers that are parts of one in DiT's own code, and what that makes of their Xavier bound: sqrt(6 / 4h)."""


@dataclass(frozen=True)
class DiTSize:
    """Depth, heads and channels per head of one DiT (Peebles and Xie, arXiv 2212.09748, table 1)."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int


DIT_SIZES: dict[str, DiTSize] = {
    "tiny": DiTSize(6, 4, 32),
    "S": DiTSize(12, 6, 64),
    "B": DiTSize(12, 12, 64),
    "L": DiTSize(24, 16, 64),
    "XL": DiTSize(28, 16, 72),
}
"""DiT's four sizes and one that trains on a laptop's CPU in minutes."""

MODEL_NAMES = tuple(f"DiT-{size}/{patch}" for size in DIT_SIZES for patch in PATCH_SIZES)


def dit_config(
    model: str, *, sample_size: int, in_channels: int, out_channels: int, num_classes: int
) -> dict[str, Any]:
    """The `DiTTransformer2DModel` config of a named size.

    Args:
        model: One of `MODEL_NAMES`, such as "DiT-XL/2".
        sample_size: Side of the square latent; a multiple of the patch size.
        in_channels: Latent channels.
        out_channels: The same, or twice as many for a learned variance.
        num_classes: Classes of the data, at least 0 (0: unconditional).

    Raises:
        InputError: Unknown model, or a latent that the patch size does not divide.
    """
    if model not in MODEL_NAMES:
        raise unknown_name("model", model, MODEL_NAMES)
    name, patch = model.removeprefix("DiT-").split("/")
    if sample_size % int(patch):
        raise InputError(f"model={model}: patches of {patch} do not divide latents of {sample_size}x{sample_size}.")
    size = DIT_SIZES[name]
    return {
        "num_layers": size.num_layers,
        "num_attention_heads": size.num_attention_heads,
        "attention_head_dim": size.attention_head_dim,
        "patch_size": int(patch),
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        # At least 1000, so that row 1000 is the null class for any number of classes.
        "num_embeds_ada_norm": max(num_classes, NULL_CLASS),
        "norm_type": "ada_norm_zero",
    }


def stock_transformer(config: Mapping[str, Any]) -> DiTTransformer2DModel:
    """A stock transformer with untrained weights, its timestep frequencies those that the config names.

    Args:
        config: Config of a transformer, `FREQ_SHIFT` and what diffusers itself adds included.

    Raises:
        InputError: `FREQ_SHIFT` is no number in [0, 1].
    """
    known = {name: value for name, value in config.items() if not name.startswith("_") and name != FREQ_SHIFT}
    transformer: DiTTransformer2DModel = DiTTransformer2DModel(**known)
    if config.get(FREQ_SHIFT) is not None:
        transformer.register_to_config(**{FREQ_SHIFT: config[FREQ_SHIFT]})
    apply_freq_shift(transformer)
    return transformer


def apply_freq_shift(transformer: DiTTransformer2DModel) -> None:
    """Gives a transformer the timestep frequencies that its config names; without the key it stays as it is.

    Args:
        transformer: Changed in place.

    Raises:
        InputError: `FREQ_SHIFT` is no number in [0, 1].
    """
    shift = transformer.config.get(FREQ_SHIFT)
    if shift is None:
        return
    Interval("[0, 1]").require(FREQ_SHIFT, shift)
    for module in transformer.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = shift


def label_to_embedding_row(labels: Tensor) -> Tensor:
    """Class ids to rows of the label table: ids from 1000 up move by one, since row 1000 is the null class.

    Args:
        labels: int64, any shape, class ids from 0.
    """
    return labels + (labels >= NULL_CLASS).to(labels.dtype)


class _PassThrough(nn.Module):
    """Stands in for a block's embedder: the conditioning arrives ready-made as `timestep`."""

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep


class TrainableDiT(nn.Module):
    """A DiT in training form: one conditioning embedder, and a transformer whose blocks hold none.

    No parameter is shared and nothing is remembered between calls, so gradient checkpointing, compilation and
    sharding see an ordinary module.

    Args:
        transformer: A stock transformer; its blocks' embedders are taken out. Block 0's becomes the embedder. It is
            given the timestep frequencies that its config names (`FREQ_SHIFT`).
        tie_embedders: False keeps the stock module with an embedder in each block, its random label dropout off.

    Raises:
        InputError: The blocks' embedders differ, so tying them would change the function, or `FREQ_SHIFT` is no number
            in [0, 1].
    """

    def __init__(self, transformer: DiTTransformer2DModel, *, tie_embedders: bool = True) -> None:
        super().__init__()
        apply_freq_shift(transformer)
        self.transformer = transformer
        self.tie_embedders = tie_embedders
        self.embedder: nn.Module = nn.Identity()
        embedders = [cast(Any, block).norm1.emb for block in transformer.transformer_blocks]
        for embedder in embedders:
            # Labels are dropped once per sample, by the objective; the table keeps its null row.
            embedder.class_embedder.dropout_prob = 0.0
        if not tie_embedders:
            return
        for index, embedder in enumerate(embedders[1:], start=1):
            if embedder is not embedders[0] and not _equal_weights(embedder, embedders[0]):
                raise InputError(
                    f"The conditioning embedders of blocks 0 and {index} differ, so one cannot stand for all; "
                    "set tie_embedders=false to train the model as it is."
                )
        self.embedder = embedders[0]
        for block in transformer.transformer_blocks:
            cast(Any, block).norm1.emb = _PassThrough()

    def forward(self, sample: Tensor, timestep: Tensor, class_rows: Tensor) -> Tensor:
        """Predicts the target for a batch of noisy latents.

        Args:
            sample: Noisy latents (B, C, H, W), H = W.
            timestep: (B,), as the scheduler's `add_noise` took them.
            class_rows: int64 (B,), rows of the label table (`label_to_embedding_row`, or `NULL_CLASS`).

        Returns:
            (B, out_channels, H, W).
        """
        conditioning = timestep
        if self.tie_embedders:
            conditioning = self.embedder(timestep, class_rows, hidden_dtype=self.transformer.dtype)
        return cast(
            Tensor, self.transformer(sample, timestep=conditioning, class_labels=class_rows, return_dict=False)[0]
        )


def _equal_weights(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


def build_dit(
    config: Mapping[str, Any],
    generator: torch.Generator | None,
    *,
    tie_embedders: bool = True,
    conditioning_init: str = "dit",
) -> TrainableDiT:
    """A new DiT in training form with DiT's initialisation; its output is exactly zero.

    Args:
        config: As `dit_config` makes it.
        generator: Source of the initial weights; None leaves them as torch makes them (for meta devices).
        tie_embedders: As in `TrainableDiT`.
        conditioning_init: One of `CONDITIONING_INITS`, see `initialise`.

    Raises:
        InputError: No such initialisation.
    """
    transformer = stock_transformer(config)
    if tie_embedders:
        # One and the same in all blocks, so that tying them is no question: what they hold is overwritten.
        first = cast(Any, transformer.transformer_blocks[0]).norm1.emb
        for block in transformer.transformer_blocks:
            cast(Any, block).norm1.emb = first
    model = TrainableDiT(transformer, tie_embedders=tie_embedders)
    if generator is not None:
        initialise(model, generator, conditioning_init)
    return model


@torch.no_grad()
def initialise(model: TrainableDiT, generator: torch.Generator, conditioning_init: str = "dit") -> None:
    """DiT's initialisation (Peebles and Xie, arXiv 2212.09748, section 3.2, adaLN-Zero).

    Xavier-uniform linear layers with zero bias, the patch embedding like a linear layer, embedders N(0, 0.02^2), and
    zeros for every adaLN projection and the output layer. DiT's query, key and value are one layer (h, 3h), whose
    Xavier bound is sqrt(2) smaller than that of three layers (h, h).

    With the embedders at N(0, 0.02^2) the vector that conditions the blocks begins at a root mean square of about 0.03
    in a network 128 wide and 0.09 in XL, so that classes and noise levels are told apart late. "unit" draws the same
    normal numbers with another scale: label and timestep make half of a vector of root mean square 1 each.

    Args:
        model: A new model; its weights are overwritten.
        generator: Source of the numbers; both initialisations take the same ones.
        conditioning_init: "dit" or "unit".

    Raises:
        InputError: No such initialisation.
    """
    if conditioning_init not in CONDITIONING_INITS:
        raise unknown_name("conditioning_init", conditioning_init, CONDITIONING_INITS)
    transformer = cast(Any, model.transformer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = FUSED_GAIN if name.endswith(FUSED) else 1.0
            nn.init.xavier_uniform_(module.weight, gain=gain, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1), generator=generator)
    nn.init.zeros_(patches.bias)
    for embedder in model.modules():
        if isinstance(embedder, CombinedTimestepLabelEmbeddings):
            weights = (
                embedder.class_embedder.embedding_table.weight,
                embedder.timestep_embedder.linear_1.weight,
                embedder.timestep_embedder.linear_2.weight,
            )
            stds = _unit_stds(*weights[1:]) if conditioning_init == "unit" else (DIT_EMBEDDER_STD,) * 3
            for weight, std in zip(weights, stds, strict=True):
                nn.init.normal_(weight, std=std, generator=generator)
    for linear in (
        *(block.norm1.linear for block in transformer.transformer_blocks),
        transformer.proj_out_1,
        transformer.proj_out_2,
    ):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _unit_stds(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """What makes label and timestep embeddings of mean square 1/2, whose sum then has 1."""
    # Sines and cosines of the same angles: the mean square of what enters the first layer is 1/2 at every timestep.
    return math.sqrt(0.5), math.sqrt(2.0 / first.shape[1]), math.sqrt(0.5 / (SILU_POWER * second.shape[1]))


def stock_state_dict(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The state dict of the stock class from that of the training form: the embedder copied into every block.

    Args:
        state: State dict of a `TrainableDiT`, or its EMA weights.
        num_layers: Number of blocks.
    """
    stock = {
        name.removeprefix("transformer."): value for name, value in state.items() if name.startswith("transformer.")
    }
    for name, value in state.items():
        if name.startswith("embedder."):
            for layer in range(num_layers):
                stock[f"transformer_blocks.{layer}.norm1.emb.{name.removeprefix('embedder.')}"] = value
    return stock


def export_transformer(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiTTransformer2DModel:
    """A stock transformer that computes exactly what the training form with this state does.

    Args:
        config: Config of the training form's transformer.
        state: State dict of the training form, or its EMA weights.
    """
    transformer = stock_transformer(config)
    transformer.load_state_dict(stock_state_dict(state, transformer.config["num_layers"]))
    for block in transformer.transformer_blocks:
        cast(Any, block).norm1.emb.class_embedder.dropout_prob = 0.0
    return transformer.eval()
