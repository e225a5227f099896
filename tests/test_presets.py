"""Every configuration of train_scripts/configs starts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from speed_diffusers.config.load import load_config
from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.objective import denoising_loss, drop_labels
from speed_diffusers.presets import PRESETS
from speed_diffusers.train_scripts.train_dit_speed import main
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import make_learned_variance, make_scheduler

SCRIPT_DIR = Path(__file__).resolve().parents[1] / "train_scripts"
NAMES = sorted(
    path.relative_to(SCRIPT_DIR / "configs").with_suffix("").as_posix()
    for path in (SCRIPT_DIR / "configs").rglob("*.yaml")
    if path.name != "base.yaml"
)
STARTED_FOR_REAL = ["imagenet_256/dit_b2", "imagenet_256/dit_l2", "imagenet_256/dit_s2"]
STARTED_ON_META = ["imagenet_256/dit_xl2", "imagenet_256/dit_xl2_uniform"]
QUICKSTART = ["quickstart/fashion_mnist"]


@pytest.fixture(scope="module")
def vae_of_factor_8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of Stable Diffusion's autoencoder, 256 pixels to 4x32x32, with few channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae8")
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


def load(name: str) -> TrainConfig:
    return load_config(TrainConfig, [f"config={name}"], SCRIPT_DIR)


def test_no_configuration_is_left_out() -> None:
    assert sorted(STARTED_FOR_REAL + STARTED_ON_META + QUICKSTART) == NAMES


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", STARTED_FOR_REAL)
def test_an_imagenet_preset_takes_one_step(
    name: str, vae_of_factor_8: Path, image_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    main(
        [
            f"config={name}",
            f"train_data_dir={image_folder}",
            "dataset_name=None",
            f"pretrained_vae_model_name_or_path={vae_of_factor_8}",
            f"cache_dir={cache_dir}",
            f"output_dir={tmp_path}",
            "train_batch_size=1",
            "max_train_steps=1",
            "dataloader_num_workers=0",
            "validation_steps=None",
            "validation_class_labels=cat",
            "num_validation_images=1",
            "num_inference_steps=1",
            "report_to=[]",
        ]
    )
    moved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")["transformer.proj_out_2.bias"]
    assert moved.abs().max() > 0


@pytest.mark.parametrize("name", STARTED_ON_META)
def test_an_xl_preset_takes_one_step_without_its_memory(name: str) -> None:
    config = load(name)
    scheduler = make_scheduler(config)
    learned_variance = make_learned_variance(config, scheduler, torch.device("meta"))
    assert learned_variance is not None
    with torch.device("meta"):
        core = build_dit(
            dit_config(config.model, sample_size=32, in_channels=4, out_channels=8, num_classes=1000), None
        )
        clean, noise = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32)
        labels, dropped = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    timesteps = scheduler.sample_timesteps(2).to("meta")
    rows = drop_labels(labels, dropped)
    result = denoising_loss(core, scheduler, clean, rows, timesteps, noise, learned_variance)
    result.loss.backward()
    optimizer = torch.optim.AdamW(core.parameters(), lr=config.learning_rate, fused=False, foreach=True)
    optimizer.step()
    assert result.loss.shape == ()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in core.parameters())


def test_the_speed_presets_are_the_papers() -> None:
    for name in NAMES:
        config = load(name)
        preset = "uniform" if name.endswith("uniform") else "paper"
        assert {key: getattr(config, key) for key in PRESETS[preset]} == dict(PRESETS[preset])


def test_speed_and_uniform_differ_in_nothing_else() -> None:
    speed, uniform = load("imagenet_256/dit_xl2"), load("imagenet_256/dit_xl2_uniform")
    same = replace(speed, speed_sampling="uniform", speed_weighting="none", output_dir=uniform.output_dir)
    assert same == uniform


def test_the_imagenet_recipe_is_dits() -> None:
    config = load("imagenet_256/dit_xl2")
    assert (config.model, config.resolution, config.num_train_timesteps) == ("DiT-XL/2", 256, 1000)
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("linear", 1e-4, 0.02)
    assert (config.learning_rate, config.adam_weight_decay, config.lr_scheduler) == (1e-4, 0.0, "constant")
    assert (config.ema_decay, config.class_dropout_prob, config.random_flip) == (0.9999, 0.1, True)
    assert config.train_batch_size * 8 == 256
    assert (config.prediction_type, config.variance_type) == ("epsilon", "learned_range")
