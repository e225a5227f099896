"""Presets: SpeeD's, pinned to the numbers of the paper and of the authors' code, and the configurations of a training.

Every file in train_scripts/configs starts.
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from noise_schedules import process_named
from speed_diffusers import PRESETS, InputError, SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.config.load import load_config
from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.objective import denoising_loss, drop_labels
from speed_diffusers.settings import SPEED_DEFAULTS
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR, main
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.optimizer import make_optimizer
from speed_diffusers.training.parts import make_learned_variance, make_scheduler

# T p w of the authors' code with pairs of 256, k = 5, lambda = 0.6, tau = 700.
OBJECTIVE_OF_THE_AUTHORS = {0: 0.54, 50: 0.94, 219: 0.87, 400: 0.68, 641: 0.55, 643: 0.28, 700: 0.13, 999: 0.13}

NAMES = sorted(
    path.relative_to(SCRIPT_DIR / "configs").with_suffix("").as_posix()
    for path in (SCRIPT_DIR / "configs").rglob("*.yaml")
    if path.name != "base.yaml"
)
STARTED_FOR_REAL = ["imagenet_256/dit_s2", "imagenet_256/dit_s2_fast"]
STARTED_ON_META = [
    "imagenet_256/dit_b2",
    "imagenet_256/dit_l2",
    "imagenet_256/dit_xl2",
    "imagenet_256/dit_xl2_fast",
    "imagenet_256/dit_xl2_uniform",
    "imagenet_512/dit_xl2",
    "imagenet_512/dit_xl2_fast",
    "imagenet_512/dit_xl2_uniform",
]
QUICKSTART = ["quickstart/fashion_mnist", "quickstart/fast"]


def scheduler_of(preset: str, **config: object) -> SpeeDDDPMScheduler:
    return SpeeDDDPMScheduler(**PRESETS[preset], **config)


def test_the_presets_are_the_known_ones() -> None:
    assert list(PRESETS) == [
        "paper",
        "uniform",
        "official",
        "official_k2",
        "seed",
        "sampling_only",
        "weighting_only",
        "fixed_tau",
        "fast",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_made_of_config_keys_that_survive_the_config(preset: str) -> None:
    assert set(PRESETS[preset]) <= set(SPEED_DEFAULTS)
    config = scheduler_of(preset).config
    assert {key: config[key] for key in PRESETS[preset]} == PRESETS[preset]
    again = SpeeDDDPMScheduler.from_config(config)
    assert torch.equal(again.speed_tables.pmf, scheduler_of(preset).speed_tables.pmf)
    assert torch.equal(again.speed_tables.weights, scheduler_of(preset).speed_tables.weights)


def test_paper() -> None:
    scheduler = scheduler_of("paper")
    areas, tables = scheduler.speed_areas, scheduler.speed_tables
    assert (len(areas.acceleration), areas.convergence.start) == (219, 700)
    np.testing.assert_allclose(tables.pmf.numpy(), np.where(np.arange(1000) < 700, 5, 1) / 3800, rtol=1e-12)
    for timestep, weight in ((0, 0.409), (100, 0.539), (219, 0.6), (300, 0.577), (500, 0.458), (699, 0.407)):
        assert float(tables.weights[timestep]) == pytest.approx(weight, abs=5.1e-4)
    assert float(tables.weights.max()) == pytest.approx(0.6) and float(tables.weights[700:].max()) < 0.41


@pytest.mark.parametrize(("preset", "k", "mass"), [("official", 5, 0.042), ("official_k2", 2, 0.094)])
def test_official(preset: str, k: float, mass: float) -> None:
    tables = scheduler_of(preset).speed_tables
    assert (tables.pivot, tables.settings.tau, tables.settings.k) == (642, 700, k)
    paper = scheduler_of("paper").speed_tables
    np.testing.assert_array_equal(tables.weights[:700].numpy(), paper.weights[:700].numpy())
    assert bool((tables.weights[700:] == 1.0).all())
    np.testing.assert_allclose(
        tables.pmf.numpy(), np.where(np.arange(1000) < 700, k, 1) / (1000 + 700 * (k - 1)), rtol=1e-12
    )
    draws = scheduler_of(preset).sample_timesteps(32, generator=torch.Generator().manual_seed(0))
    assert draws[17:].tolist() == [642 - t if t < 642 else t - 642 for t in draws[:15].tolist()]
    many = torch.cat(
        [scheduler_of(preset).sample_timesteps(32, generator=torch.Generator().manual_seed(i)) for i in range(200)]
    )
    assert float((many >= 700).float().mean()) == pytest.approx(mass, abs=0.015)


def test_official_objective_is_that_of_the_authors_code() -> None:
    tables = scheduler_of("official").speed_tables
    mirrored = 2 * tables.drawn_pmf - tables.pmf
    law = (129 * tables.pmf + 127 * mirrored) / 256
    for timestep, value in OBJECTIVE_OF_THE_AUTHORS.items():
        assert float(1000 * law[timestep] * tables.weights[timestep]) == pytest.approx(value, abs=0.01), timestep


def test_seed() -> None:
    tables = scheduler_of("seed").speed_tables
    process = process_named("linear")
    assert tables.pivot == 642
    assert float(tables.pmf[0] / tables.pmf[-1]) == pytest.approx(5.0)
    assert float(tables.pmf[642:].sum()) == pytest.approx(0.100, abs=5e-4)
    np.testing.assert_allclose(tables.weights.numpy(), process.noise_level.numpy(), rtol=1e-9)
    assert bool((tables.weights.diff() > 0).all())


def test_halves_of_the_paper() -> None:
    paper, uniform = scheduler_of("paper").speed_tables, scheduler_of("uniform").speed_tables
    sampling, weighting = scheduler_of("sampling_only").speed_tables, scheduler_of("weighting_only").speed_tables
    assert torch.equal(sampling.pmf, paper.pmf) and torch.equal(sampling.weights, uniform.weights)
    assert torch.equal(weighting.pmf, uniform.pmf) and torch.equal(weighting.weights, paper.weights)
    assert sampling.randint is False and weighting.randint is uniform.randint is True


@pytest.mark.parametrize(("num_timesteps", "tau"), [(10, 7), (1000, 700), (4000, 2800)])
def test_fixed_tau_is_the_papers_at_700_of_1000(num_timesteps: int, tau: int) -> None:
    assert scheduler_of("fixed_tau", num_train_timesteps=num_timesteps).speed_tables.settings.tau == tau
    assert torch.equal(scheduler_of("fixed_tau").speed_tables.pmf, scheduler_of("paper").speed_tables.pmf)


def test_fixed_tau_keeps_steps_back_on_the_cosine_schedule_that_still_teach() -> None:
    config = {"beta_schedule": "squaredcos_cap_v2"}
    fixed, paper = scheduler_of("fixed_tau", **config), scheduler_of("paper", **config)
    assert (fixed.speed_tables.settings.tau, paper.speed_tables.settings.tau) == (700, 946)
    signal = 1 - fixed.speed_tables.process.noise_level
    assert float(signal[700]) > 0.2 and float(signal[946]) < 0.007


@pytest.mark.parametrize("preset", ["official", "official_k2", "seed"])
def test_code_of_the_authors_needs_a_pivot(preset: str) -> None:
    with pytest.raises(InputError, match="the pivot of the authors' code does not exist"):
        SpeeDFlowMatchEulerDiscreteScheduler(**PRESETS[preset])


def test_official_needs_its_700_timesteps() -> None:
    with pytest.raises(InputError, match=r"speed_tau=700: must be a whole number in \[1, 500\]"):
        scheduler_of("official", num_train_timesteps=500)


@pytest.mark.parametrize("preset", ["paper", "uniform", "sampling_only", "weighting_only", "fixed_tau"])
def test_the_papers_forms_work_on_a_flow(preset: str) -> None:
    scheduler = SpeeDFlowMatchEulerDiscreteScheduler(**PRESETS[preset])
    timesteps = scheduler.sample_timesteps(64, generator=torch.Generator().manual_seed(0))
    assert bool((scheduler.loss_weights(timesteps) > 0).all())


# Configurations of a training


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


def test_512_is_256_but_for_what_four_times_the_tokens_change() -> None:
    changed = {"resolution", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    for name in ("dit_xl2", "dit_xl2_fast", "dit_xl2_uniform"):
        small, large = (asdict(load(f"imagenet_{size}/{name}")) for size in (256, 512))
        unlike = {key for key in small if small[key] != large[key]}
        assert unlike == changed | {"max_train_steps", "output_dir"}
        assert large["train_batch_size"] * large["gradient_accumulation_steps"] == small["train_batch_size"]


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
def test_a_large_preset_learns_and_has_its_optimizer_without_its_memory(name: str) -> None:
    config = load(name)
    scheduler = make_scheduler(config)
    learned_variance = make_learned_variance(config, scheduler, torch.device("meta"))
    assert (learned_variance is not None) == (config.variance_type == "learned_range")
    channels = 4 if learned_variance is None else 8
    with torch.device("meta"):
        core = build_dit(
            dit_config(config.model, sample_size=32, in_channels=4, out_channels=channels, num_classes=1000), None
        )
        clean, noise = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32)
        labels, dropped = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    timesteps = scheduler.sample_timesteps(2).to("meta")
    rows = drop_labels(labels, dropped)
    result = denoising_loss(core, scheduler, clean, rows, timesteps, noise, learned_variance)
    result.loss.backward()
    groups = make_optimizer(config, core, torch.device("cpu")).param_groups
    assert any("momentum" in group for group in groups) == (config.optimizer == "muon")
    assert sum(len(group["params"]) for group in groups) == len(list(core.parameters()))
    assert {group["lr"] for group in groups if "betas" in group} == {config.learning_rate}
    assert result.loss.shape == ()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in core.parameters())


def test_the_speed_presets_are_the_papers() -> None:
    for name in NAMES:
        config = load(name)
        preset = next((ending for ending in ("uniform", "fast") if name.endswith(ending)), "paper")
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
