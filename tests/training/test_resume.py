"""A run that goes on: exactly as if it had not been interrupted, or not at all."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from run_outputs import (
    assert_same_checkpoint,
    assert_same_run,
    final_tensors,
    metrics,
    run_folder,
    tensorboard_scalars,
)
from speed_diffusers.data import images
from speed_diffusers.data.batch_sampler import BatchLayout, BatchOrder
from speed_diffusers.errors import InputError
from speed_diffusers.metrics.score_record import load_score
from speed_diffusers.train_scripts.train_dit_speed import main
from speed_diffusers.training.checkpoints import read_state
from speed_diffusers.training.snapshots import is_half_trained

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize(
    "extra",
    [
        ["logging_steps=4", "report_to=tensorboard", "validation_steps=5"],
        ["gradient_accumulation_steps=2", "random_flip=true", "lr_scheduler=linear"],
        ["cache_latents=false", "random_flip=true", "dataloader_num_workers=2", "speed_sampling=uniform"],
    ],
    ids=["log lines and a grid across the stop", "accumulation and flips", "images from workers"],
)
def test_resume_in_the_middle_is_exact(train: Callable[..., Path], tmp_path: Path, extra: list[str]) -> None:
    whole = train(tmp_path / "whole", *extra)
    broken = shutil.copytree(whole, tmp_path / "broken")
    for checkpoint in ("checkpoint-10", "checkpoint-12"):
        shutil.rmtree(broken / checkpoint)
    shutil.rmtree(broken / "pipeline")
    for name in ("samples.png", "error_by_timestep.png"):
        (broken / name).unlink()
    shutil.rmtree(broken / "validation", ignore_errors=True)  # as if stopped before that of step 5
    train(broken, *extra, "resume_from_checkpoint=latest")
    assert_same_run(whole, broken, 12)
    assert (broken / "pipeline" / "model_index.json").exists()
    assert pictures(broken) == pictures(whole)
    # The broken run had logged up to step 12 before it went back to step 5.
    assert tensorboard_scalars(broken) == tensorboard_scalars(whole)


def digest(folder: Path, step: int) -> str:
    """SHA-256 over all of a checkpoint: parameters, averages, moments, learning rate, step, and the next ids."""
    state = read_state(folder / f"checkpoint-{step}")
    hashed = hashlib.sha256()
    for name, tensor in sorted(final_tensors(folder, step).items()):
        hashed.update(name.encode() + tensor.numpy().tobytes())
    order = BatchOrder(9000, BatchLayout(64), seed=0, first_step=state["step"], max_steps=state["step"] + 1)
    hashed.update(json.dumps([state["param_groups"], state["step"], state["global_batch"], list(order)]).encode())
    return hashed.hexdigest()


def test_resume_is_exact_on_the_quickstart(
    cache_dir: Path, tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    short = ["max_train_steps=6", "checkpointing_steps=3", "lr_warmup_steps=2", "logging_steps=1", "report_to=[]"]
    short += [f"cache_dir={cache_dir}", "num_validation_images=1", "num_inference_steps=1", "num_score_images=20"]
    main([*short, f"output_dir={tmp_path / 'whole'}"])
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-6")
    fresh_accelerate()
    main([*short, f"output_dir={tmp_path / 'broken'}", "resume_from_checkpoint=latest"])
    assert digest(tmp_path / "whole", 6) == digest(tmp_path / "broken", 6) != digest(tmp_path / "whole", 3)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    seconds = [read_state(tmp_path / "broken" / f"checkpoint-{step}")["seconds"] for step in (3, 6)]
    assert 0 < seconds[0] < seconds[1], "the time of both parts together"
    (file,) = (tmp_path / "whole" / "scores").iterdir()
    record = load_score(file)
    assert (record.step, record.images_seen, record.score.protocol.num_images) == (6, 384, 20)
    assert record.training_seconds is not None and record.score.frechet_distance is not None
    assert all(value is not None for value in record.score.values.values())
    sidecar = json.loads((tmp_path / "whole" / "pipeline" / "speed_training.json").read_text())
    assert sidecar["score"]["frechet_distance"] == record.score.frechet_distance
    again = load_score(tmp_path / "broken" / "scores" / file.name)
    assert again.score == record.score, "the same weights, the same images"


def test_another_split_of_the_global_batch_resumes_with_more_accumulation(
    tiny_options: list[str], fresh_accelerate: Callable[[], None]
) -> None:
    # The last line is of steps 9 to 12, two of them from before the stop, with half as many batches each.
    tiny_options = [option.replace("logging_steps=1", "logging_steps=4") for option in tiny_options]
    main(tiny_options)
    folder = run_folder(tiny_options)
    shutil.rmtree(folder / "checkpoint-12")
    before = metrics(folder)
    fresh_accelerate()
    options = [option for option in tiny_options if not option.startswith("train_batch_size")]
    main([*options, "train_batch_size=2", "resume_from_checkpoint=latest"])
    for one, other in zip(before, metrics(folder), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():  # None, where a bin had no sample, becomes NaN
            np.testing.assert_allclose(np.array(value, float), np.array(other[key], float), rtol=1e-4, err_msg=key)
    shutil.rmtree(folder / "checkpoint-12")
    fresh_accelerate()
    with pytest.raises(InputError, match="train_batch_size=3 x 1 process.* does not divide the global batch of 4"):
        main([*options, "train_batch_size=3", "resume_from_checkpoint=latest"])


def test_resume_refuses_changed_options_with_the_difference(
    tiny_options: list[str], fresh_accelerate: Callable[[], None]
) -> None:
    main(tiny_options)
    options = [*tiny_options, "resume_from_checkpoint=latest", "learning_rate=0.5", "speed_k=7"]
    fresh_accelerate()
    with pytest.raises(InputError, match=r"speed_k: 5.0 -> 7.0; learning_rate: 0.001 -> 0.5.*allow_config_ch"):
        main(options)
    fresh_accelerate()
    changed = ["adam_weight_decay=0.25", "adam_beta1=0.5", "allow_config_changes=true", "max_train_steps=14"]
    main([option for option in options if not option.startswith("max_train_steps")] + changed)
    (group,) = read_state(run_folder(tiny_options) / "checkpoint-14")["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.25, [0.5, 0.999])
    fresh_accelerate()
    options = [option for option in options if not option.startswith("max_train_steps")]
    with pytest.raises(InputError, match="max_train_steps=9: .*checkpoint-14 has taken 14 steps already; allowed: at"):
        main([*options, "allow_config_changes=true", "max_train_steps=9"])


def test_a_finished_run_that_goes_on_sets_its_results_aside(
    tiny_options: list[str],
    fresh_accelerate: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Half a way further on they would pass for those of the run as it is."""
    main(tiny_options)
    folder = run_folder(tiny_options)
    results = ("pipeline", "samples.png", "error_by_timestep.png")
    fresh_accelerate()
    main([*tiny_options, "resume_from_checkpoint=latest"])
    assert all((folder / name).exists() for name in results), "nothing was left to train"
    longer = [option for option in tiny_options if not option.startswith("max_train_steps")]
    longer += ["max_train_steps=16", "allow_config_changes=true", "resume_from_checkpoint=latest"]
    fresh_accelerate()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("speed_diffusers.train_scripts.train_dit_speed.save_results", interrupted)
        main(longer)
    assert not any((folder / name).exists() for name in results) and is_half_trained(str(folder))
    assert (folder / "pipeline.abandoned" / "model_index.json").is_file()
    assert (folder / "samples.abandoned.png").is_file() and (folder / "error_by_timestep.abandoned.png").is_file()
    assert "Resuming from step 12: pipeline is now pipeline.abandoned" in caplog.text
    fresh_accelerate()
    main(longer)
    assert all((folder / name).exists() for name in results)


