"""What can be done with a run before it is finished, and with one that was never trained for what is asked of it."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from speed_diffusers.errors import InputError
from speed_diffusers.generation.pretrained import training_config_of
from speed_diffusers.metrics.score_record import load_scores
from speed_diffusers.train_scripts import evaluate, sample, train_dit_speed
from speed_diffusers.training.run_folder import load_label_names

FEW = ["num_images_per_class=1", "num_inference_steps=2"]
SCORE = ["num_images=6", "num_inference_steps=2", "metrics=frechet_distance"]
NEVER_TRAINED = "with class_dropout_prob=0 the model is never trained without its classes, so guidance_scale=2"


@pytest.fixture(scope="module")
def trained(tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps with checkpoints at 2 and 4, whose data are gone and whose classes share a name."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    folder = tmp_path_factory.mktemp("half_trained")
    data = folder / "data"
    rng = np.random.default_rng(0)
    for name in ("cat", "cat, feline", "caf\u00e9"):
        (data / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data / name / f"{index}.png")
    options = {
        "train_data_dir": data,
        "dataset_name": "None",
        "pretrained_vae_model_name_or_path": tiny_vae,
        "cache_dir": folder / "cache",
        "output_dir": folder / "run",
        "model": "DiT-tiny/4",
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "class_dropout_prob": 0,
        "guidance_scale": 1,
        "report_to": "[]",
        "num_score_images": "None",
    }
    train_dit_speed.main([f"{key}={value}" for key, value in options.items()])
    shutil.rmtree(data)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, half trained: without its pipeline."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pipeline")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_a_half_trained_run_is_sampled_without_its_data(
    run: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_label_names(run) == ["caf\u00e9", "cat", "cat, feline"]
    options = [*FEW, "class_labels=cat,feline,cafe\u0301,1000"]
    # The newest checkpoint holds what became the pipeline.
    sample.main([f"model={run}", *options, "output=half.png", "guidance_scale=1"])
    assert "run has no pipeline yet: taking the EMA weights of checkpoint-4" in caplog.text
    sample.main([f"model={trained}", *options, "output=whole.png", "guidance_scale=1"])
    half, whole = (np.asarray(Image.open(name).convert("RGB"), dtype=int) for name in ("half.png", "whole.png"))
    # Below the title, which names the model.
    assert np.array_equal(half[60:], whole[60:])
    evaluate.main([f"models={run}", "checkpoints=true", *SCORE, "class_labels=feline"])
    labels = [record.score.protocol.labels for record in load_scores(run / "scores")]
    assert labels == ["2 in turn", "2 in turn"]


def test_the_newest_whole_checkpoint_is_taken_or_its_lack_is_one_line(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoint-4" / "ema.safetensors").write_bytes(b"torn")
    sample.main([f"model={run}", *FEW, "output=half.png"])
    assert "Passing over a damaged checkpoint" in caplog.text and "EMA weights of checkpoint-2" in caplog.text
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(InputError, match="model=run: the run has no pipeline and no whole checkpoint yet"):
        sample.main([f"model={run}", *FEW, "output=none.png"])
    assert not Path("none.png").exists()


def test_a_run_that_kept_no_names_asks_its_data_for_them(run: Path) -> None:
    for damage in (lambda file: file.write_text("["), lambda file: file.unlink()):
        damage(run / "label_names.json")
        with pytest.raises(InputError, match="data"):
            sample.main([f"model={run}", *FEW, "output=half.png"])


def test_guidance_that_was_never_trained_warns(run: Path, trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    for model in (run, trained, trained / "pipeline"):
        sample.main([f"model={model}", *FEW, "output=unguided.png", "guidance_scale=1"])
        assert NEVER_TRAINED not in caplog.text
        sample.main([f"model={model}", *FEW, "output=guided.png", "guidance_scale=2"])
        assert f"{model}: {NEVER_TRAINED}" in caplog.text
        caplog.clear()
    assert training_config_of(str(trained))["class_dropout_prob"] == 0
    assert training_config_of(str(run)) == {} == training_config_of("nowhere/at-all")
    sample.main([*FEW, "output=embedded.png", "guidance_scale=2"])
    assert "class_dropout_prob" not in caplog.text
    evaluate.main([f"models={trained}", *SCORE, "guidance_scale=2", "output_dir=scores"])
    assert NEVER_TRAINED in caplog.text


@pytest.mark.parametrize(("changes", "warns"), [([], False), (["class_dropout_prob=0"], True)])
def test_a_guided_grid_that_is_never_trained_for_warns_before_training(
    tiny_options: list[str], changes: list[str], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    with caplog.at_level(logging.WARNING):
        train_dit_speed.main([*tiny_options, *changes, "guidance_scale=2", "dry_run=true"])
    assert (NEVER_TRAINED in caplog.text) is warns


def test_a_model_that_diverged_is_one_error_and_no_picture(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    (weights,) = (tmp_path / "pipeline" / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out_2.bias"].fill_(float("nan"))
    save_file(tensors, weights)
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["_class_name"] == DiTPipeline.__name__
    output = tmp_path / "samples.png"
    with pytest.raises(FloatingPointError, match="The model generated NaN or infinite values in 3 of 3 images"):
        sample.main([f"model={tmp_path / 'pipeline'}", *FEW, f"output={output}"])
    assert not output.exists()
