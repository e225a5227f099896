"""The training script on a tiny run: what it leaves, that it resumes exactly, and that it keeps its promises."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from speed_diffusers.data.batch_sampler import BatchLayout, BatchOrder
from speed_diffusers.errors import InputError
from speed_diffusers.metrics.score_record import load_score
from speed_diffusers.train_scripts.train_dit_speed import main
from speed_diffusers.training.checkpoint_folders import list_checkpoints
from speed_diffusers.training.checkpoints import read_state
from speed_diffusers.training.profiling import OperationCounter

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def run_folder(options: list[str]) -> Path:
    """The folder of the run that a command line names."""
    return Path(next(option.removeprefix("output_dir=") for option in options if option.startswith("output_dir=")))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times, which are never the same twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("images_per_second", "seconds")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def final_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: parameters, averages, moments."""
    files = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
    assert [file.name for file in files] == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_checkpoint(first: Path, second: Path, step: int) -> None:
    """Bit-equal parameters, averages and moments."""
    one, other = final_tensors(first, step), final_tensors(second, step)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """The same checkpoint at the end, and the same losses all along."""
    assert_same_checkpoint(first, second, step)
    assert metrics(first) == metrics(second)


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


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["gradient_accumulation_steps=2", "random_flip=true", "lr_scheduler=linear"],
        ["cache_latents=false", "random_flip=true", "dataloader_num_workers=2", "speed_sampling=uniform"],
    ],
    ids=["plain", "accumulation and flips", "images from workers"],
)
def test_resume_in_the_middle_is_exact(
    tiny_options: list[str], tmp_path: Path, extra: list[str], fresh_accelerate: Callable[[], None]
) -> None:
    main(tiny_options + extra)
    whole = run_folder(tiny_options)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for checkpoint in ("checkpoint-10", "checkpoint-12"):
        shutil.rmtree(broken / checkpoint)
    shutil.rmtree(broken / "pipeline")
    _fresh = [option for option in tiny_options if not option.startswith("output_dir=")]
    fresh_accelerate()
    main([*_fresh, *extra, f"output_dir={broken}", "resume_from_checkpoint=latest"])
    assert_same_run(whole, broken, 12)
    assert (broken / "pipeline" / "model_index.json").exists()


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


def test_another_split_of_the_global_batch_resumes_with_more_accumulation(
    tiny_options: list[str], fresh_accelerate: Callable[[], None]
) -> None:
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
    assert not any(str(tmp_path) in str(value) for value in settings.values())


def test_a_folder_that_is_in_use_is_refused(tiny_options: list[str]) -> None:
    folder = run_folder(tiny_options)
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="is being written by another process"):
        main(tiny_options)
    assert [path.name for path in folder.iterdir()] == [".lock"]


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
    with pytest.raises(FloatingPointError, match=r"The gradients of step \d are not finite"):
        main([*tiny_options, "learning_rate=1e38", "max_grad_norm=None"][1:] + tiny_options[:1])
    assert not list_checkpoints(run_folder(tiny_options))
