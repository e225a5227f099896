"""The training script on a tiny run: what it leaves, what it keeps to, and that it overwrites nothing."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler, DiTPipeline
from filelock import FileLock
from PIL import Image

from run_outputs import final_tensors, metrics, run_folder
from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts import train_dit_speed
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR, main
from speed_diffusers.training.checkpoint_folders import list_checkpoints
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import open_data
from speed_diffusers.training.profiling import OperationCounter
from speed_diffusers.training.run_folder import load_run_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_run_leaves_pipeline_samples_metrics_and_config(tiny_options: list[str]) -> None:
    options = [*tiny_options[:-1], "report_to=tensorboard", "validation_steps=6", "checkpoints_total_limit=2"]
    main(options)
    folder = run_folder(tiny_options)
    pipeline = DiTPipeline.from_pretrained(folder / "pipeline")
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.labels == {"cat": 0, "dog": 1}
    images = pipeline(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))
    assert Image.open(folder / "samples.png").width > 100
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-0000006.png", "step-0000012.png"]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-12", "checkpoint-10"]
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    sidecar = json.loads((folder / "pipeline" / "speed_training.json").read_text())
    assert sidecar["training_config"]["speed_sampling"] == "asymmetric"
    assert not list(folder.glob(".tmp*"))


@pytest.mark.usefixtures("error_map")
def test_a_learned_variance_is_trained_saved_and_drawn_with(tiny_options: list[str]) -> None:
    learned = ["prediction_type=epsilon", "variance_type=learned_range"]
    main([*tiny_options, *learned])
    folder = run_folder(tiny_options)
    pipeline = DiTPipeline.from_pretrained(folder / "pipeline")
    assert pipeline.transformer.config.out_channels == 2 * pipeline.transformer.config.in_channels
    images = pipeline(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=2, output_type="np").images
    assert np.isfinite(images).all()
    lines = metrics(folder)
    assert all(line["variance_bits"] > 0 for line in lines)
    # The bias of the output layer has a mean's and a variance's half for each pixel of a patch; both learn.
    bias = final_tensors(folder, 12)["model/transformer.proj_out_2.bias"].reshape(4, 4, 2, 4)
    assert (bias.abs().amax((0, 1, 3)) > 0).all()
    assert Image.open(folder / "error_by_timestep.png").width > 500


def test_weighting_the_variance_term_changes_the_loss_alone(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    learned = ["prediction_type=epsilon", "variance_type=learned_range", "max_train_steps=1"]
    kept = [option for option in tiny_options if not option.startswith(("output_dir=", "max_train_steps="))]
    lines = []
    for weighted in ("false", "true"):
        fresh_accelerate()
        main([*kept, *learned, f"weight_variance_loss={weighted}", f"output_dir={tmp_path / weighted}"])
        lines.append(metrics(tmp_path / weighted)[0])
    assert lines[0]["loss"] > lines[1]["loss"] > lines[1]["squared_error"] * 0.4
    assert lines[0]["variance_bits"] == lines[1]["variance_bits"] > 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_learning_rate_is_a_function_of_the_optimizer_step(tiny_options: list[str], accumulation: int) -> None:
    schedule = ["lr_scheduler=linear", "learning_rate=0.01", f"gradient_accumulation_steps={accumulation}"]
    main(tiny_options + schedule)
    rates = [line["learning_rate"] for line in metrics(run_folder(tiny_options))]
    # Two steps of warm-up, then to zero at step 12; logged is the rate of the step to come.
    assert rates == pytest.approx([0.005, *(0.01 * (12 - step) / 10 for step in range(2, 13))])


def test_the_saved_configuration_repeats_the_run_and_deletes_nothing(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    main([*tiny_options, "overwrite_output_dir=true"])
    folder = run_folder(tiny_options)
    before = metrics(folder)
    fresh_accelerate()
    with pytest.raises(InputError, match="holds a run already"):
        main([f"config={folder / 'config.yaml'}"])
    fresh_accelerate()
    main([f"config={folder / 'config.yaml'}", f"output_dir={tmp_path / 'again'}"])
    assert metrics(tmp_path / "again") == before
    settings = json.loads((folder / "pipeline" / "speed_training.json").read_text())["training_config"]
    assert not [value for value in settings.values() if isinstance(value, str) and Path(value).is_absolute()]


def test_a_folder_that_is_in_use_is_refused(tiny_options: list[str]) -> None:
    folder = run_folder(tiny_options)
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="is being written by another process"):
        main(tiny_options)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_run_is_not_overwritten_by_accident(tiny_options: list[str], fresh_accelerate: Callable[[], None]) -> None:
    main(tiny_options)
    folder = run_folder(tiny_options)
    (folder / "notes.txt").write_text("mine")
    fresh_accelerate()
    with pytest.raises(InputError, match="holds a run already.*resume_from_checkpoint=latest.*overwrite_output_dir"):
        main(tiny_options)
    fresh_accelerate()
    main([*tiny_options, "overwrite_output_dir=true", "seed=1"])
    assert (folder / "notes.txt").read_text() == "mine"


def test_unconditional_training_makes_every_label_null(tiny_options: list[str]) -> None:
    main([*tiny_options, "label_column=None"])
    pipeline = DiTPipeline.from_pretrained(run_folder(tiny_options) / "pipeline")
    assert pipeline.labels == {}
    rows = final_tensors(run_folder(tiny_options), 12)["model/embedder.class_embedder.embedding_table.weight"]
    moments = final_tensors(run_folder(tiny_options), 12)[
        "optimizer/exp_avg_sq/embedder.class_embedder.embedding_table.weight"
    ]
    assert rows.shape[0] == 1001
    assert moments[1000].abs().max() > 0 and moments[:1000].abs().max() == 0


def test_fine_tuning_goes_on_from_a_pipeline(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    main(tiny_options)
    base = run_folder(tiny_options)
    fresh_accelerate()
    options = [option for option in tiny_options if not option.startswith("output_dir=")]
    main([*options, f"pretrained_model_name_or_path={base}", f"output_dir={tmp_path / 'tuned'}"])
    assert metrics(tmp_path / "tuned")[0]["loss"] < metrics(base)[0]["loss"]


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*tiny_options, "dry_run=true"])
    printed = capsys.readouterr().out
    assert "convergence [700, 1000) 7.9%" in printed and "12 of 4 images" in printed
    assert "mean weight E_p[w]" in printed and "FLOP" in printed
    assert not run_folder(tiny_options).exists()


def test_epochs_are_turned_into_steps_when_a_run_begins(
    tiny_options: list[str], fresh_accelerate: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [option for option in tiny_options if not option.startswith("max_train_steps")]
    source = open_data(load_config(TrainConfig, kept, SCRIPT_DIR))
    main([*kept, "num_train_epochs=2"])
    steps, half = -(-2 * len(source) // 4), -(-len(source) // 4)
    assert f"{steps} of 4 images (2.0 epochs)" in capsys.readouterr().out
    folder = run_folder(tiny_options)
    assert list_checkpoints(folder)[0].name == f"checkpoint-{steps}"
    saved = load_run_config(folder)
    assert (saved.max_train_steps, saved.num_train_epochs) == (steps, None)
    fresh_accelerate()
    with pytest.raises(InputError, match=f"max_train_steps={half}: .* has taken {steps} steps already"):
        main([*kept, "num_train_epochs=1", "resume_from_checkpoint=latest"])
    fresh_accelerate()
    cooldown = ["num_train_epochs=2", "lr_scheduler=warmup_stable_decay", f"lr_decay_steps={steps}"]
    with pytest.raises(InputError, match=rf"lr_decay_steps={steps}: .* here \[1, {steps - 2}\]"):
        main([*kept, *cooldown, "overwrite_output_dir=true"])


def test_steps_that_do_not_log_ask_the_device_for_nothing(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    options = [
        part for part in tiny_options if not part.startswith(("logging", "max_train", "output", "checkpointing"))
    ]
    counts = []
    for steps in (4, 4, 14):  # the first run also fills the cache of latents
        fresh_accelerate()
        run = [f"max_train_steps={steps}", f"output_dir={tmp_path / f'{len(counts)}'}", "logging_steps=100"]
        with OperationCounter() as counter:
            main([*options, *run, "checkpointing_steps=None"])
        counts.append(counter.scalar_reads)
    # Ten more steps, one log all the same.
    assert counts[1] > 0
    assert counts[2] == counts[1]


def test_gradients_that_are_not_finite_stop_the_run_before_they_are_applied(tiny_options: list[str]) -> None:
    message = (
        r"The gradients of step \d are not finite; .*4 of its 4 losses were not finite: rank 0 at timesteps \d+, \d"
    )
    with pytest.raises(FloatingPointError, match=message):
        main([*tiny_options, "learning_rate=1e38", "max_grad_norm=None"][1:] + tiny_options[:1])
    assert not list_checkpoints(run_folder(tiny_options))


def test_parameters_that_are_not_finite_are_neither_saved_nor_exported(tiny_options: list[str]) -> None:
    replaced = ("max_train_steps", "lr_warmup_steps")
    kept = [option for option in tiny_options if not option.startswith(replaced)]
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 1 \(transformer.*of \d+ tensors\); nothing of"
    ):
        main([*kept, "learning_rate=1e39", "lr_warmup_steps=0", "max_train_steps=1"])
    assert not list_checkpoints(run_folder(tiny_options))
    assert not (run_folder(tiny_options) / "pipeline").exists()


def test_an_error_does_not_stand_behind_the_progress_bar(
    tiny_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_dit_speed, "save_state", full)
    with pytest.raises(OSError, match="No space left") as kept:  # with its frames, and what they hold
        main(tiny_options)
    bar = capsys.readouterr().err
    assert "Training:" in bar and bar.endswith("\n") and kept.tb is not None
