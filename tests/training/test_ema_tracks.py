"""Power-function averages against their formula, and averages of other lengths from snapshots."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.integrate
import torch
from safetensors.torch import load_file
from torch import nn

from run_outputs import run_folder
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts.train_dit_speed import main
from speed_diffusers.training import results
from speed_diffusers.training.checkpoints import save_checkpoint
from speed_diffusers.training.ema_tracks import (
    EmaTracks,
    ema_of_length,
    error_of_length,
    inner_products,
    list_snapshots,
    power_of,
    remove_later_snapshots,
    save_snapshot,
)
from speed_diffusers.training.snapshots import run_places


def test_powers_are_edm2s() -> None:
    # Table of EDM2's section 3.1: 5 % is gamma = 16.97, 10 % is 6.94.
    assert power_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_of(0.10) == pytest.approx(6.94, abs=0.005)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(InputError, match=r"must lie in \(0, 0.28\]"):
            power_of(wrong)


@pytest.mark.parametrize(("t1", "g1", "t2", "g2"), [(3.0, 2.0, 5.0, 7.0), (5.0, 7.0, 3.0, 2.0), (4.0, 1.5, 4.0, 1.5)])
def test_inner_products_are_the_integral(t1: float, g1: float, t2: float, g2: float) -> None:
    def weight(s: float, t: float, g: float) -> float:
        return (g + 1) * s**g / t ** (g + 1) if s <= t else 0.0

    expected, _ = scipy.integrate.quad(lambda s: weight(s, t1, g1) * weight(s, t2, g2), 0, min(t1, t2))
    assert float(inner_products(t1, g1, t2, g2)) == pytest.approx(expected, rel=1e-8)


def drifting(steps: int, lengths: tuple[float, ...]) -> tuple[nn.Module, EmaTracks, list[torch.Tensor]]:
    """A model whose weights wander as in a training, its tracks, and its weights after each step."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3)
    tracks, seen = EmaTracks(model, lengths), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(3, 4, generator=generator) / step**0.5
        tracks.update(step)
        seen.append(model.weight.detach().clone())
    return model, tracks, seen


def test_a_track_weighs_steps_by_their_power() -> None:
    _, tracks, seen = drifting(400, (0.05, 0.1))
    for length in (0.05, 0.1):
        steps = np.arange(1, 401)
        weights = np.diff((np.arange(401) / 400) ** (power_of(length) + 1))
        assert np.sqrt(np.average((steps - np.average(steps, weights=weights)) ** 2, weights=weights)) / 400 == (
            pytest.approx(length, rel=0.02)
        )
        expected = sum(float(weight) * value for weight, value in zip(weights, seen, strict=True))
        torch.testing.assert_close(tracks.state_dict()[f"{length:g}/weight"], expected, rtol=0, atol=1e-5)


def test_another_length_comes_out_of_snapshots(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3)
    tracks, targets = EmaTracks(model, (0.05, 0.1)), EmaTracks(model, (0.03, 0.07, 0.15))
    for step in range(1, 801):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(3, 4, generator=generator) / step**0.5
        for each in (tracks, targets):
            each.update(step)
        if step % 50 == 0:
            save_snapshot(tmp_path, step, tracks.state_dict())
    spread = float((model.weight - tracks.state_dict()["0.1/weight"]).detach().norm())
    for length in (0.03, 0.07, 0.15, 0.1):
        found = ema_of_length(tmp_path, length)
        assert found.keys() == {"weight", "bias"} and found["weight"].dtype == torch.float32
        other = (targets if length != 0.1 else tracks).state_dict()[f"{length:g}/weight"]
        assert float((found["weight"] - other).norm()) < 0.05 * spread, length
    assert (
        error_of_length(tmp_path, 0.1, 800) == pytest.approx(0, abs=1e-6)
        and error_of_length(tmp_path, 0.2, 800) < 0.03
    )
    assert error_of_length(tmp_path, 0.07, 50) < 0.06
    early = ema_of_length(tmp_path, 0.07, step=400)["weight"]
    remove_later_snapshots(tmp_path, 400)
    assert torch.equal(ema_of_length(tmp_path, 0.07)["weight"], early)
    assert {value.dtype for path in list_snapshots(tmp_path).values() for value in load_file(path).values()} == {
        torch.float16
    }
    remove_later_snapshots(tmp_path, 0)
    with pytest.raises(InputError, match="has no EMA snapshots"):
        ema_of_length(tmp_path, 0.1)


def test_a_length_that_few_snapshots_do_not_make_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the combination weighs the steps with, added up step by step."""
    for step in range(10, 101, 10):
        save_snapshot(tmp_path, step, {"0.05/weight": torch.zeros(1), "0.1/weight": torch.zeros(1)})
    length = 0.2
    wanted, tracks = density(length), np.stack([density(0.05), density(0.1)])
    shares = np.linalg.lstsq(tracks.T, wanted, rcond=None)[0]
    expected = np.linalg.norm(shares / shares.sum() @ tracks - wanted) / np.linalg.norm(wanted)
    assert error_of_length(tmp_path, length, 10) == pytest.approx(expected, rel=1e-2) == pytest.approx(0.60, abs=0.01)
    with pytest.raises(
        InputError, match="weights=ema:0.2: after step 10 the snapshots of .* differs by 60% .*at most 10%"
    ):
        ema_of_length(tmp_path, length, 10)
    places = run_places(tmp_path, checkpoints=True, stop_checkpoints=False, weights="ema:0.2")
    assert [place.step for place in places] == [70, 80, 90, 100]
    (told,) = caplog.messages
    assert "leaving out the steps 10, 20, 30, 40, 50, 60," in told
    with pytest.raises(InputError, match="weights=ema:0.01: the snapshots of .* differs by"):
        run_places(tmp_path, checkpoints=True, stop_checkpoints=False, weights="ema:0.01")


def density(length: float) -> npt.NDArray[np.float64]:
    """The weight of an average on 100,000 points of the training."""
    power = power_of(length)
    weights: npt.NDArray[np.float64] = (power + 1) * ((np.arange(100_000) + 0.5) / 100_000) ** power
    return weights


def test_a_kill_after_a_checkpoint_costs_no_snapshot(
    tiny_options: list[str], fresh_accelerate: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from the checkpoint does not pass its step again."""

    def killed(*args: object, **kwargs: object) -> None:
        save_checkpoint(*args, **kwargs)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    options = [*tiny_options, "ema_tracks=0.05,0.1"]
    fresh_accelerate()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(results, "save_checkpoint", killed)
        main(options)
    folder = run_folder(tiny_options)
    assert (folder / "checkpoint-5").is_dir()
    fresh_accelerate()
    main([*options, "resume_from_checkpoint=latest"])
    assert sorted(list_snapshots(folder)) == [5, 10, 12]


def test_a_state_goes_back_or_is_refused() -> None:
    _, tracks, _ = drifting(20, (0.05, 0.1))
    other = EmaTracks(nn.Linear(4, 3), (0.05, 0.1))
    other.load_state_dict(tracks.state_dict())
    assert all(torch.equal(value, tracks.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(InputError, match=r"ema_tracks=0.2: saved are \['0.05', '0.1'\]"):
        EmaTracks(nn.Linear(4, 3), (0.2,)).load_state_dict(tracks.state_dict())
