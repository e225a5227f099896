"""Recomputed activations and compiled blocks: the same training, under the same names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from run_outputs import assert_same_checkpoint, metrics
from speed_diffusers.config.load import load_config, save_config
from speed_diffusers.errors import InputError
from speed_diffusers.models import TrainableDiT, build_dit
from speed_diffusers.training.blocks import compile_blocks, prepare_blocks, recompute_activations, recomputed_blocks
from speed_diffusers.training.config import TrainConfig
from tiny_run import DIT


def network(seed: int = 0) -> TrainableDiT:
    """Four blocks with random weights everywhere."""
    core = build_dit(DIT | {"num_layers": 4}, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return core.train()


def gradients(core: TrainableDiT) -> dict[str, Tensor]:
    sample = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    core(sample, torch.tensor([1, 500, 900]), torch.tensor([0, 7, 1000])).square().mean().backward()
    return {name: parameter.grad for name, parameter in core.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("share", "layers"),
    [(0.0, []), (0.25, [3]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (0.1, []), (0.9, [0, 1, 2, 3])],
)
def test_a_share_of_the_blocks_is_spread_evenly(share: float, layers: list[int]) -> None:
    assert recomputed_blocks(4, share) == layers


@pytest.mark.parametrize("layers", [1, 12, 28])
def test_every_share_recomputes_that_many_blocks(layers: int) -> None:
    for share in (0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0):
        found = recomputed_blocks(layers, share)
        assert len(found) == round(share * layers) and set(found) <= set(range(layers))
        gaps = [later - earlier for earlier, later in zip(found, found[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_recomputed_blocks_run_twice_and_give_the_same_gradients(share: float) -> None:
    plain, recomputed = network(), network()
    prepare_blocks(recomputed, TrainConfig(gradient_checkpointing=share))
    runs = dict.fromkeys(range(4), 0)
    for layer, block in enumerate(recomputed.transformer.transformer_blocks):

        def count(*_: object, layer: int = layer) -> None:
            runs[layer] += 1

        block.register_forward_pre_hook(count)
    expected, found = gradients(plain), gradients(recomputed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = recomputed_blocks(4, share)
    assert runs == {layer: 2 if layer in again else 1 for layer in range(4)}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_compiled_blocks_are_one_graph_with_the_same_gradients_and_names(share: float) -> None:
    plain, compiled = network(), network()
    recompute_activations(compiled, share)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled, "aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    expected, found = gradients(plain), gradients(compiled)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], dict(counters)


def test_the_options_decide() -> None:
    core = network()
    prepare_blocks(core, TrainConfig())
    blocks = core.transformer.transformer_blocks
    assert not core.transformer.is_gradient_checkpointing
    assert all(block._compiled_call_impl is None for block in blocks)
    prepare_blocks(core, TrainConfig(gradient_checkpointing=True, compile=True, compile_backend="eager"))
    assert core.transformer.is_gradient_checkpointing
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert core.transformer._compiled_call_impl is None


def test_compiled_runs_and_plain_ones_take_over_each_others_checkpoints(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole")
    compiled = train(
        tmp_path / "compiled",
        f"resume_from_checkpoint={whole / 'checkpoint-5'}",
        "compile=true",
        "compile_backend=aot_eager",
        "gradient_checkpointing=0.5",
    )
    resumed = train(tmp_path / "resumed", f"resume_from_checkpoint={compiled / 'checkpoint-10'}")
    for run in (compiled, resumed):
        assert_same_checkpoint(whole, run, 12)
        assert (run / "pipeline" / "model_index.json").exists()
    assert metrics(resumed)[-1] == metrics(whole)[-1]


@pytest.mark.usefixtures("fresh_accelerate")
def test_compiling_twice_is_refused(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(InputError, match=r"compile=true, and accelerate is configured to compile too \(.*EAGER\)"):
        train(tmp_path / "run", "compile=true")
    assert not (tmp_path / "run").exists()


def test_a_backend_without_compile_is_refused() -> None:
    with pytest.raises(InputError, match="compile_backend=eager: only compile=true knows it"):
        TrainConfig(compile_backend="eager")


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("gradient_checkpointing=true", 1.0),
        ("gradient_checkpointing=false", 0.0),
        ("--gradient_checkpointing", 1.0),
        ("gradient_checkpointing=0.5", 0.5),
        ("gradient_checkpointing=1", 1.0),
    ],
)
def test_a_share_may_be_written_as_true_or_false(words: str, share: float, tmp_path: Path) -> None:
    config = load_config(TrainConfig, [words], tmp_path)
    assert config.gradient_checkpointing == share
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, [f"config={tmp_path / 'config.yaml'}"], tmp_path) == config


def test_what_a_run_of_old_saved_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("gradient_checkpointing: true\n")
    assert load_config(TrainConfig, [f"config={tmp_path / 'config.yaml'}"], tmp_path).gradient_checkpointing == 1.0


@pytest.mark.parametrize("wrong", ["maybe", "2", "-0.1", "nan"])
def test_a_share_is_nothing_else(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gradient_checkpointing.*(a finite number, true or false|\[0, 1\])"):
        load_config(TrainConfig, [f"gradient_checkpointing={wrong}"], tmp_path)
