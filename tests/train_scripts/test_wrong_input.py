"""Wrong input to the training script: one clear line, nothing written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts.train_dit_speed import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def fails(options: list[str], message: str, output_dir: Path) -> None:
    """The options raise this one line and leave nothing at the output folder."""
    existed = output_dir.exists()
    with pytest.raises(InputError, match=message) as caught:
        main(options)
    assert "\n" not in str(caught.value)
    assert output_dir.exists() == existed
    assert not list(output_dir.parent.glob(".tmp*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("lerning_rate=1", "Unknown config key 'lerning_rate'. Did you mean 'learning_rate'"),
        ("train_batch_size=many", "train_batch_size.*'many'.*whole number"),
        ("train_batch_size=0", "train_batch_size=0: must lie in"),
        ("max_train_steps=-5", "max_train_steps=-5: must lie in"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps=0: must lie in"),
        ("logging_steps=0", "logging_steps=0: must be at least 1"),
        ("learning_rate=0", "learning_rate=0.0: must be above 0"),
        ("ema_decay=1", r"ema_decay=1.0: must lie in \[0, 1\)"),
        ("class_dropout_prob=1.5", r"class_dropout_prob=1.5: must lie in \[0, 1\)"),
        ("seed=-1", "seed=-1: must lie in"),
        ("guidance_scale=0.5", "guidance_scale=0.5: must lie in"),
        ("num_inference_steps=2000", "num_inference_steps=2000: at most num_train_timesteps=1000"),
        ("speed_sampling=asymetric", r"\(speed_sampling\) 'asymetric'. Did you mean 'asymmetric'"),
        ("speed_weighting=p3", r"Unknown loss weighting \(speed_weighting\) 'p3'. Did you mean 'p2'"),
        ("speed_tau=1001", r"speed_tau=1001.0: must be a whole number in \[1, 1000\]"),
        ("speed_tau=0", r"speed_tau=0.0: must be a whole number in \[1, 1000\]"),
        ("speed_lambda=5", r"speed_lambda=5.0: must lie in \[0.5, 1\]"),
        ("speed_lambda=0.4", r"speed_lambda=0.4: must lie in \[0.5, 1\]"),
        ("speed_k=0.5", r"speed_k=0.5: must lie in \[1, 1e6\]"),
        ("speed_r=1", "speed_r=1.0: must be above 1"),
        ("model=DiT-XL/3", "Unknown model 'DiT-XL/3'. Did you mean 'DiT-XL/"),
        ("num_score_images=1", "num_score_images=1: must lie in"),
        ("sampler=ddmp", "Unknown sampler 'ddmp'.*Did you mean 'ddpm'"),
        ("variance_type=learned", "Unknown variance_type 'learned'.*Did you mean 'learned_range'"),
        (
            "weight_variance_loss=true",
            "weight_variance_loss=true, but only variance_type=learned_range has a variance",
        ),
        ("prediction_type=eps", "Unknown prediction_type 'eps'.*Did you mean 'epsilon'"),
        ("mixed_precision=fp16", "Unknown mixed_precision 'fp16'.*Allowed: bf16, no"),
        ("resolution=33", "33 is not a multiple of the VAE's factor 4.*Nearest: 32 or 36"),
        ("resolution=40", "patches of 4 do not divide latents of 10x10"),
        ("num_classes=1", "num_classes=1: the data has 2 classes, with ids up to 1; allowed: at least 2"),
        ("image_column=picture", "picture.*image"),
        ("label_column=breed", "breed.*label"),
        ("train_data_dir=nowhere", "nowhere"),
        ("dataset_name=embedded", "exactly one of dataset_name and train_data_dir; got both"),
        ("train_data_dir=None", "exactly one of dataset_name and train_data_dir; got neither"),
        ("config=imagenet_257", "imagenet_257"),
        ("validation_class_labels=bird", "Unknown class label 'bird'.*Allowed: cat, dog"),
        ("report_to=wandbb", "Unknown tracker.*Did you mean 'wandb'"),
        ("report_to=comet_ml", "report_to=comet_ml: not installed; run: pip install comet-ml"),
        ("pretrained_vae_model_name_or_path=no/vae", "Could not load the vae 'no/vae'"),
        ("pretrained_model_name_or_path=no/model", "Could not load the transformer 'no/model'"),
        (
            "resume_from_checkpoint=no-checkpoint",
            "no-checkpoint: no-checkpoint is not a folder",
        ),
        ("beta_schedule=cosine", "Unknown beta_schedule 'cosine'.*Allowed"),
        ("beta_end=2", r"beta_end=2.0: must lie in \(0, 1\)"),
        ("beta_start=0.5", "beta_start=0.5 beta_end=0.02: must be in order"),
        ("lr_scheduler=constant", "lr_warmup_steps=2: lr_scheduler=constant has none"),
    ],
    ids=lambda value: value if "=" in str(value) and " " not in str(value) else "",
)
def test_one_line_and_nothing_written(tiny_options: list[str], tmp_path: Path, wrong: str, message: str) -> None:
    key = wrong.split("=")[0]
    options = [option for option in tiny_options if not option.startswith(f"{key}=")]
    if key == "dataset_name":
        options = [option for option in tiny_options if not option.startswith("dataset_name=")]
    fails([*options, wrong], message, tmp_path / "run")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: launch with torchrun",
        ),
        ({"RANK": "1"}, "RANK=1, but not LOCAL_RANK, WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but not RANK"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1, WORLD_SIZE=1, but not LOCAL_RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: ranks and sizes are whole numbers"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: ranks and sizes are whole numbers"),
    ],
    ids=str,
)
def test_half_of_what_a_launcher_sets(
    tiny_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fails(tiny_options, message, tmp_path / "run")


def test_a_project_name_that_leaves_the_run(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options[:-1], "report_to=tensorboard", "tracker_project_name=../../x"]
    fails(options, "tracker_project_name=../../x: tensorboard makes a folder of it", tmp_path / "run")


def test_fine_tuning_keeps_what_the_model_predicts(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "pretrained_model_name_or_path=embedded", "prediction_type=epsilon"]
    fails(options, "prediction_type=epsilon, but embedded was trained with v_prediction", tmp_path / "run")


def test_fine_tuning_keeps_whether_a_variance_is_learned(tiny_options: list[str], tmp_path: Path) -> None:
    options = [
        option for option in tiny_options if not option.startswith(("train_data_dir", "dataset_", "pretrained"))
    ]
    options += ["dataset_name=embedded", "pretrained_vae_model_name_or_path=embedded", "resolution=32"]
    options += ["pretrained_model_name_or_path=embedded", "variance_type=learned_range"]
    fails(
        options,
        "its out_channels is 4, but resolution=32, variance_type=learned_range and the VAE need 8",
        tmp_path / "run",
    )


def test_a_score_that_could_not_be_measured(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    options = [option for option in tiny_options if not option.startswith("num_score_images")]
    fails([*options, "num_score_images=20"], "is of Fashion-MNIST, not of these images", tmp_path / "run")
    shipped = ["dataset_name=embedded", "pretrained_vae_model_name_or_path=embedded", f"output_dir={tmp_path / 'run'}"]
    for wrong, message in (
        (["score_reference=nowhere.safetensors"], "nowhere.safetensors"),
        (["feature_extractor=no_module:thing"], "no_module"),
        (["num_score_images=3"], "num_images=3"),
        (["resolution=64"], "The reference .* is of 32x32 images"),
    ):
        fresh_accelerate()
        fails([*shipped, *wrong], message, tmp_path / "run")


def test_a_schedule_without_signal_learns_no_variance_of_epsilon(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "variance_type=learned_range", "rescale_betas_zero_snr=true", "prediction_type=epsilon"]
    fails(options, "with rescale_betas_zero_snr take prediction_type=v_prediction", tmp_path / "run")


def test_a_schedule_without_signal_is_not_trained_to_predict_its_noise(
    tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, "rescale_betas_zero_snr=true", "prediction_type=epsilon"]
    fails(options, "rescale_betas_zero_snr=true prediction_type=epsilon: .*v_prediction", tmp_path / "run")


def test_rows_of_the_grid_are_in_the_label_table(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "validation_class_labels=cat,1001"]
    fails(options, "class_labels=1001: the model has rows 0 to 1000", tmp_path / "run")


def test_output_folder_that_is_a_file_or_cannot_be_written(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    options = [option for option in tiny_options if not option.startswith("output_dir=")]
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "run"):
        fresh_accelerate()
        fails([*options, f"output_dir={target}"], f"output_dir={target}: .*file is a file", target)
    assert file.read_text() == "mine"
    fresh_accelerate()
    # A folder that not even root can write to.
    fails([*options, "output_dir=/proc/run"], "output_dir=/proc/run: /proc is not writable", Path("/proc/run"))


def test_data_whose_labels_or_pictures_are_wrong(
    tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    options = [option for option in tiny_options if not option.startswith("train_data_dir=")]
    empty = tmp_path / "empty"
    empty.mkdir()
    fails([*options, f"train_data_dir={empty}"], "empty", tmp_path / "run")
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(flat / "a.png")
    fresh_accelerate()
    fails([*options, f"train_data_dir={flat}"], "label", tmp_path / "run")
    damaged = tmp_path / "damaged" / "cat"
    damaged.mkdir(parents=True)
    (damaged / "a.png").write_bytes(b"no picture")
    fresh_accelerate()
    fails([*options, f"train_data_dir={damaged.parent}"], "a.png|row 0", tmp_path / "run")
