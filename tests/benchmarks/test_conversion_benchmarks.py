"""The benchmarks around converted and fine-tuned checkpoints, at tiny size and as they were committed."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import fine_tuning
import timestep_frequencies
from speed_diffusers.assets import EMBEDDED_IMAGES
from speed_diffusers.errors import InputError
from speed_diffusers.metrics import load_extractor

ROOT = Path(__file__).resolve().parents[2]


def test_no_weights_make_up_for_other_frequencies(tmp_path: Path) -> None:
    timestep_frequencies.main(["num_images=2", f"results_dir={tmp_path}"])
    found = json.loads((tmp_path / "result.json").read_text())
    committed = json.loads((ROOT / "benchmarks/timestep_frequencies/result.json").read_text())
    assert found["features_not_explained"] == committed["features_not_explained"] > 0
    assert found["embedding"] == pytest.approx(committed["embedding"], rel=0.05)
    exchanged, fitted = found["predictions"]
    assert exchanged[0] == pytest.approx(0, abs=1e-6) and fitted[0] > 0.01, "at t = 0 all frequencies agree"
    assert all(one < other for one, other in zip(fitted[6:], exchanged[6:], strict=True)), "from t = 200 on"
    assert "70 of 256 features" in (tmp_path / "table.md").read_text()
    assert Image.open(tmp_path / "timestep_frequencies.png").width > 500


def test_turned_images_are_scored_as_upright_ones(tmp_path: Path) -> None:
    path = fine_tuning.turned_images(tmp_path)
    turned, upright = (
        datasets.load_dataset("parquet", data_files=str(each), split="train") for each in (path, EMBEDDED_IMAGES)
    )
    assert turned["label"] == upright["label"] and turned.features["label"] == upright.features["label"]
    pixels, originals = (
        torch.stack([pil_to_tensor(image.convert("RGB")) for image in rows[:4]["image"]]).float() / 255
        for rows in (turned, upright)
    )
    assert torch.equal(pixels.flip(2), originals) and not torch.equal(pixels, originals)
    found = fine_tuning.extractor_of_turned_images()(pixels)
    for one, other in zip(found, load_extractor()(originals), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_the_committed_table_is_that_of_the_committed_runs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks/fine_tuning", results)
    committed = (results / "table.md").read_text()
    fine_tuning.main(["report_only=true", f"results_dir={results}"])
    assert (results / "table.md").read_text() == committed
    one = results / "paper-0.json"
    one.write_text(one.read_text().replace('"num_inference_steps": 25', '"num_inference_steps": 26', 1))
    with pytest.raises(InputError, match="the scores were measured under 2 protocols"):
        fine_tuning.main(["report_only=true", f"results_dir={results}"])
    with pytest.raises(InputError, match="Give a folder for the turned images and the runs: work_dir="):
        fine_tuning.main([f"results_dir={results}"])
