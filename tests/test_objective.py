"""The objective against hand formulas, the label drop as every block sees it, and the plain diffusers loop."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

import tiny_run
from speed_diffusers import InputError, SpeeDDDIMScheduler, SpeeDDDPMScheduler
from speed_diffusers.models import NULL_CLASS, build_dit
from speed_diffusers.objective import denoising_loss, drop_labels, prediction_target
from speed_diffusers.training.step_draws import StepDraws

DIT = tiny_run.DIT | {"num_layers": 3}
BATCH = 6


def batch_of(size: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(size, 4, 4, 4, generator=generator) for _ in range(2))
    return clean, noise, torch.randint(0, 1000, (size,), generator=generator)


def fixed_prediction(prediction: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A network that answers the same whatever it is asked."""
    return lambda sample, timestep, class_rows: prediction


def numpy_weights(timesteps: Tensor) -> np.ndarray:
    gradient = np.gradient(1.0 - np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64)))
    return (0.4 + 0.2 * (gradient - gradient.min()) / np.ptp(gradient))[timesteps.numpy()]


@pytest.mark.parametrize("host", [SpeeDDDPMScheduler, SpeeDDDIMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_and_loss_are_the_hand_formula(host: type, kind: str) -> None:
    scheduler = host(prediction_type=kind)
    clean, noise, timesteps = batch_of()
    alpha = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))[timesteps.numpy()][:, None, None, None]
    x0, eps = clean.double().numpy(), noise.double().numpy()
    target = {"epsilon": eps, "v_prediction": np.sqrt(alpha) * eps - np.sqrt(1 - alpha) * x0, "sample": x0}[kind]
    np.testing.assert_allclose(prediction_target(scheduler, clean, noise, timesteps).numpy(), target, atol=2e-6)

    prediction = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    rows = torch.full((BATCH,), NULL_CLASS)
    result = denoising_loss(fixed_prediction(prediction), scheduler, clean, rows, timesteps, noise)
    error = ((prediction.double().numpy() - target) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(result.squared_error.numpy(), error, rtol=1e-5)
    assert float(result.loss) == pytest.approx(float((numpy_weights(timesteps) * error).mean()), rel=1e-4)
    assert result.loss.dtype == result.squared_error.dtype == torch.float32
    assert not result.squared_error.requires_grad


def test_the_network_sees_the_noised_sample_its_timestep_and_its_row() -> None:
    clean, noise, timesteps = batch_of()
    rows = torch.arange(BATCH)
    seen: list[Tensor] = []

    def network(sample: Tensor, timestep: Tensor, class_rows: Tensor) -> Tensor:
        seen.extend((sample, timestep, class_rows))
        return torch.zeros_like(sample)

    denoising_loss(network, SpeeDDDPMScheduler(), clean, rows, timesteps, noise)
    alpha = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))[timesteps.numpy()][:, None, None, None]
    expected = np.sqrt(alpha) * clean.double().numpy() + np.sqrt(1 - alpha) * noise.double().numpy()
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=2e-6)
    assert torch.equal(seen[1], timesteps) and torch.equal(seen[2], rows)


def test_weight_is_applied_once_per_sample() -> None:
    clean, noise, timesteps = batch_of()
    rows = torch.arange(BATCH)
    network = fixed_prediction(torch.zeros_like(noise))
    scheduler = SpeeDDDPMScheduler(speed_lambda=1.0)
    result = denoising_loss(network, scheduler, clean, rows, timesteps, noise)
    weights = scheduler.loss_weights(timesteps)
    assert torch.equal(result.loss, (weights * result.squared_error).mean())
    plain = denoising_loss(network, SpeeDDDPMScheduler(speed_weighting="none"), clean, rows, timesteps, noise)
    assert torch.equal(plain.loss, plain.squared_error.mean())
    assert torch.equal(plain.squared_error, result.squared_error)


def test_half_precision_prediction_is_summed_in_float32() -> None:
    clean, noise, timesteps = batch_of()
    prediction = (noise + 0.01).bfloat16()
    rows = torch.full((BATCH,), NULL_CLASS)
    result = denoising_loss(fixed_prediction(prediction), SpeeDDDPMScheduler(), clean, rows, timesteps, noise)
    expected = (prediction.double() - noise.double()).square().mean((1, 2, 3))
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.squared_error.double(), expected, rtol=1e-5, atol=0)
    in_bfloat16 = (prediction - noise.bfloat16()).square().mean((1, 2, 3)).double()
    assert float(((in_bfloat16 - expected).abs() / expected).max()) > 0.01, "the test would not see bfloat16 sums"


