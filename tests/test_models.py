"""DiT in training form: sizes, initialisation, one embedder, gradients, and export to the stock class."""

import re
from itertools import pairwise

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from speed_diffusers import InputError, SpeeDDDPMScheduler
from speed_diffusers.models import (
    DIT_SIZES,
    MODEL_NAMES,
    NULL_CLASS,
    PATCH_SIZES,
    TrainableDiT,
    build_dit,
    dit_config,
    export_transformer,
    label_to_embedding_row,
    stock_state_dict,
)
from speed_diffusers.objective import denoising_loss
from tiny_run import DIT

SMALL = DIT | {"num_layers": 3}
MILLIONS = {"S": 32.865056, "B": 130.315808, "L": 457.840672, "XL": 674.83472}


def small_model(**options: bool) -> TrainableDiT:
    return build_dit(SMALL, torch.Generator().manual_seed(0), **options)


def stir(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Gives every parameter some noise, so that no output is zero because a layer still is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(size: int = 5, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(size, 4, 4, 4, generator=generator)
    rows = torch.tensor([3, NULL_CLASS, 0, 9, 999])[:size]
    return sample, torch.randint(0, 1000, (size,), generator=generator), rows


@pytest.mark.parametrize("size", MILLIONS)
def test_parameter_counts_are_dits(size: str) -> None:
    config = dit_config(f"DiT-{size}/2", sample_size=32, in_channels=4, out_channels=8, num_classes=1000)
    with torch.device("meta"):
        model = build_dit(config, None)
    assert sum(parameter.numel() for parameter in model.parameters()) == round(MILLIONS[size] * 1e6)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_builds_on_the_meta_device(name: str) -> None:
    config = dit_config(name, sample_size=32, in_channels=4, out_channels=4, num_classes=10)
    with torch.device("meta"):
        model = build_dit(config, None)
    size, patch = re.fullmatch(r"DiT-(\w+)/(\d)", name).groups()  # type: ignore[union-attr]
    shape = DIT_SIZES[size]
    assert len(model.transformer.transformer_blocks) == shape.num_layers
    assert model.transformer.inner_dim == shape.num_attention_heads * shape.attention_head_dim
    assert model.transformer.pos_embed.proj.kernel_size == (int(patch), int(patch))
    assert [type(block.norm1.emb).__name__ for block in model.transformer.transformer_blocks] == [
        "_PassThrough"
    ] * shape.num_layers


def test_model_names_are_all_sizes_and_patches() -> None:
    assert len(MODEL_NAMES) == len(DIT_SIZES) * len(PATCH_SIZES) == len(set(MODEL_NAMES))
    assert {"DiT-XL/2", "DiT-S/8", "DiT-tiny/2"} <= set(MODEL_NAMES)


def test_config_states_the_channels_and_at_least_1000_classes() -> None:
    config = dit_config("DiT-S/2", sample_size=8, in_channels=4, out_channels=8, num_classes=10)
    assert (config["out_channels"], config["num_embeds_ada_norm"]) == (8, 1000)
    many = dit_config("DiT-S/2", sample_size=8, in_channels=4, out_channels=4, num_classes=1200)
    assert many["num_embeds_ada_norm"] == 1200


@pytest.mark.parametrize(
    ("model", "sample_size", "message"),
    [
        ("DiT-XL-2", 32, "Unknown model 'DiT-XL-2'. Did you mean 'DiT-XL/2'?"),
        ("DiT-S/3", 32, "Unknown model 'DiT-S/3'. Did you mean "),
        ("DiT-S/8", 28, "model=DiT-S/8: patches of 8 do not divide latents of 28x28."),
    ],
)
def test_impossible_models_are_refused(model: str, sample_size: int, message: str) -> None:
    with pytest.raises(InputError) as error:
        dit_config(model, sample_size=sample_size, in_channels=4, out_channels=4, num_classes=10)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_rows_leave_the_null_row_free() -> None:
    labels = torch.tensor([0, 999, 1000, 1199])
    assert label_to_embedding_row(labels).tolist() == [0, 999, 1001, 1200]
    rows = label_to_embedding_row(torch.arange(1200)).tolist()
    assert NULL_CLASS not in rows and len(set(rows)) == 1200


def test_output_is_exactly_zero_at_first_and_the_loss_is_one() -> None:
    model = small_model().train()
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(1024, 4, 4, 4, generator=generator) for _ in range(2))
    timesteps = torch.randint(0, 1000, (1024,), generator=generator)
    rows = torch.arange(1024) % 10
    with torch.no_grad():
        assert torch.count_nonzero(model(clean, timesteps, rows)) == 0
        scheduler = SpeeDDDPMScheduler(speed_weighting="none")
        assert float(denoising_loss(model, scheduler, clean, rows, timesteps, noise).loss) == pytest.approx(
            1, abs=0.02
        )


def test_initialisation_is_dits() -> None:
    config = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 16}
    model = build_dit(config, torch.Generator().manual_seed(0)).requires_grad_(False)
    transformer, embedder = model.transformer, model.embedder
    zero = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in (*zero, transformer.proj_out_1, transformer.proj_out_2):
        assert torch.count_nonzero(linear.weight) == 0 and torch.count_nonzero(linear.bias) == 0
    table = embedder.class_embedder.embedding_table.weight
    for weight in (table, embedder.timestep_embedder.linear_1.weight, embedder.timestep_embedder.linear_2.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05) and abs(float(weight.mean())) < 0.002
    for block in transformer.transformer_blocks:
        width = 64
        # Query, key and value are one layer (h, 3h) in DiT's own code.
        bounds = dict.fromkeys((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v), (6 / (4 * width)) ** 0.5)
        bounds |= {
            linear: (6 / sum(linear.weight.shape)) ** 0.5
            for linear in (block.attn1.to_out[0], block.ff.net[0].proj, block.ff.net[2])
        }
        for linear, bound in bounds.items():
            assert bound * 0.99 < float(linear.weight.abs().max()) <= bound
            assert float(linear.weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
            assert torch.count_nonzero(linear.bias) == 0
    patches = transformer.pos_embed.proj
    bound = (6 / (64 + 4 * 2 * 2)) ** 0.5
    assert bound * 0.98 < float(patches.weight.abs().max()) <= bound
    assert torch.count_nonzero(patches.bias) == 0


def test_initialisation_is_a_function_of_the_generator() -> None:
    first, again = small_model().state_dict(), small_model().state_dict()
    other = build_dit(SMALL, torch.Generator().manual_seed(1)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["transformer.pos_embed.proj.weight"], other["transformer.pos_embed.proj.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_export_computes_the_same_bit_for_bit(tied: bool) -> None:
    model = stir(small_model(tie_embedders=tied)).train()
    exported = export_transformer(model.transformer.config, model.state_dict())
    assert type(exported) is DiTTransformer2DModel and not exported.training
    sample, timesteps, rows = inputs()
    with torch.no_grad():
        trained = model(sample, timesteps, rows)
        assert float(trained.abs().mean()) > 0.01
        for mode in (False, True):
            exported.train(mode)
            assert torch.equal(exported(sample, timestep=timesteps, class_labels=rows).sample, trained)
            assert torch.equal(model.train(mode)(sample, timesteps, rows), trained)


def test_export_shares_no_memory() -> None:
    model = small_model()
    exported = export_transformer(model.transformer.config, model.state_dict())
    addresses = [parameter.data_ptr() for parameter in (*exported.parameters(), *model.parameters())]
    assert len(set(addresses)) == len(addresses)


def test_stock_state_dict_copies_the_embedder_into_every_block() -> None:
    model = small_model()
    stock = stock_state_dict(model.state_dict(), 3)
    assert set(stock) == set(DiTTransformer2DModel(**SMALL).state_dict())
    table = "norm1.emb.class_embedder.embedding_table.weight"
    for layer in range(3):
        assert stock[f"transformer_blocks.{layer}.{table}"] is not None
        assert torch.equal(stock[f"transformer_blocks.{layer}.{table}"], stock[f"transformer_blocks.0.{table}"])


def test_exported_model_can_be_trained_on() -> None:
    model = stir(small_model())
    exported = export_transformer(model.transformer.config, model.state_dict())
    again = TrainableDiT(exported)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(again(*inputs()), model(*inputs()))


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    plain, recomputed = stir(small_model()).train(), stir(small_model()).train()
    recomputed.transformer.enable_gradient_checkpointing()
    for model in (plain, recomputed):
        model(*inputs()).square().mean().backward()
    for (name, first), second in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad), name
    assert recomputed.transformer.is_gradient_checkpointing and not plain.transformer.is_gradient_checkpointing


def test_different_embedders_are_not_tied() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="blocks 0 and 1 differ.*tie_embedders=false") as error:
        TrainableDiT(DiTTransformer2DModel(**SMALL))
    assert "\n" not in str(error.value)


def test_untied_model_is_the_stock_one_without_its_label_drop() -> None:
    torch.manual_seed(0)
    stock = DiTTransformer2DModel(**SMALL).eval()
    sample, timesteps, rows = inputs()
    with torch.no_grad():
        expected = stock(sample, timestep=timesteps, class_labels=rows).sample
        model = TrainableDiT(stock, tie_embedders=False).train()
        # The stock module would drop one label in ten, in each block anew.
        assert all(torch.equal(model(sample, timesteps, rows), expected) for _ in range(10))
    assert all(block.norm1.emb.class_embedder.dropout_prob == 0 for block in stock.transformer_blocks)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient_after_one_step(tied: bool) -> None:
    model = small_model(tie_embedders=tied).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sample, timesteps, rows = inputs()
    # At first only the output layer does; the zero layers before it open one a step.
    for _ in range(4):
        optimizer.zero_grad()
        (model(sample, timesteps, rows) - sample).square().mean().backward()
        optimizer.step()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    # Keys' biases move every attention logit alike, so only rounding reaches them.
    assert [name for name in missing if not name.endswith("to_k.bias")] == []


def test_training_changes_the_null_row_and_the_rows_of_the_labels() -> None:
    model = small_model().train()
    table = model.embedder.class_embedder.embedding_table.weight
    before = table.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    sample, timesteps, rows = inputs()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(sample, timesteps, rows) - sample).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = (table.detach() != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(rows.tolist())
    assert losses[-1] < 0.9 * losses[0] and all(later != earlier for earlier, later in pairwise(losses))
    with torch.no_grad():
        conditional = model(sample, timesteps, torch.full((5,), 3))
        unconditional = model(sample, timesteps, torch.full((5,), NULL_CLASS))
    assert float((conditional - unconditional).abs().max()) > 1e-4


def test_more_than_1000_classes() -> None:
    config = {**SMALL, "num_embeds_ada_norm": 1200}
    model = stir(build_dit(config, torch.Generator().manual_seed(0))).train()
    assert model.embedder.class_embedder.embedding_table.weight.shape[0] == 1201
    exported = export_transformer(model.transformer.config, model.state_dict())
    sample, timesteps, _ = inputs(3)
    rows = label_to_embedding_row(torch.tensor([1100, 1000, 1199]))
    assert rows.tolist() == [1101, 1001, 1200]
    with torch.no_grad():
        assert torch.equal(
            exported(sample, timestep=timesteps, class_labels=rows).sample, model(sample, timesteps, rows)
        )


@pytest.mark.parametrize("heads", [2, 6])
def test_unit_embedders_make_a_conditioning_of_size_1_at_any_width(heads: int) -> None:
    config = dit_config("DiT-tiny/2", sample_size=4, in_channels=4, out_channels=4, num_classes=10)
    config |= {"num_layers": 1, "num_attention_heads": heads, "attention_head_dim": 64}
    sizes = {}
    for kind in ("dit", "unit"):
        model = build_dit(config, torch.Generator().manual_seed(0), conditioning_init=kind)
        timesteps, rows = torch.arange(0, 1000, 10), torch.arange(100) % 10
        conditioning = model.embedder(timesteps, rows, hidden_dtype=torch.float32)
        sizes[kind] = float(conditioning.detach().square().mean().sqrt())
    assert sizes["unit"] == pytest.approx(1.0, abs=0.08) and sizes["dit"] < 0.06
    with pytest.raises(InputError, match="Unknown conditioning_init 'units'. Did you mean 'unit'"):
        build_dit(config, torch.Generator(), conditioning_init="units")
