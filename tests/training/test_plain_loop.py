"""A run against its loop written down a second time: every option that the loop reads must reach it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from speed_diffusers import SpeeDDDPMScheduler
from speed_diffusers.config.load import load_config
from speed_diffusers.models import TrainableDiT, build_dit, dit_config
from speed_diffusers.randomness import keyed_generator, keyed_seed
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.optimizer import make_optimizer
from speed_diffusers.training.parts import make_accelerator, make_model, make_scheduler
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import training_steps

SEED, STEPS, BATCH = 3, 6, 8
# Far from the defaults, so that one that gets lost changes the result by more than rounding.
OPTIONS = [
    f"seed={SEED}",
    "gradient_accumulation_steps=2",
    "learning_rate=0.02",
    "lr_scheduler=constant",
    "lr_warmup_steps=0",
    "adam_beta1=0.6",
    "adam_beta2=0.7",
    "adam_epsilon=0.001",
    "adam_weight_decay=2.0",
    "max_grad_norm=0.05",
    "ema_decay=0.6",
    "class_dropout_prob=0.4",
    "random_flip=true",
    "prediction_type=v_prediction",
    "beta_start=0.002",
    "conditioning_init=unit",
    "speed_sampling=two_phase",
    "speed_weighting=min_snr",
    "speed_draw=independent",
    "speed_normalize_weights=true",
]


def pixels_of(image_folder: Path) -> tuple[Tensor, Tensor]:
    """Images (26, 3, 32, 32) in [-1, 1] and their classes, in the order of the data set."""
    paths = sorted(image_folder.rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = [sorted({path.parent.name for path in paths}).index(path.parent.name) for path in paths]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)


def order(num_images: int) -> list[int]:
    """The images of all steps: one permutation after the other."""
    epochs = range(-(-STEPS * BATCH // num_images))
    seeds = (keyed_seed(SEED, "epoch order", epoch) for epoch in epochs)
    return [int(row) for seed in seeds for row in np.random.default_rng(seed).permutation(num_images)]


def plain_loop(image_folder: Path, vae_folder: Path) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, weights and their average, by torch and diffusers; of this project the network, the density and keys."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    pixels, labels = pixels_of(image_folder)
    config = dit_config("DiT-tiny/4", sample_size=8, in_channels=4, out_channels=4, num_classes=2)
    model = build_dit(config, keyed_generator(SEED, "weights", 0), conditioning_init="unit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.6, 0.7), eps=0.001, weight_decay=2.0)
    averages = {name: value.detach().clone() for name, value in model.named_parameters()}
    scheduler = SpeeDDDPMScheduler(
        beta_start=0.002,
        prediction_type="v_prediction",
        speed_sampling="two_phase",
        speed_weighting="min_snr",
        speed_draw="independent",
        speed_normalize_weights=True,
    )
    signal = torch.cumprod(1 - torch.linspace(0.002, 0.02, 1000, dtype=torch.float64), 0).float()
    losses = []
    for step in range(STEPS):

        def key(purpose: str, step: int = step) -> torch.Generator:
            return keyed_generator(SEED, purpose, step)

        rows = order(len(pixels))[step * BATCH : (step + 1) * BATCH]
        timesteps = scheduler.sample_timesteps(BATCH, generator=key("timesteps"), progress=step / STEPS)
        dropped = torch.rand(BATCH, generator=key("label drop")) < 0.4
        flipped = torch.rand(BATCH, generator=key("flip")) < 0.5
        noise = torch.randn(BATCH, 4, 8, 8, generator=key("noise"))
        images = torch.where(flipped[:, None, None, None], pixels[rows].flip(-1), pixels[rows])
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
        encoder_noise = torch.randn(BATCH, 4, 8, 8, generator=key("encoder noise"))
        clean = (posterior.mean + posterior.std * encoder_noise) * vae.config["scaling_factor"]
        alpha, sigma = (value[timesteps].sqrt()[:, None, None, None] for value in (signal, 1 - signal))
        class_rows = torch.where(dropped, 1000, labels[rows])
        predicted = model(alpha * clean + sigma * noise, timesteps, class_rows)
        errors = (predicted - (alpha * noise - sigma * clean)).square().flatten(1).mean(1)
        loss = (errors * scheduler.loss_weights(timesteps, step / STEPS)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in model.named_parameters():
            averages[name] = 0.6 * averages[name] + 0.4 * value.detach()
        losses.append(float(loss))
    return losses, {name: value.detach() for name, value in model.named_parameters()}, averages


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded"])
def test_a_run_is_the_plain_loop_with_its_options(
    cached: bool, tiny_options: list[str], image_folder: Path, tiny_vae: Path, fresh_accelerate: Callable[[], None]
) -> None:
    given = {option.partition("=")[0] for option in OPTIONS}
    options = [option for option in tiny_options if option.partition("=")[0] not in given]
    config = load_config(TrainConfig, [*options, *OPTIONS, f"cache_latents={str(cached).lower()}"], SCRIPT_DIR)
    with temporary_run(config, steps=STEPS) as run:
        losses = [
            float(sum(each.result.loss for each in step.micro_steps) / len(step.micro_steps))
            for step in training_steps(run)
        ]
        weights, averages = dict(run.core.named_parameters()), run.ema.state_dict()
        expected = plain_loop(image_folder, tiny_vae)
        assert losses == pytest.approx(expected[0], rel=3e-5), "cached moments are rounded to half precision"
        for found, known in ((weights, expected[1]), (averages, expected[2])):
            assert found.keys() == known.keys()
            difference = sum(float((found[name].detach() - known[name]).square().sum()) for name in known)
            size = sum(float(value.square().sum()) for value in known.values())
            assert difference < 1e-5**2 * size


def test_muon_is_made_with_its_options() -> None:
    model = build_dit(
        dit_config("DiT-tiny/4", sample_size=8, in_channels=4, out_channels=4, num_classes=2),
        torch.Generator().manual_seed(0),
    )
    config = TrainConfig(
        optimizer="muon",
        learning_rate=0.01,
        muon_learning_rate=0.03,
        muon_momentum=0.8,
        muon_ns_steps=3,
        adam_weight_decay=0.2,
        adam_beta1=0.7,
        adam_beta2=0.8,
        adam_epsilon=0.001,
    )
    groups: list[dict[str, Any]] = make_optimizer(config, model, torch.device("cpu")).param_groups
    muon = next(group for group in groups if "momentum" in group)
    adamw = next(group for group in groups if "betas" in group)
    assert [muon[name] for name in ("lr", "momentum", "ns_steps", "weight_decay")] == [0.03, 0.8, 3, 0.2]
    assert [adamw[name] for name in ("lr", "betas", "eps", "weight_decay")] == [0.01, (0.7, 0.8), 0.001, 0.2]


def test_process_and_network_are_made_with_their_options(tiny_vae: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    made: dict[str, TrainableDiT] = {}
    for kind in ("dit", "unit"):
        config = TrainConfig(
            model="DiT-tiny/4",
            resolution=32,
            conditioning_init=kind,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            beta_start=0.001,
            beta_end=0.01,
        )
        made[kind] = make_model(config, 2, vae)
    scheduler = make_scheduler(config)
    betas = [scheduler.config[name] for name in ("beta_start", "beta_end", "rescale_betas_zero_snr")]
    assert betas == [0.001, 0.01, True]
    assert float(scheduler.alphas_cumprod[-1]) < 1e-7
    tables = [model.embedder.class_embedder.embedding_table.weight for model in made.values()]
    assert float(tables[0].std()) == pytest.approx(0.02, rel=0.1) and float(tables[1].std()) > 0.1


def test_torch_is_set_as_the_options_say(fresh_accelerate: Callable[[], None], tmp_path: Path) -> None:
    def settings() -> tuple[bool, ...]:
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return *tf32, torch.are_deterministic_algorithms_enabled()

    for allow_tf32, deterministic in ((False, True), (True, False)):
        fresh_accelerate()
        options = {"allow_tf32": allow_tf32, "deterministic": deterministic}
        make_accelerator(TrainConfig(output_dir=str(tmp_path), report_to=[], **options))  # type: ignore[arg-type]
        assert settings() == (allow_tf32, allow_tf32, deterministic)
