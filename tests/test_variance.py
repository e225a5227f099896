"""The variance term against an independent float64 computation with two means and two log variances."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr
from torch import Tensor

from speed_diffusers import InputError, SpeeDDDPMScheduler
from speed_diffusers.objective import denoising_loss
from speed_diffusers.variance import LearnedVariance, bin_log_likelihood

TIMESTEPS = [0, 1, 2, 10, 219, 499, 700, 998, 999, 0, 0, 3, 500, 0, 250, 900]
SHAPE = (len(TIMESTEPS), 4, 6, 6)


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, predicted epsilon and the variance's values, float32."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise, difference, values = (torch.randn(SHAPE, generator=generator) for _ in range(4))
    return clean, noise, noise + 0.3 * difference, values


class Textbook:
    """Arithmetic of DDPM and of its improvement in NumPy, float64: means from x_0, Kullback-Leibler, discrete NLL."""

    def __init__(self, betas: np.ndarray) -> None:
        self.betas, alphas = betas, 1.0 - betas
        self.kept = np.cumprod(alphas)
        self.before = np.append(1.0, self.kept[:-1])
        self.posterior = betas * (1.0 - self.before) / (1.0 - self.kept)
        self.log_posterior = np.log(np.append(self.posterior[1], self.posterior[1:]))

    def mean(self, clean: np.ndarray, noisy: np.ndarray, t: int) -> np.ndarray:
        of_clean = self.betas[t] * np.sqrt(self.before[t]) / (1.0 - self.kept[t])
        of_noisy = np.sqrt(1.0 - self.betas[t]) * (1.0 - self.before[t]) / (1.0 - self.kept[t])
        return of_clean * clean + of_noisy * noisy

    def bits(self, clean: np.ndarray, noise: np.ndarray, predicted: np.ndarray, values: np.ndarray, t: int) -> float:
        noisy = np.sqrt(self.kept[t]) * clean + np.sqrt(1.0 - self.kept[t]) * noise
        predicted_clean = (noisy - np.sqrt(1.0 - self.kept[t]) * predicted) / np.sqrt(self.kept[t])
        mean = self.mean(predicted_clean, noisy, t)
        fraction = (values + 1.0) / 2.0
        log_variance = fraction * np.log(self.betas[t]) + (1.0 - fraction) * self.log_posterior[t]
        if t == 0:
            return float(-log_bin_mass(clean, mean, np.exp(0.5 * log_variance)).mean() / np.log(2.0))
        true_mean, true_log = self.mean(clean, noisy, t), self.log_posterior[t]
        divergence = 0.5 * (
            log_variance
            - true_log
            - 1.0
            + np.exp(true_log - log_variance)
            + (true_mean - mean) ** 2 * np.exp(-log_variance)
        )
        return float(divergence.mean() / np.log(2.0))


def log_bin_mass(clean: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Log mass of the bin of half width 1/255 around each value; the outermost ones reach to infinity."""
    upper, lower = (clean - mean + 1 / 255) / std, (clean - mean - 1 / 255) / std
    # log(Phi(b) - Phi(a)), from the tail that is smaller.
    high, low = np.where(upper + lower > 0, -lower, upper), np.where(upper + lower > 0, -upper, lower)
    inside = log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))
    return np.where(clean < -0.999, log_ndtr(upper), np.where(clean > 0.999, log_ndtr(-lower), inside))


def linear_betas() -> np.ndarray:
    return np.linspace(1e-4, 0.02, 1000, dtype=np.float64)


def float64_bits(predicted: Tensor, values: Tensor, clean: Tensor, noise: Tensor) -> np.ndarray:
    textbook = Textbook(linear_betas())
    arrays = [tensor.double().numpy() for tensor in (clean, noise, predicted, values)]
    return np.array([textbook.bits(*(array[i] for array in arrays), t) for i, t in enumerate(TIMESTEPS)])


