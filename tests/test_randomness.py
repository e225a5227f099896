"""Keyed seeds and the draws of one optimizer step."""

import hashlib

import numpy as np
import pytest
import torch

from speed_diffusers import SpeeDDDPMScheduler
from speed_diffusers.data.batch_sampler import BatchLayout
from speed_diffusers.randomness import keyed_generator, keyed_seed
from speed_diffusers.training.step_draws import StepDraws

PURPOSES = ("timesteps", "label drop", "flip", "noise", "encoder noise")


def draws_at(step: int, *, seed: int = 0, size: int = 8, drop: float = 0.1, flip: bool = True) -> StepDraws:
    return StepDraws.at_step(
        SpeeDDDPMScheduler(),
        seed=seed,
        step=step,
        latent_shape=(size, 4, 4, 4),
        class_dropout_prob=drop,
        random_flip=flip,
        device=torch.device("cpu"),
    )


def equal(first: StepDraws, second: StepDraws) -> bool:
    return all(torch.equal(value, getattr(second, name)) for name, value in vars(first).items())


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(np.corrcoef(first.double().flatten().numpy(), second.double().flatten().numpy())[0, 1])


def test_seed_is_the_hash_of_its_key() -> None:
    digest = hashlib.blake2b(b"42:noise:1000", digest_size=4).digest()
    assert keyed_seed(42, "noise", 1000) == int.from_bytes(digest, "little")


def test_seeds_never_change_since_resuming_relies_on_them() -> None:
    # printf '0:noise:0' | b2sum -l 32, bytes read from the low end
    assert keyed_seed(0, "noise", 0) == 1643078388
    assert keyed_seed(123, "epoch order", 2) == 3631104682


def test_seeds_fit_32_bits_and_do_not_repeat() -> None:
    seeds = [keyed_seed(s, purpose, step) for s in range(3) for purpose in PURPOSES for step in range(500)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) >= len(seeds) - 1  # 7,500 of 4e9: one repetition in 150 sets like this
    assert max(seeds) > 2**31 and np.mean(seeds) == pytest.approx(2**31, rel=0.05)


def test_key_has_no_ambiguous_split() -> None:
    assert keyed_seed(1, "noise", 23) != keyed_seed(12, "noise", 3) != keyed_seed(1, "noise:2", 3)


def test_neighbouring_generators_are_uncorrelated() -> None:
    size = 10_000
    streams = [torch.rand(size, generator=keyed_generator(0, purpose, s)) for purpose in PURPOSES for s in range(4)]
    matrix = np.corrcoef(torch.stack(streams).double().numpy())
    off_diagonal = matrix[~np.eye(len(streams), dtype=bool)]
    assert float(np.abs(off_diagonal).max()) < 4.5 / size**0.5


def test_generator_is_fresh_and_reproducible() -> None:
    first, again = (torch.rand(16, generator=keyed_generator(5, "noise", 9)) for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    keyed_generator(5, "noise", 9)
    assert torch.equal(torch.rand(4), expected), "the global generator is left alone"


def test_draws_have_the_promised_shapes_and_types() -> None:
    draws = draws_at(0)
    assert (draws.timesteps.shape, draws.timesteps.dtype) == ((8,), torch.int64)
    assert (draws.dropped.shape, draws.dropped.dtype) == ((8,), torch.bool)
    assert (draws.flipped.shape, draws.flipped.dtype) == ((8,), torch.bool)
    for noise in (draws.noise, draws.encoder_noise):
        assert (noise.shape, noise.dtype) == ((8, 4, 4, 4), torch.float32)


def test_same_seed_and_step_give_the_same_draws() -> None:
    first = draws_at(3)
    torch.manual_seed(77)
    assert equal(first, draws_at(3))


def test_other_steps_and_seeds_give_other_draws() -> None:
    base = draws_at(3, size=4096)
    for other in (draws_at(4, size=4096), draws_at(3, seed=1, size=4096)):
        for name in ("timesteps", "dropped", "flipped", "noise", "encoder_noise"):
            first, second = getattr(base, name), getattr(other, name)
            assert not torch.equal(first, second), name
            assert abs(correlation(first, second)) < 4.5 / first.numel() ** 0.5, name


def test_purposes_of_one_step_are_uncorrelated() -> None:
    draws = draws_at(11, size=4096)
    scalars = [draws.timesteps, draws.dropped, draws.flipped, draws.noise[:, 0, 0, 0], draws.encoder_noise[:, 0, 0, 0]]
    for index, first in enumerate(scalars):
        for second in scalars[index + 1 :]:
            assert abs(correlation(first, second)) < 4.5 / 4096**0.5
    assert abs(correlation(draws.noise, draws.encoder_noise)) < 4.5 / draws.noise.numel() ** 0.5


def test_noise_is_standard_normal() -> None:
    draws = draws_at(2, size=4096)
    for noise in (draws.noise, draws.encoder_noise):
        assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("drop", "flip"), [(0.0, False), (0.1, True), (1.0, True)])
def test_rates_of_drop_and_flip(drop: float, flip: bool) -> None:
    draws = draws_at(5, size=20_000, drop=drop, flip=flip)
    assert float(draws.dropped.float().mean()) == pytest.approx(drop, abs=0.009 if 0 < drop < 1 else 0)
    assert float(draws.flipped.float().mean()) == pytest.approx(0.5 if flip else 0.0, abs=0.015 if flip else 0)


def test_switching_one_thing_leaves_the_other_draws_alone() -> None:
    base, other = draws_at(6), draws_at(6, drop=0.9, flip=False)
    for name in ("timesteps", "noise", "encoder_noise"):
        assert torch.equal(getattr(base, name), getattr(other, name))


@pytest.mark.parametrize(("per_device", "processes", "accumulation"), [(2, 1, 4), (2, 2, 2), (2, 4, 1), (8, 1, 1)])
def test_every_layout_takes_each_draw_of_the_global_batch_once(
    per_device: int, processes: int, accumulation: int
) -> None:
    draws = draws_at(9)
    layouts = [BatchLayout(per_device, processes, rank, accumulation) for rank in range(processes)]
    parts = [draws.part(layout.span(micro)) for micro in range(accumulation) for layout in layouts]
    joined = StepDraws(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(draws)))
    assert equal(joined, draws)
    assert all(part.timesteps.shape == (per_device,) for part in parts)
