"""DiT's own checkpoints as folders of diffusers and back, against DiT's network written down a second time."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from original_network import predict, random_state
from pipeline_parts import autoencoder, pipeline_of, transformer
from speed_diffusers.assets import EMBEDDED_PIPELINE
from speed_diffusers.errors import InputError
from speed_diffusers.generation.conversion import read_folder, read_original, write_folder, write_original
from speed_diffusers.generation.generate import row_names_of
from speed_diffusers.generation.original_dit import (
    STOCK_CONSTANTS,
    constants_of,
    original_state,
    prediction_difference,
)
from speed_diffusers.generation.pretrained import load_pipeline, load_transformer
from speed_diffusers.models import TrainableDiT
from speed_diffusers.pipelines import SpeeDDiTPipeline

TIMESTEPS = torch.tensor([0, 1, 17, 250, 500, 750, 998, 999])
DIT_TINY = {"width": 128, "depth": 6}


def saved(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """A training checkpoint as DiT's own code leaves it: its options are an object, not a dictionary."""
    model = {name: value if name == "pos_embed" else torch.zeros_like(value) for name, value in state.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    options = argparse.Namespace(model="DiT-XL/2", results_dir=Path("results"))
    torch.save({"model": model, "ema": state, "opt": optimizer, "args": options, **more}, path)
    return path


def answers(model: Any, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Noisy latents, and what a model of diffusers' predicts from them."""
    noise = torch.randn(8, 4, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return noise, model(noise, timestep=TIMESTEPS, class_labels=labels, return_dict=False)[0]


@pytest.mark.parametrize(
    ("shape", "labels", "rows"),
    [
        ({**DIT_TINY, "rows": 1001}, [0, 3, 999, 1000] * 2, [0, 3, 999, 1000] * 2),
        ({"width": 48, "depth": 2, "rows": 11, "out": 4}, [0, 3, 9, 10] * 2, [0, 3, 9, 10] * 2),
        ({"width": 48, "depth": 2, "rows": 1201, "patch": 4, "side": 16}, [999, 1000, 1199, 1200] * 2,
         [999, 1001, 1200, 1000] * 2),
        ({"width": 48, "depth": 2, "rows": None}, [0] * 8, [0, 1, 999, 1000] * 2),
    ],
    ids=["DiT-tiny", "10 classes, fixed variance", "1200 classes, patches of 4", "no classes"],
)  # fmt: skip
def test_predictions_are_the_original_networks_and_the_way_back_is_the_identity(
    shape: dict[str, Any], labels: list[int], rows: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = random_state(**shape)
    heads = None if shape["width"] == 128 else 3
    path = saved(tmp_path / "original.pt", state)
    write_folder(
        read_original(path, num_attention_heads=heads), tmp_path / "pipeline", vae=autoencoder(), source=path.name
    )
    side = shape.get("side", 8)
    with caplog.at_level(logging.WARNING):
        ours = load_transformer(str(tmp_path / "pipeline")).eval()
    assert "freq_shift" not in caplog.text
    pipeline = SpeeDDiTPipeline.from_pretrained(tmp_path / "pipeline")
    noise, _ = answers(ours, torch.tensor(rows), side)
    expected = predict(state, noise, TIMESTEPS, torch.tensor(labels), heads=heads or 4)
    assert expected.std() > 0.1
    trained = TrainableDiT(DiTTransformer2DModel.from_pretrained(tmp_path / "pipeline" / "transformer")).eval()
    for model in (ours, pipeline.transformer):
        torch.testing.assert_close(answers(model, torch.tensor(rows), side)[1], expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        found = trained(noise, TIMESTEPS, torch.tensor(rows))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    write_original(read_folder(str(tmp_path / "pipeline")), tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert list(back) != [] and back.keys() == state.keys()
    assert [name for name in state if not torch.equal(back[name], state[name])] == []


def test_the_stock_pipeline_opens_the_folder_and_predicts_something_else_as_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_original(saved(tmp_path / "original.pt", random_state(**DIT_TINY)))
    write_folder(checkpoint, tmp_path / "pipeline", vae=autoencoder(), source="original.pt")
    stock = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(stock.transformer) is DiTTransformer2DModel and type(stock.scheduler) is DDIMScheduler
    measured = prediction_difference(checkpoint.transformer, {**STOCK_CONSTANTS, "norm_eps": 1e-6})
    assert 0.01 < measured < 1
    rows = torch.arange(8)
    own, other = answers(checkpoint.transformer, rows, 8)[1], answers(stock.transformer, rows, 8)[1]
    assert torch.equal(own[0], other[0]), "all frequencies agree at t = 0"
    assert float((own - other).square().mean().sqrt() / own.square().mean().sqrt()) == pytest.approx(measured, rel=1)
    # Wrapped into ours, the same parts predict what the original network does.
    wrapped = SpeeDDiTPipeline(**stock.components)
    assert torch.equal(answers(wrapped.transformer, rows, 8)[1], own)
    wrapped.save_pretrained(tmp_path / "again")
    assert torch.equal(answers(load_pipeline(str(tmp_path / "again")).transformer, rows, 8)[1], own)


def test_either_set_of_weights_and_a_bare_state_dict(tmp_path: Path) -> None:
    state = random_state(**DIT_TINY)
    path = saved(tmp_path / "both.pt", state, step=torch.tensor(7))
    bare = tmp_path / "bare.pt"
    torch.save({name: value.half() for name, value in state.items()}, bare)
    first = {}
    for name, (file, weights) in {"ema": (path, "ema"), "model": (path, "model"), "half": (bare, "ema")}.items():
        model = read_original(file, weights=weights).transformer
        assert model.dtype == torch.float32
        first[name] = model.proj_out_2.weight
    own = state["final_layer.linear.weight"]
    assert (
        torch.equal(first["ema"], own) and torch.equal(first["half"], own.half().float()) and not first["model"].any()
    )


@pytest.mark.parametrize("kind", ["embedded", "flow"])
def test_a_folder_of_ours_comes_back_with_all_that_dits_code_has_no_place_for(kind: str, tmp_path: Path) -> None:
    folder = EMBEDDED_PIPELINE
    if kind == "flow":
        folder = tmp_path / "flow"
        pipeline_of(transformer(), FlowMatchEulerDiscreteScheduler(shift=2.0)).save_pretrained(folder)
        # Blocks are to have one embedder, as in DiT.
        model = load_transformer(str(folder))
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        model.save_pretrained(folder / "transformer")
    before = read_folder(str(folder))
    assert constants_of(before.transformer) == STOCK_CONSTANTS
    write_original(before, tmp_path / "ours.pt")
    write_folder(read_original(tmp_path / "ours.pt"), tmp_path / "back", vae=autoencoder(), source="ours.pt")
    after = read_folder(str(tmp_path / "back"))
    weights, others = before.transformer.state_dict(), after.transformer.state_dict()
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    configs = [
        {
            key: value
            for key, value in each.transformer.config.items()
            if not key.startswith("_") and key != "freq_shift"
        }
        for each in (before, after)
    ]
    assert configs[0] == configs[1] and constants_of(after.transformer) == STOCK_CONSTANTS
    assert type(before.scheduler) is type(after.scheduler)
    kept = [{key: value for key, value in each.scheduler.config.items() if key[0] != "_"} for each in (before, after)]
    assert kept[0] == kept[1]
    assert before.id2label == after.id2label and bool(before.id2label) == (kind == "embedded")
    assert prediction_difference(before.transformer, constants_of(after.transformer)) == 0


def test_classes_keep_their_names_where_no_class_moves(tmp_path: Path) -> None:
    names = {row: f"class {row}" for row in range(1, 11)}
    model = transformer(rows=10)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    pipeline_of(model, id2label=names, null_class_id=0).save_pretrained(tmp_path / "folder")
    write_original(read_folder(str(tmp_path / "folder")), tmp_path / "ours.pt")
    write_folder(read_original(tmp_path / "ours.pt"), tmp_path / "back", vae=autoencoder(), source="ours.pt")
    folders = [load_pipeline(str(tmp_path / name)) for name in ("folder", "back")]
    assert [each.null_class_id for each in folders] == [0, 10]

    def answers_by_name(pipeline: SpeeDDiTPipeline) -> dict[str, Tensor]:
        rows = {name: row for row, name in row_names_of(pipeline).items()} | {"no class": pipeline.null_class_id}
        labels = torch.tensor([rows[name] for name in sorted(rows)])
        sample = torch.ones(len(labels), 4, *[pipeline.transformer.config.sample_size] * 2)
        with torch.no_grad():
            found = pipeline.transformer(sample, torch.full((len(labels),), 500), labels, return_dict=False)[0]
        return dict(zip(sorted(rows), found, strict=True))

    before, after = map(answers_by_name, folders)
    assert len(before) == 11 and before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_fine_tuned_run_keeps_the_frequencies_of_its_start(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = tmp_path / "start"
    checkpoint = read_original(saved(tmp_path / "original.pt", random_state(**DIT_TINY, patch=4, side=8)))
    write_folder(checkpoint, start, vae=None, source="original.pt")
    assert {path.name for path in start.iterdir()} == {"transformer", "scheduler"}
    options = [f"pretrained_model_name_or_path={start}", "variance_type=learned_range", "prediction_type=epsilon"]
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path / "run", *options, "max_train_steps=2", "learning_rate=1e-30", "lr_scheduler=constant",
                    "lr_warmup_steps=0")  # fmt: skip
    assert "freq_shift=0" in caplog.text and "stock DiTPipeline" in caplog.text
    assert json.loads((run / "pipeline/transformer/config.json").read_text())["freq_shift"] == 0
    # Steps too small for float32: what comes out is what went in, down to the predictions.
    rows = torch.arange(8)
    assert torch.equal(
        answers(load_pipeline(str(run)).transformer, rows, 8)[1], answers(checkpoint.transformer, rows, 8)[1]
    )
    assert torch.equal(
        load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")["proj_out_2.weight"],
        checkpoint.transformer.proj_out_2.weight,
    )


def test_what_dits_network_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="embedders of blocks 0 and 1 differ, but DiT's own network has one for all"):
        original_state(transformer())
    odd = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=2, out_channels=4, attention_bias=False
    )
    with pytest.raises(InputError, match="DiT's own network has attention_bias=True, the transformer False"):
        original_state(odd)
    folder = tmp_path / "folder"
    transformer(rows=10).save_pretrained(folder)
    for wrong, message in (
        (2, r"freq_shift=2: must lie in \[0, 1\]"),
        ("no", "freq_shift is .no., but must be a number"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "freq_shift": wrong}))
        with pytest.raises(InputError, match=message):
            load_transformer(str(folder))