def interrupted(run: object) -> None:
    raise KeyboardInterrupt


def test_data_that_has_moved_is_still_the_same(
    tiny_options: list[str], image_folder: Path, tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    main(tiny_options)
    shutil.rmtree(run_folder(tiny_options) / "checkpoint-12")
    shutil.copytree(image_folder, tmp_path / "elsewhere")
    options = [option for option in tiny_options if not option.startswith("train_data_dir=")]
    fresh_accelerate()
    main([*options, f"train_data_dir={tmp_path / 'elsewhere'}", "resume_from_checkpoint=latest"])
    (tmp_path / "elsewhere" / "cat" / "0.png").rename(tmp_path / "elsewhere" / "dog" / "new.png")
    fresh_accelerate()
    with pytest.raises(InputError, match="data signature"):
        main([*options, f"train_data_dir={tmp_path / 'elsewhere'}", "resume_from_checkpoint=latest"])


def test_another_runs_checkpoint_does_not_take_over_a_run(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    main(tiny_options)
    first = run_folder(tiny_options)
    options = [option for option in tiny_options if not option.startswith("output_dir=")]
    fresh_accelerate()
    main([*options, f"output_dir={tmp_path / 'second'}"])
    resume = f"resume_from_checkpoint={first / 'checkpoint-5'}"
    fresh_accelerate()
    with pytest.raises(InputError, match="holds a run already"):
        main([*options, f"output_dir={tmp_path / 'second'}", resume])
    fresh_accelerate()
    main([*options, f"output_dir={tmp_path / 'third'}", resume])
    assert_same_checkpoint(first, tmp_path / "third", 12)


def test_latest_begins_anew_where_there_is_no_checkpoint(tiny_options: list[str]) -> None:
    main([*tiny_options, "resume_from_checkpoint=latest"])
    assert (run_folder(tiny_options) / "checkpoint-12").is_dir()


def test_compiled_and_plain_runs_take_over_each_others_checkpoints(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    compiled = train(tmp_path / "compiled", f"resume_from_checkpoint={whole / 'checkpoint-5'}")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    resumed = train(tmp_path / "resumed", f"resume_from_checkpoint={compiled / 'checkpoint-10'}")
    for run in (compiled, resumed):
        assert_same_checkpoint(whole, run, 12)
        assert (run / "pipeline" / "model_index.json").exists()


def test_a_run_on_the_first_rows_goes_on_with_them(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["max_train_samples=16"]
    with monkeypatch.context() as patch:  # as version 0.1 took them
        patch.setattr(images, "_share", lambda num_rows, limit, first: range(limit))
        whole = train(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for step in (10, 12):
        shutil.rmtree(broken / f"checkpoint-{step}")
    shutil.rmtree(broken / "pipeline")
    train(broken, *options, "resume_from_checkpoint=latest")
    assert_same_run(whole, broken, 12)
    shutil.rmtree(broken / "checkpoint-12")
    train(broken, *options, "resume_from_checkpoint=latest")
    assert_same_checkpoint(whole, broken, 12)
    with pytest.raises(InputError, match="data signature"):
        train(broken, "max_train_samples=15", "resume_from_checkpoint=latest")
