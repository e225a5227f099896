"""SpeeD on a flow-matching scheduler: units, noising, target, and the loop of diffusers' scripts."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from noise_schedules import chi_square_p_value
from speed_diffusers import InputError, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.settings import SPEED_DEFAULTS

SHIFTS = (1.0, 3.0, 0.7)


def ours(**config: object) -> SpeeDFlowMatchEulerDiscreteScheduler:
    return SpeeDFlowMatchEulerDiscreteScheduler(**config)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_signature_is_the_parents_and_speeds() -> None:
    mine = inspect.signature(SpeeDFlowMatchEulerDiscreteScheduler.__init__).parameters
    theirs = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    assert {n: p.default for n, p in mine.items() if not n.startswith("speed_")} == {
        n: p.default for n, p in theirs.items()
    }
    assert {n: p.default for n, p in mine.items() if n.startswith("speed_")} == SPEED_DEFAULTS
    assert list(mine)[: len(theirs)] == list(theirs), "positional arguments would mean something else"


def test_every_parameter_reaches_the_parent() -> None:
    other = {
        "num_train_timesteps": 500,
        "shift": 2.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.4,
        "max_shift": 1.2,
        "base_image_seq_len": 128,
        "max_image_seq_len": 2048,
        "shift_terminal": 0.1,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
        "time_shift_type": "linear",
        "stochastic_sampling": True,
    }
    theirs = set(inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters) - {"self", "invert_sigmas"}
    assert set(other) == theirs
    for name, value in other.items():
        mine, parent = ours(**{name: value}), FlowMatchEulerDiscreteScheduler(**{name: value})
        assert mine.config[name] == parent.config[name] == value
        assert torch.equal(mine.sigmas, parent.sigmas)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_timesteps", [10, 1000, 10_000])
def test_timesteps_are_those_of_a_fresh_host_bit_for_bit(shift: float, num_timesteps: int) -> None:
    scheduler = ours(num_train_timesteps=num_timesteps, shift=shift)
    host = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_timesteps, shift=shift)
    scheduler.set_timesteps(4)  # as a validation in the middle of a training does
    assert torch.equal(scheduler.training_timesteps, host.timesteps.flip(0))
    drawn = scheduler.sample_timesteps(512, generator=seeded(0))
    assert drawn.dtype == torch.float32 and bool(torch.isin(drawn, host.timesteps).all())
    assert bool((drawn > 0).all()) and float(drawn.max()) <= num_timesteps
    indices = scheduler.timestep_indices(drawn)
    assert torch.equal(scheduler.training_timesteps[indices], drawn)
    assert torch.equal(scheduler.timestep_indices(scheduler.training_timesteps), torch.arange(num_timesteps))


def test_dynamic_shifting_leaves_training_without_shift() -> None:
    dynamic = ours(shift=3.0, use_dynamic_shifting=True)
    assert torch.equal(dynamic.training_timesteps, ours().training_timesteps)
    assert dynamic.speed_areas == ours().speed_areas != ours(shift=3.0).speed_areas


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_uniform_is_the_draw_of_diffusers_scripts(shift: float, device: str | None) -> None:
    scheduler = ours(shift=shift, speed_sampling="uniform", speed_weighting="none")
    host = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.manual_seed(3)
    u = compute_density_for_timestep_sampling("none", batch_size=4096, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    expected, after = host.timesteps[(u * 1000).long()], torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(scheduler.sample_timesteps(4096, device=device), expected)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(scheduler.loss_weights(expected), torch.ones(4096))


def test_a_million_draws_follow_the_law() -> None:
    for config in ({}, {"shift": 3.0, "speed_sampling": "logit_normal"}, {"speed_draw": "stratified"}):
        scheduler = ours(**config)
        indices = scheduler.timestep_indices(scheduler.sample_timesteps(1_000_000, generator=seeded(1)))
        counts = np.bincount(indices.numpy(), minlength=1000)
        assert chi_square_p_value(counts, scheduler.speed_tables.pmf.numpy()) > 1e-4


def test_logit_normal_is_the_draw_of_diffusers_scripts_in_law() -> None:
    """Theirs has the most noise at index 0 and mean 0, so the two mirror one another."""
    host = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = compute_density_for_timestep_sampling(
        "logit_normal", batch_size=200_000, logit_mean=0.0, logit_std=1.0, generator=seeded(0)
    )
    theirs = host.timesteps[(u * 1000).long()]
    mine = ours(shift=3.0, speed_sampling="logit_normal").sample_timesteps(200_000, generator=seeded(1))
    shares = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(mine.quantile(shares), theirs.quantile(shares), atol=6.0, rtol=0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noising_is_the_hosts_without_its_table(shift: float, dtype: torch.dtype) -> None:
    scheduler, host = ours(shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    clean, noise = (torch.randn(16, 3, 4, 4, generator=seeded(i)).to(dtype) for i in range(2))
    timesteps = scheduler.sample_timesteps(16, generator=seeded(2))
    scheduler.set_timesteps(5)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    assert noisy.dtype == dtype and noisy.shape == clean.shape
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(noisy, host.scale_noise(clean, timesteps, noise), atol=tolerance, rtol=tolerance)
    assert torch.equal(scheduler.get_velocity(clean, noise, timesteps), noise - clean)


def test_noising_goes_from_nearly_clean_to_noise() -> None:
    scheduler = ours()
    clean, noise = torch.ones(2, 5), torch.zeros(2, 5)
    noisy = scheduler.add_noise(clean, noise, scheduler.training_timesteps[[0, -1]])
    torch.testing.assert_close(noisy[:, 0], torch.tensor([0.999, 0.0]))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_weights_have_the_shape_of_the_timesteps(shape: tuple[int, ...]) -> None:
    scheduler = ours(speed_weighting="min_snr")
    timesteps = scheduler.training_timesteps[torch.randint(0, 1000, shape, generator=seeded(0))]
    weights = scheduler.loss_weights(timesteps)
    assert weights.shape == shape and weights.dtype == torch.float32
    sigma = timesteps.double() / 1000
    snr = ((1 - sigma) / sigma) ** 2
    torch.testing.assert_close(weights.double(), snr.clamp_max(5) * sigma**2, rtol=1e-4, atol=1e-6)


def test_between_two_timesteps_the_nearer_one_counts() -> None:
    scheduler = ours()
    assert scheduler.timestep_indices(torch.tensor([0.0, 1.4, 1.6, 999.4, 999.6, 1000.0])).tolist() == [
        0,
        0,
        1,
        998,
        999,
        999,
    ]


def test_areas_of_the_default() -> None:
    areas = ours().speed_areas
    assert (areas.acceleration, areas.deceleration, areas.convergence) == (
        range(499),
        range(499, 923),
        range(923, 1000),
    )


def test_sampling_is_the_parents_bit_for_bit() -> None:
    mine, theirs = ours(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    samples = [torch.randn(2, 4, 8, 8, generator=seeded(0))] * 2
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(6)
    assert torch.equal(mine.timesteps, theirs.timesteps)
    for t in theirs.timesteps:
        samples = [s.step(x.sin(), t, x).prev_sample for s, x in zip((mine, theirs), samples, strict=True)]
        assert torch.equal(*samples)


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    scheduler = ours(shift=3.0, speed_k=3.0, speed_sampling="logit_normal:mean=-0.5", speed_draw="stratified")
    scheduler.save_pretrained(tmp_path)
    loaded = SpeeDFlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.training_timesteps, scheduler.training_timesteps)
    assert torch.equal(loaded.speed_tables.pmf, scheduler.speed_tables.pmf)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["speed_sampling"] == "logit_normal:mean=-0.5" and saved["shift"] == 3.0
    plain = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    back = SpeeDFlowMatchEulerDiscreteScheduler.from_config(plain.config)
    assert torch.equal(plain.sigmas, scheduler.sigmas) and back.config.speed_k == 3.0
    assert type(scheduler.to_inference()) is FlowMatchEulerDiscreteScheduler
    assert scheduler.to_inference().config.shift == 3.0


def test_a_prediction_type_left_from_another_scheduler_does_not_count() -> None:
    plain = DDPMScheduler(prediction_type="epsilon")
    flow = SpeeDFlowMatchEulerDiscreteScheduler.from_config(plain.config, speed_weighting="min_snr")
    assert flow.speed_tables.settings.prediction_type == "flow_prediction"
    assert torch.equal(flow.speed_tables.weights, ours(speed_weighting="min_snr").speed_tables.weights)


def test_errors_are_counted_by_index() -> None:
    scheduler = ours(speed_sampling="information_rate:bins=10")
    for step in range(20):
        timesteps = scheduler.sample_timesteps(256, generator=seeded(step))
        indices = scheduler.timestep_indices(timesteps)
        sums = torch.zeros(1000).index_add_(0, indices, timesteps / 1000)
        scheduler.update_speed(sums, torch.bincount(indices, minlength=1000))
    pmf = scheduler.speed_tables.pmf
    assert float(pmf.sum()) == pytest.approx(1.0) and float(pmf.max() / pmf.min()) > 2


def test_turned_around_sigmas_are_refused() -> None:
    with pytest.raises(InputError, match="^invert_sigmas=True: SpeeD trains flows whose sigma grows with the noise"):
        ours(invert_sigmas=True)


def test_a_network_learns_the_velocity_in_a_plain_loop() -> None:
    """x_0 is always 2, so the best velocity is (x_t - 2) / sigma, which is linear in x_t / sigma and 1 / sigma."""
    torch.manual_seed(0)
    scheduler = ours()
    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for step in range(400):
        generator = seeded(step)
        clean, noise = torch.full((256, 1), 2.0), torch.randn(256, 1, generator=generator)
        timesteps = scheduler.sample_timesteps(256, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        sigma = timesteps[:, None] / 1000
        prediction = weights[0] * noisy / sigma + weights[1] / sigma
        error = (prediction - scheduler.get_velocity(clean, noise, timesteps)).square().mean(1)
        optimizer.zero_grad()
        # sigma^2 keeps the inputs near the data from drowning all others.
        (scheduler.loss_weights(timesteps) * sigma[:, 0] ** 2 * error).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor([1.0, -2.0]), atol=0.05, rtol=0)
