"""The GPU suite on a CPU: all of it at tiny size, what goes wrong in a unit, and the reference loops' stand-ins."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import gpu_units
import run as gpu_suite
from gpu_report import ratios, table
from gpu_units import ON_CPU, ON_CUDA, PRECISIONS, Scale, Unit, all_units, kind_of_kernel
from reference_loops import DIT, FAST_DIT, ReferenceLoop, backward_noted
from speed_diffusers.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _leaves_accelerate_as_it_was(fresh_accelerate: Callable[[], None]) -> Iterator[None]:
    yield
    fresh_accelerate()


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cpu.json").read_text())
    return found


def test_the_suite_measures_on_a_cpu_skips_what_is_done_and_reports_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkout: Callable[[str], Path]
) -> None:
    folder = tmp_path / "results"
    options = ["device=cpu", f"results_dir={folder}", f"work_dir={tmp_path / 'work'}"]
    options += [f"fast_dit_dir={checkout(FAST_DIT)}"]
    gpu_suite.main([*options, "units=step DiT-tiny/8 bf16+compile 4,reference*"])
    units = results_of(folder)["units"]
    assert list(units) == ["step DiT-tiny/8 bf16+compile 4", "reference fast-DiT DiT-tiny/8 4"]
    assert [unit["status"] for unit in units.values()] == ["done", "done"], units
    ours, theirs = (unit["result"] for unit in units.values())
    assert ours["images_per_second"] == pytest.approx(4e3 / ours["milliseconds"])
    assert 0 < ours["host_milliseconds"] <= ours["milliseconds"]
    assert ours["finite"] and ours["mfu"] is None and ours["peak_memory_gib"] is None
    parts = ours["profile"]["host_milliseconds"]
    assert {"draws", "forward and loss", "backward", "optimizer", "ema"} <= parts.keys()
    assert (theirs["precision"], theirs["steps"]) == ("tf32", ON_CPU.steps)
    printed = capsys.readouterr().out
    assert "this package" in printed and "says nothing of any GPU" in printed and "as many images a second" in printed
    gpu_suite.main([*options, "units=step DiT-tiny/8 *"])
    again = results_of(folder)["units"]
    assert again["step DiT-tiny/8 bf16+compile 4"] == units["step DiT-tiny/8 bf16+compile 4"], "done is done"
    assert {name for name, unit in again.items() if unit["status"] == "done"} > units.keys()
    picture = folder / "cpu.png"
    assert Image.open(picture).width > 500
    picture.unlink()
    gpu_suite.main(["action=report", f"results_dir={folder}"])
    assert picture.exists()
    assert "DiT-tiny/8 | this package" in (folder / "cpu.md").read_text()


def test_steps_that_encode_their_images_are_measured_apart(tmp_path: Path, checkout: Callable[[str], Path]) -> None:
    options = ["device=cpu", f"results_dir={tmp_path / 'results'}", f"work_dir={tmp_path / 'work'}"]
    gpu_suite.main([*options, f"dit_dir={checkout(DIT)}", "units=*with VAE"])
    units = results_of(tmp_path / "results")["units"]
    assert list(units) == ["step DiT-tiny/8 tf32 2 with VAE", "reference DiT DiT-tiny/8 2 with VAE"]
    assert [unit["status"] for unit in units.values()] == ["done", "done"], units
    assert all(unit["result"]["in_loop"] and unit["result"]["milliseconds"] > 0 for unit in units.values())
    files = sorted(path.relative_to(tmp_path / "work") for path in (tmp_path / "work").rglob("*.jpg"))
    assert len(files) == ON_CPU.num_files and Image.open(tmp_path / "work" / files[0]).size == (500, 375)
    text = (tmp_path / "results" / "cpu.md").read_text()
    assert "| DiT-tiny/8 | this package | tf32 | 2 | encoded |" in text and "encoded latents: this package" in text


def units_that(**measures: Callable[[], dict[str, Any]]) -> Callable[..., Iterator[Unit]]:
    return lambda *_: iter([Unit(name, 1.0, measure) for name, measure in measures.items()])


def test_what_goes_wrong_in_a_unit_is_noted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    figures = gpu_units.figures("DiT-S/2", "bf16", 8, 0.5, CPU) | {"peak_memory_gib": None}

    def fails() -> dict[str, Any]:
        calls.append("fails")
        raise ValueError("no such thing")

    def exits() -> dict[str, Any]:
        raise SystemExit(2)

    def is_too_large() -> dict[str, Any]:
        calls.append("large")
        raise torch.OutOfMemoryError("CUDA out of memory")

    def hangs() -> dict[str, Any]:
        threading.Event().wait(60)
        return {}

    def works() -> dict[str, Any]:
        return figures

    units = units_that(fails=fails, exits=exits, large=is_too_large, hangs=hangs, works=works)
    monkeypatch.setattr(gpu_suite, "all_units", units)
    options = ["device=cpu", f"results_dir={tmp_path}", f"work_dir={tmp_path / 'work'}"]
    gpu_suite.main(options)
    found = results_of(tmp_path)["units"]
    assert {name: unit["status"] for name, unit in found.items()} == {
        "fails": "failed",
        "exits": "failed",
        "large": "out of memory",
        "hangs": "failed",
        "works": "done",
    }
    assert found["fails"]["error"] == "ValueError: no such thing" and "no such thing" in found["fails"]["traceback"]
    assert found["hangs"]["error"] == "TimeoutError: took more than 3 s"
    assert "- large: out of memory (CUDA out of memory)" in capsys.readouterr().out
    gpu_suite.main(options)
    assert calls == ["fails", "large", "fails"], "what failed is tried again, what does not fit is not"


def test_no_unit_is_begun_that_would_outlast_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    units = [
        Unit("long", 1e6, lambda: pytest.fail("begun")),
        Unit("short", 0.0, lambda: {"tests": {}, "exit_code": 0}),
    ]
    monkeypatch.setattr(gpu_suite, "all_units", lambda *_: iter(units))
    monkeypatch.setattr(gpu_suite, "BEGAN", gpu_suite.time.perf_counter())
    gpu_suite.main(["device=cpu", f"results_dir={tmp_path}", f"work_dir={tmp_path / 'work'}", "max_seconds=100"])
    assert list(results_of(tmp_path)["units"]) == ["short"]
    assert "long: not begun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["action=report", "results_dir=nowhere"], "results_dir=nowhere: holds no results"),
        (["device=cpu", "fast_dit_dir=nowhere"], "nowhere: is no checkout of fast-DiT"),
        (["max_seconds=0"], "max_seconds=0.0: must be above 0"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpu_suite.main(options)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device=cuda: torch sees no GPU here; device=cpu runs"):
        gpu_suite.main([])


@pytest.mark.parametrize("scale", [ON_CPU, ON_CUDA], ids=["cpu", "cuda"])
def test_units_are_all_there_once_and_the_largest_model_comes_first(scale: Scale, tmp_path: Path) -> None:
    checkouts = {DIT: tmp_path, FAST_DIT: tmp_path}
    names = [unit.name for unit in all_units(CPU, scale, checkouts, tmp_path)]
    assert len(set(names)) == len(names)
    expected = {
        f"step {model} {precision} {batch}"
        for model, by_precision in scale.batch_sizes.items()
        for precision, batches in by_precision.items()
        for batch in batches
    }
    expected |= {
        f"reference {loop} {model} {batch}"
        for loop, models in scale.references.items()
        for model, batch in models.items()
    }
    model, batch, precisions = scale.in_loop
    in_loop = {f"step {model} {precision} {batch} with VAE" for precision in precisions}
    in_loop.add(f"reference DiT {model} {batch} with VAE")
    assert set(names) == expected | in_loop | {"tests"}
    names = [name for name in names if name not in in_loop]
    assert names[0].startswith(f"step {scale.profiled} bf16+compile")
    # Each loop is held against our steps of the same model and batch size.
    steps = {(model, batch) for _, model, _, batch in (n.split() for n in names if n.startswith("step"))}
    loops = {(model, batch) for _, _, model, batch in (n.split() for n in names if n.startswith("reference"))}
    assert loops <= steps
    assert not any(name.startswith("reference") for name in (u.name for u in all_units(CPU, scale, {}, tmp_path)))


def test_the_table_gives_ratio_mfu_profile_and_failures() -> None:
    fast = {"model": "DiT-XL/2", "precision": "bf16+compile", "batch_size": 256, "milliseconds": 400.0}
    fast |= {"images_per_second": 640.0, "model_tflops_per_second": 455.0, "mfu": 0.46, "mfu_of": "bf16"}
    fast |= {"peak_memory_gib": 100.0, "host_milliseconds": 30.0, "in_loop": False}
    fast["profile"] = {"host_milliseconds": {"backward": 2.0}, "device_milliseconds": {"backward": 250.0}}
    fast["profile"]["kernel_milliseconds"] = {"matrix products": 300.0}
    slow = fast | {"precision": "fp16", "images_per_second": 320.0, "model_tflops_per_second": 227.0, "mfu": 0.23}
    results = {
        "device": {"name": "NVIDIA H200", "type": "cuda", "memory_gib": 139.8, "cuda": "13.0"},
        "environment": {"torch": "2.11", "diffusers": "0.42", "commit": "abc"},
        "units": {
            "step DiT-XL/2 bf16+compile 256": {"status": "done", "result": fast},
            "reference fast-DiT DiT-XL/2 256": {"status": "done", "result": slow},
            "step DiT-XL/2 bf16 256": {"status": "out of memory", "error": "CUDA out\nof memory"},
            "tests": {"status": "done", "result": {"tests": {"test_draws": {"outcome": "passed"}}}},
        },
    }
    text = table(results)
    assert text.splitlines()[0] == "NVIDIA H200, 140 GiB, CUDA 13.0, torch 2.11, diffusers 0.42, commit abc"
    assert "| DiT-XL/2 | this package | bf16+compile | 256 | cached | 400.0 | 640.0 | 455.00 | 46.0% (bf16) |" in text
    assert "46.0% (bf16) | 100.0 | 30.0 |" in text
    assert "256 images a step, cached latents: this package in bf16+compile trains on 2.00 times as many" in text
    assert "as many images a second as fast-DiT's own loop in fp16." in text
    assert "| backward | 2.00 | 250.00 |" in text and "| matrix products | 300.00 |" in text
    assert "- step DiT-XL/2 bf16 256: out of memory (CUDA out of memory)" in text
    assert "| test_draws | passed |" in text
    for other in ({"batch_size": 64}, {"in_loop": True}):
        assert ratios([("this package", fast), ("fast-DiT", slow | other)]) == [], "that is no comparison"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_per_fused_native_layer_norm_0", "compiled, elementwise and reductions"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer, EMA and gradient norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of_kernel(kernel) == kind


def reference(
    folder: Path,
    results_dir: Path,
    loop: str = FAST_DIT,
    model: str = "DiT-tiny/8",
    ended: dict[int, float] | None = None,
) -> ReferenceLoop:
    return ReferenceLoop(
        loop, folder, model=model, batch_size=3, device=CPU, results_dir=results_dir, backward_ended=ended
    )


def test_a_reference_loop_takes_one_step_at_a_time_and_ends(checkout: Callable[..., Path], tmp_path: Path) -> None:
    import sys

    before = dict(sys.modules)
    with backward_noted() as ended, reference(checkout(FAST_DIT), tmp_path, ended=ended) as loop:
        train = loop._train
        assert train.seen == [0, 0.9999] or train.seen == [0.9999], train.seen
        for count in range(1, 4):
            loop.step()
            assert len(loop.milliseconds) == count
    assert not loop._thread.is_alive()
    assert all(both > 0 and rest > 0 for both, rest in loop.milliseconds)
    assert not {"train", "models", "diffusion"} & (sys.modules.keys() - before.keys())


def test_an_error_of_a_reference_loop_is_told(checkout: Callable[..., Path], tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="ValueError: a bug of theirs"),
        reference(checkout(FAST_DIT, fails=True), tmp_path),
    ):
        pass


def test_what_is_no_checkout_or_no_model_is_one_line(checkout: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no checkout of github.com/facebookresearch/DiT; clone it"):
        reference(tmp_path, tmp_path, DIT)
    with pytest.raises(InputError, match="model=DiT-Q/2: allowed: DiT-tiny/2"):
        reference(checkout(FAST_DIT), tmp_path, model="DiT-Q/2")


def test_precisions_have_a_colour() -> None:
    from gpu_report import COLOURS

    assert COLOURS.keys() == set(PRECISIONS)
