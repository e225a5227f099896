"""Exported pipelines: stock classes, names that survive, and generation where this package was never imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from speed_diffusers import SpeeDDDIMScheduler, SpeeDDDPMScheduler
from speed_diffusers.generation.export import SIDECAR, embedding_row_names, inference_pipeline, save_pipeline
from speed_diffusers.models import TrainableDiT, build_dit, export_transformer
from speed_diffusers.training.ema import ExponentialMovingAverage
from tiny_run import DIT, file_size_limit

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse, top", "sneaker", "bag", "boot"]

STRANGER = """
import sys
import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

plain, speed, output = sys.argv[1:]
generate = dict(num_inference_steps=3, guidance_scale=2.0, output_type="np")
pipeline = DiTPipeline.from_pretrained(plain)
pipeline.set_progress_bar_config(disable=True)
assert type(pipeline) is DiTPipeline and type(pipeline.scheduler) is DDIMScheduler
assert type(pipeline.transformer) is DiTTransformer2DModel
rows = pipeline.get_label_ids(["sneaker", "blouse"])
assert rows == [7, 6], rows
images = pipeline(class_labels=rows, generator=torch.Generator().manual_seed(0), **generate).images
np.save(output, images)
assert not [name for name in sys.modules if name.startswith("speed_diffusers")]

