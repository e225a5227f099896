"""Pretrained parts by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

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