@pytest.mark.parametrize("seed", range(3))
def test_every_term_is_the_textbooks_in_float32(seed: int) -> None:
    clean, noise, predicted, values = numbers(seed)
    learned = LearnedVariance.from_scheduler(SpeeDDDPMScheduler(), prediction_type="epsilon")
    timesteps = torch.tensor(TIMESTEPS)
    found = learned.bits(values, predicted - noise, clean, timesteps)
    assert found.dtype == torch.float32 and learned.scale == 1.0
    expected = float64_bits(predicted, values, clean, noise)
    first = timesteps.numpy() == 0
    np.testing.assert_allclose(found.numpy()[~first], expected[~first], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(found.numpy()[first], expected[first], atol=1e-5, rtol=1e-5)
    assert (expected[~first] > 0).all()


def test_two_means_in_float32_would_have_lost_the_digits() -> None:
    # What the form with the error and expm1 is for: the usual one, in float32, misses the tolerance of the test above.
    clean, noise, predicted, values = numbers()
    textbook = Textbook(linear_betas())
    for name in ("betas", "kept", "before", "posterior", "log_posterior"):
        setattr(textbook, name, getattr(textbook, name).astype(np.float32))
    arrays = [tensor.numpy() for tensor in (clean, noise, predicted, values)]
    usual = np.array([textbook.bits(*(array[i] for array in arrays), t) for i, t in enumerate(TIMESTEPS)])
    expected = float64_bits(predicted, values, clean, noise)
    assert np.abs(usual - expected).max() > 1e-4


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions_of_the_same_mean_have_the_same_term(kind: str) -> None:
    clean, noise, predicted, values = numbers()
    timesteps = torch.tensor(TIMESTEPS)
    scheduler = SpeeDDDPMScheduler()
    expected = LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon").bits(
        values, predicted - noise, clean, timesteps
    )
    kept = torch.from_numpy(np.cumprod(1.0 - linear_betas()))[timesteps][:, None, None, None]
    # The error of v is that of epsilon over sqrt(kept), the error of x_0 that of epsilon times -sqrt((1-kept)/kept).
    ratio = {"v_prediction": kept.rsqrt(), "sample": -((1 - kept) / kept).sqrt()}[kind]
    error = ((predicted - noise).double() * ratio).float()
    found = LearnedVariance.from_scheduler(scheduler, prediction_type=kind).bits(values, error, clean, timesteps)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_no_gradient_of_the_term_reaches_the_mean() -> None:
    clean, noise, predicted, values = numbers()
    output = torch.cat((predicted, values), dim=1).requires_grad_()
    rows, timesteps = torch.zeros(len(clean), dtype=torch.int64), torch.tensor(TIMESTEPS)
    scheduler = SpeeDDDPMScheduler(variance_type="learned_range")
    learned = LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon")

    def gradient(with_error: bool) -> Tensor:
        prediction, variance = output.chunk(2, dim=1)
        bits = learned.bits(variance, prediction - noise, clean, timesteps).mean()
        loss = denoising_loss(lambda *_: output, scheduler, clean, rows, timesteps, noise, learned).loss
        return torch.autograd.grad(loss if with_error else bits, output)[0]

    mean, variance = gradient(with_error=False).chunk(2, dim=1)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert (variance.flatten(1).abs().amax(1) > 0).all() and variance.isfinite().all()
    weights = scheduler.loss_weights(timesteps)[:, None, None, None]
    both_mean, both_variance = gradient(with_error=True).chunk(2, dim=1)
    torch.testing.assert_close(both_variance, variance)
    torch.testing.assert_close(both_mean, weights * 2 * (predicted - noise) / clean.numel())


@pytest.mark.parametrize("weighted", [False, True])
def test_the_hybrid_loss_weighs_the_error_and_the_term_only_by_option(weighted: bool) -> None:
    clean, noise, predicted, values = numbers()
    timesteps = torch.tensor(TIMESTEPS)
    scheduler = SpeeDDDPMScheduler(num_train_timesteps=1000)
    learned = LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon", weighted=weighted)
    output = torch.cat((predicted, values), dim=1)
    rows = torch.zeros(len(clean), dtype=torch.int64)
    result = denoising_loss(lambda *_: output, scheduler, clean, rows, timesteps, noise, learned)
    error = (predicted - noise).double().square().mean((1, 2, 3)).numpy()
    weights = scheduler.speed_tables.weights[timesteps].numpy()
    bits = float64_bits(predicted, values, clean, noise)
    expected = (weights * error).mean() + ((weights if weighted else 1.0) * bits).mean()
    assert float(result.loss) == pytest.approx(expected, rel=2e-6)
    assert result.variance_bits is not None and not result.variance_bits.requires_grad
    np.testing.assert_allclose(result.variance_bits.numpy(), bits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.squared_error.numpy(), error, rtol=1e-5)


def test_the_term_counts_the_same_for_any_number_of_timesteps() -> None:
    for count in (50, 1000, 4000):
        scheduler = SpeeDDDPMScheduler(num_train_timesteps=count, beta_end=0.02)
        assert LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon").scale == count / 1000


def test_the_right_variance_is_the_least_loss() -> None:
    # With the true mean the divergence is 0 at the posterior's variance (v = -1) and grows with v.
    timesteps = torch.tensor([1, 100, 900])
    clean, noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 4, 2, 2)
    learned = LearnedVariance.from_scheduler(SpeeDDDPMScheduler(), prediction_type="epsilon")
    at = [learned.bits(torch.full_like(clean, v), noise, clean, timesteps) for v in (-1.0, 0.0, 1.0)]
    assert torch.equal(at[0], torch.zeros(3))
    assert (at[1] > 0).all() and (at[2] > at[1]).all()