import speed_diffusers
ours = DiTPipeline.from_pretrained(speed)
ours.set_progress_bar_config(disable=True)
assert type(ours.scheduler) is speed_diffusers.SpeeDDDIMScheduler, type(ours.scheduler)
assert ours.scheduler.config.speed_k == 3.0 and ours.scheduler.speed_tables.settings.tau == 700
again = ours(class_labels=rows, generator=torch.Generator().manual_seed(0), **generate).images
assert np.array_equal(images, again)
"""


def trained_model(num_embeds: int = 1000) -> TrainableDiT:
    """A model whose output is not zero, as after some training."""
    generator = torch.Generator().manual_seed(0)
    model = build_dit({**DIT, "num_embeds_ada_norm": num_embeds}, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def vae(tiny_vae: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_vae)


def pipeline_of(vae: AutoencoderKL, names: list[str] | None = NAMES, **schedule: object) -> DiTPipeline:
    model = trained_model()
    transformer = export_transformer(model.transformer.config, model.state_dict())
    pipeline = inference_pipeline(transformer, vae, SpeeDDDPMScheduler(**schedule), names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline: DiTPipeline, rows: list[int], guidance_scale: float = 2.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "output_type": "np"}
    return pipeline(class_labels=rows, generator=generator, **options).images


def test_opens_and_guides_where_this_package_was_never_imported(vae: AutoencoderKL, tmp_path: Path) -> None:
    pipeline = pipeline_of(vae)
    save_pipeline(pipeline, tmp_path / "plain", {"seed": 0})
    expected = images_of(pipeline, [7, 6])
    assert not np.allclose(expected, images_of(pipeline, [7, 6], guidance_scale=1.0), atol=1e-3), "guidance acts"
    pipeline.scheduler = SpeeDDDIMScheduler.from_config(pipeline.scheduler.config, speed_k=3.0)
    pipeline.save_pretrained(tmp_path / "speed")

    arguments = [str(tmp_path / name) for name in ("plain", "speed", "images.npy")]
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert expected.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=1e-6)


def test_files_name_stock_classes_only(vae: AutoencoderKL, tmp_path: Path) -> None:
    save_pipeline(pipeline_of(vae), tmp_path / "pipeline", {})
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    for path in (tmp_path / "pipeline").rglob("*.json"):
        assert "speed_" not in path.read_text(), path


def test_names_survive_saving_and_loading(vae: AutoencoderKL, tmp_path: Path) -> None:
    save_pipeline(pipeline_of(vae), tmp_path / "pipeline", {})
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["id2label"] == {str(row): name for row, name in enumerate(NAMES)}
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert len(loaded.labels) == 11
    assert loaded.get_label_ids(["boot", "top", "blouse"]) == [9, 6, 6]


def test_model_without_classes_has_no_names(vae: AutoencoderKL, tmp_path: Path) -> None:
    save_pipeline(pipeline_of(vae, names=None), tmp_path / "pipeline", {})
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == {} and embedding_row_names(None) == {}
    assert np.isfinite(images_of(loaded, [1000], guidance_scale=1.0)).all()


def test_more_than_1000_classes_leave_row_1000_free(vae: AutoencoderKL, tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(1200)]
    rows = embedding_row_names(names)
    assert rows[999] == "class 999" and 1000 not in rows and rows[1001] == "class 1000" and rows[1101] == "class 1100"
    assert len(rows) == 1200 and max(rows) == 1200

    model = trained_model(1200)
    transformer = export_transformer(model.transformer.config, model.state_dict())
    pipeline = inference_pipeline(transformer, vae, SpeeDDDPMScheduler(), names)
    save_pipeline(pipeline, tmp_path / "pipeline", {})
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.get_label_ids(["class 1100", "class 999"]) == [1101, 999]
    assert np.isfinite(images_of(loaded, [1101, 1200])).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_sampler_has_the_schedule_of_the_training(vae: AutoencoderKL, kind: str) -> None:
    schedule = {"num_train_timesteps": 400, "beta_schedule": "scaled_linear", "beta_end": 0.012}
    scheduler = pipeline_of(vae, prediction_type=kind, **schedule).scheduler
    assert type(scheduler) is DDIMScheduler
    assert torch.equal(scheduler.betas, SpeeDDDPMScheduler(**schedule).betas)
    config = scheduler.config
    assert config.prediction_type == kind and config.clip_sample is False and config.timestep_spacing == "leading"
    assert [key for key in config if key.startswith("speed_")] == []


def test_schedule_that_ends_without_signal_is_sampled_from_its_end(vae: AutoencoderKL) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    pipeline = pipeline_of(vae, **options)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert torch.equal(pipeline.scheduler.betas, SpeeDDDPMScheduler(**options).betas)
    pipeline.scheduler.set_timesteps(5)
    assert int(pipeline.scheduler.timesteps[0]) == 999
    assert np.isfinite(images_of(pipeline, [1, 2])).all()


def test_trained_betas_are_kept(vae: AutoencoderKL) -> None:
    betas = np.linspace(0.001, 0.05, 50).tolist()
    scheduler = pipeline_of(vae, trained_betas=betas, num_train_timesteps=50).scheduler
    np.testing.assert_allclose(scheduler.betas.numpy(), betas, rtol=1e-6)


def test_the_average_exports_as_the_model_does(vae: AutoencoderKL) -> None:
    model = trained_model()
    ema = ExponentialMovingAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update()
    exported = export_transformer(model.transformer.config, ema.state_dict())
    sample = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps, rows = torch.tensor([3, 900]), torch.tensor([1, 1000])
    model.load_state_dict(ema.state_dict(), strict=False)
    with torch.no_grad():
        expected = model(sample, timesteps, rows)
        assert torch.equal(exported(sample, timestep=timesteps, class_labels=rows).sample, expected)


def test_sidecar_and_permissions(vae: AutoencoderKL, tmp_path: Path) -> None:
    save_pipeline(pipeline_of(vae), tmp_path / "pipeline", {"seed": 3, "speed": {"speed_k": 5.0}})
    sidecar = tmp_path / "pipeline" / SIDECAR
    assert json.loads(sidecar.read_text()) == {"seed": 3, "speed": {"speed_k": 5.0}}
    weights = list((tmp_path / "pipeline").rglob("*.safetensors"))
    assert len(weights) == 2
    assert {path.stat().st_mode for path in weights} == {sidecar.stat().st_mode}


def test_saving_replaces_a_pipeline_whole(vae: AutoencoderKL, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    save_pipeline(pipeline_of(vae), folder, {"run": 1})
    (folder / "old.txt").write_text("of the first pipeline")
    save_pipeline(pipeline_of(vae, names=None), folder, {"run": 2})
    assert json.loads((folder / SIDECAR).read_text()) == {"run": 2}
    assert not (folder / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_failed_saving_leaves_the_old_pipeline_and_no_part_of_the_new(vae: AutoencoderKL, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    save_pipeline(pipeline_of(vae), folder, {"run": 1})
    with pytest.raises(TypeError, match="JSON"):
        save_pipeline(pipeline_of(vae), folder, {"run": object()})
    assert json.loads((folder / SIDECAR).read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_full_disk_names_the_pipeline_and_its_bytes(vae: AutoencoderKL, tmp_path: Path) -> None:
    with (
        file_size_limit(20_000),
        pytest.raises(OSError, match=r"write .*/pipeline: .*\([\d,]+ bytes needed, [\d,]+ fr"),
    ):
        save_pipeline(pipeline_of(vae), tmp_path / "pipeline", {})
    assert not list(tmp_path.iterdir())
