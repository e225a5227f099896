"""Pretrained parts by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, VQModel

from speed_diffusers.assets import EMBEDDED_PIPELINE
from speed_diffusers.errors import InputError
from speed_diffusers.generation.pretrained import load_pipeline, load_transformer, load_vae
from speed_diffusers.pipelines import SpeeDDiTPipeline


def test_the_embedded_pipeline_opens_and_knows_its_classes() -> None:
    pipeline = load_pipeline("embedded")
    assert type(pipeline) is SpeeDDiTPipeline and isinstance(pipeline, DiTPipeline)
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.labels["Sneaker"] == 7 and len(pipeline.labels) == 10
    assert pipeline.transformer.dtype == torch.float32


@pytest.mark.parametrize("load", [load_vae, load_transformer])
def test_a_model_is_found_by_every_kind_of_folder(load: Callable[[str], torch.nn.Module], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "pipeline").symlink_to(EMBEDDED_PIPELINE)
    component = "vae" if load is load_vae else "transformer"
    states = [
        load(str(name)).state_dict() for name in ("embedded", EMBEDDED_PIPELINE, EMBEDDED_PIPELINE / component, run)
    ]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    assert all(value.dtype == torch.float32 for value in states[0].values())


def test_a_folder_without_what_is_asked_for_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no pipeline"):
        load_pipeline(str(tmp_path))
    with pytest.raises(InputError, match="holds no vae"):
        load_vae(str(tmp_path))
    with pytest.raises(InputError, match="Could not load the pipeline 'no/such'.*"):
        load_pipeline("no/such")
    (tmp_path / "config.json").write_text("{damaged")
    with pytest.raises(InputError, match="config.json cannot be read as JSON"):
        load_vae(str(tmp_path))


def test_a_model_of_another_class_is_named(tmp_path: Path) -> None:
    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**tiny, **blocks).save_pretrained(tmp_path / "tiny")
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for folder, name in ((tmp_path / "tiny", "AutoencoderTiny"), (tmp_path, "VQModel")):
        with pytest.raises(InputError, match=rf"^The vae '.*' is of class {name}; allowed: AutoencoderKL, whose"):
            load_vae(str(folder))
    with pytest.raises(InputError, match="is of class DiTTransformer2DModel; allowed: AutoencoderKL"):
        load_vae(str(EMBEDDED_PIPELINE / "transformer"))
    with pytest.raises(InputError, match="The transformer .* is of class AutoencoderKL; allowed: DiTTransformer2DMod"):
        load_transformer(str(EMBEDDED_PIPELINE / "vae"))


def test_weights_in_half_precision_alone_are_taken_and_others_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vae = load_vae("embedded")
    vae.save_pretrained(tmp_path, variant="fp16")
    loaded = load_vae(str(tmp_path))
    assert "has its weights in half precision alone" in caplog.text
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.state_dict().items())
    half = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="Could not load the vae"):
        load_vae(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    half.rename(tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    half.write_bytes(b"damaged")
    with pytest.raises(InputError, match="Could not load the vae"):
        load_vae(str(tmp_path))
    half.unlink()
    listed = r"neither diffusion_pytorch_model.safetensors nor .*fp16.safetensors; its files: config.json, .*bf16.safe"
    with pytest.raises(InputError, match=listed):
        load_vae(str(tmp_path))