def test_bins_share_one_unit_of_mass_and_tails_stay_finite() -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.3, 0.01), (-0.98, 0.05), (0.0, 0.5)):
        logs = bin_log_likelihood(values - mean, torch.full_like(values, math.log(std)), values)
        assert float(logs.exp().sum()) == pytest.approx(1.0, abs=2e-6)
    far = torch.tensor([-1.0, 1.0]) * 0.9
    logs = bin_log_likelihood(far, torch.full((2,), -5.0, requires_grad=True), torch.zeros(2))
    # DiT's least mass; without it a network that predicts x_0 begins with thousands of bits.
    assert logs.tolist() == pytest.approx([math.log(1e-12)] * 2)


def test_a_network_that_predicts_x0_begins_with_at_most_40_bits_at_the_first_timestep() -> None:
    scheduler = SpeeDDDPMScheduler(prediction_type="sample")
    learned = LearnedVariance.from_scheduler(scheduler, prediction_type="sample")
    clean = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    values = torch.zeros_like(clean).requires_grad_()
    bits = learned.bits(values, -clean, clean, torch.zeros(8, dtype=torch.int64))
    bits.sum().backward()
    assert 1 < float(bits.detach().max()) <= -math.log2(1e-12) + 1e-3
    assert values.grad is not None and float(values.grad.norm()) < 10


def test_distance_to_the_original_codes_tanh() -> None:
    # What the docstring says of the approximation 0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    approximation = 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    assert 1e-4 < float((approximation - torch.special.ndtr(x)).abs().max()) < 4e-4


def test_a_schedule_that_ends_without_signal() -> None:
    scheduler = SpeeDDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(InputError, match="epsilon needs a schedule.*take prediction_type=v_prediction"):
        LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon")
    learned = LearnedVariance.from_scheduler(scheduler, prediction_type="v_prediction")
    assert learned.table.isfinite().all()
    with pytest.raises(InputError, match="Did you mean 'v_prediction'"):
        LearnedVariance.from_scheduler(scheduler, prediction_type="v-prediction")


def test_the_best_variance_of_a_wrong_mean_is_the_posteriors_plus_its_squared_distance() -> None:
    # (d + expm1(-d) + c exp(-d)) / 2 is least at d = log(1 + c): the mean's own error belongs to the variance.
    timesteps = torch.tensor([1, 2, 5, 20, 100])
    scheduler = SpeeDDDPMScheduler()
    learned = LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon")
    span, distance = learned.table[timesteps, 0].double(), learned.table[timesteps, 1].double()
    error = ((0.5 * span).expm1() / distance).sqrt()  # c for which the best v is 0
    shape = (len(timesteps), 4, 2, 2)
    values = torch.zeros(shape, requires_grad=True)
    errors = error.float()[:, None, None, None].expand(shape)
    bits = learned.bits(values, errors, torch.zeros(shape), timesteps)
    (gradient,) = torch.autograd.grad(bits.sum(), values)
    (far_gradient,) = torch.autograd.grad(
        learned.bits(values + 0.5, errors, torch.zeros(shape), timesteps).sum(), values
    )
    assert (gradient.abs().amax((1, 2, 3)) < 1e-3 * far_gradient.abs().amax((1, 2, 3))).all()
    assert (far_gradient > 0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_importance_sampling_leaves_the_whole_expected_loss_as_it_is(weighted: bool) -> None:
    """The sum over t of p(t) times the loss at t is that of uniform draws, the variance term included."""
    options = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2", "speed_weighting": "none"}
    clean, noise, predicted, values = (each[:1] for each in numbers())
    output = torch.cat((predicted, values), dim=1)
    expected = {}
    for sampling in ("uniform", "loss_second_moment:history=1"):
        scheduler = SpeeDDDPMScheduler(**options, speed_sampling=sampling)
        if sampling != "uniform":
            scheduler.update_speed(torch.arange(1.0, 11.0) ** 2, torch.ones(10))
            assert float(scheduler.speed_tables.pmf.max() / scheduler.speed_tables.pmf.min()) > 20
        learned = LearnedVariance.from_scheduler(scheduler, prediction_type="epsilon", weighted=weighted)
        rows = torch.zeros(1, dtype=torch.int64)
        losses = torch.tensor(
            [
                float(
                    denoising_loss(lambda *_: output, scheduler, clean, rows, torch.tensor([t]), noise, learned).loss
                )
                for t in range(10)
            ],
            dtype=torch.float64,
        )
        expected[sampling] = float((scheduler.speed_tables.pmf * losses).sum())
    first, second = expected.values()
    assert second == pytest.approx(first, rel=1e-5)