def test_unknown_prediction_type_names_the_nearest() -> None:
    scheduler = SpeeDDDPMScheduler(prediction_type="v-prediction")
    clean, noise, timesteps = batch_of()
    with pytest.raises(InputError, match="Unknown prediction_type 'v-prediction'. Did you mean 'v_prediction'?"):
        prediction_target(scheduler, clean, noise, timesteps)


def test_rows_of_labels_with_and_without_drop() -> None:
    labels = torch.tensor([0, 9, 999, 1000, 1199, -1, 5, 1100])
    dropped = torch.tensor([False, False, False, False, False, False, True, True])
    rows = drop_labels(labels, dropped)
    assert rows.tolist() == [0, 9, 999, 1001, 1200, 1000, 1000, 1000]
    assert rows.dtype == torch.int64


def test_every_block_sees_one_condition_and_a_tenth_of_them_none() -> None:
    count = 4096
    config = {**DIT, "sample_size": 2}
    model = build_dit(config, torch.Generator().manual_seed(0)).train()
    seen: list[Tensor] = []
    transformer = model.transformer
    for linear in (*(block.norm1.linear for block in transformer.transformer_blocks), transformer.proj_out_1):
        linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    draws = StepDraws.at_step(
        SpeeDDDPMScheduler(),
        seed=3,
        step=17,
        latent_shape=(count, 4, 2, 2),
        class_dropout_prob=0.1,
        random_flip=False,
        device=torch.device("cpu"),
    )
    labels = torch.arange(count) % 10
    timesteps = torch.full((count,), 500)
    with torch.no_grad():
        model(draws.noise, timesteps, drop_labels(labels, draws.dropped))
        unconditional = F.silu(model.embedder(timesteps[:1], torch.tensor([NULL_CLASS]), hidden_dtype=torch.float32))
        conditional = F.silu(model.embedder(timesteps[:10], torch.arange(10), hidden_dtype=torch.float32))
    assert len(seen) == 4
    assert all(torch.equal(condition, seen[0]) for condition in seen[1:])
    is_null = (seen[0] - unconditional).abs().amax(1) < 1e-6
    assert torch.equal(is_null, draws.dropped)
    assert float(is_null.float().mean()) == pytest.approx(0.1, abs=0.015)
    torch.testing.assert_close(seen[0][~is_null], conditional[labels[~is_null]])


def plain_diffusers_loop(model: torch.nn.Module, latents: Tensor, labels: Tensor) -> list[Tensor]:
    """The loop of diffusers' training examples, with its Min-SNR expression at weights of 1."""
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(10):
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, labels).float(), noise.float(), reduction="none")
        loss = loss.mean(dim=list(range(1, len(loss.shape)))) * torch.ones(len(latents))
        loss = loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def speed_loop(model: torch.nn.Module, latents: Tensor, labels: Tensor, **config: str) -> list[Tensor]:
    scheduler = SpeeDDDPMScheduler(**config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(10):
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = scheduler.sample_timesteps(len(latents), generator=generator)
        loss = denoising_loss(model, scheduler, latents, labels, timesteps, noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def test_uniform_baseline_trains_bit_for_bit_like_a_plain_diffusers_loop() -> None:
    first = build_dit(DIT, torch.Generator().manual_seed(0)).train()
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    latents, _, _ = batch_of(8, seed=4)
    labels = torch.arange(8)
    plain = plain_diffusers_loop(first, latents, labels)
    ours = speed_loop(second, latents, labels, speed_sampling="uniform", speed_weighting="none")
    assert [loss.item() for loss in ours] == [loss.item() for loss in plain]
    for (name, mine), theirs in zip(second.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    paper = speed_loop(third, latents, labels)
    assert [loss.item() for loss in paper] != [loss.item() for loss in plain]


def test_objective_asks_the_scheduler_for_its_interface_only() -> None:
    scheduler = SimpleNamespace(
        config=SimpleNamespace(prediction_type="epsilon"),
        add_noise=lambda clean, noise, timesteps: clean + noise,
        loss_weights=lambda timesteps, progress: torch.full(timesteps.shape, 2.0),
    )
    clean, noise, timesteps = batch_of()
    result = denoising_loss(lambda sample, timestep, rows: sample, scheduler, clean, timesteps, timesteps, noise)
    assert float(result.loss) == pytest.approx(2 * float(clean.square().mean()), rel=1e-5)
