"""What must hold on a GPU and cannot be seen on a CPU: `pytest -m gpu`, skipped where there is none."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from latent_runs import forget_the_last_run
from speed_diffusers.models import build_dit, dit_config, export_transformer
from speed_diffusers.objective import denoising_loss, drop_labels
from speed_diffusers.reports.training_cost import gpu_of_device
from speed_diffusers.schedulers import SpeeDDDPMScheduler
from speed_diffusers.training.blocks import compile_blocks, recompute_activations
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.guard import NonFiniteGuard
from speed_diffusers.training.optimizer import make_optimizer
from speed_diffusers.training.profiling import OperationCounter
from speed_diffusers.training.results import save_state
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.setup import check_inputs, start_run, temporary_run
from speed_diffusers.training.step import TrainedStep, training_steps
from speed_diffusers.training.step_draws import StepDraws
from speed_diffusers.training.step_log import StepLog

pytestmark = pytest.mark.gpu

RunConfig = Callable[..., TrainConfig]
TOKENS, HEAD = 256, 72
"""Of DiT-XL/2 at 256x256."""


def stirred(device: torch.device, model: str, seed: int = 0) -> Any:
    """A network whose weights are all random, so that every part of it shows in what it computes."""
    config = dit_config(model, sample_size=32, in_channels=4, out_channels=8, num_classes=1000)
    core = build_dit(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return core.to(device).train()


def batch(device: torch.device, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and rows of labels."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(size, 4, 32, 32, generator=generator)
    timesteps = torch.randint(0, 1000, (size,), generator=generator)
    rows = torch.randint(0, 1000, (size,), generator=generator)
    return latents.to(device), timesteps.to(device), rows.to(device)


def gradients(core: Any, device: torch.device, *, bf16: bool = False) -> dict[str, Tensor]:
    """Gradients of all parameters for one batch."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = core(*batch(device))
    output.float().square().mean().backward()
    found = {name: value.grad.cpu() for name, value in core.named_parameters() if value.grad is not None}
    core.zero_grad(set_to_none=True)
    return found


def relative_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors over that of the expected ones."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double().cpu(), value.double().cpu()) for name, value in expected.items()]
    difference = sum(float((one - other).square().sum()) for one, other in pairs)
    return math.sqrt(difference / sum(float(other.square().sum()) for _, other in pairs))


def logged_steps(run: TrainingRun) -> Iterator[TrainedStep]:
    """Steps of a run, each taken in by its log."""
    log = StepLog(run)
    for step in training_steps(run):
        log.add(step)
        yield step
    log.close()


def state_of(run: TrainingRun) -> dict[str, Tensor]:
    """Parameters, averages and moments, copied to the CPU."""
    found = {f"model/{name}": value for name, value in run.core.state_dict().items()}
    found |= {f"ema/{name}": value for name, value in run.ema.state_dict().items()}
    for index, values in enumerate(run.optimizer.optimizer.state.values()):
        found |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    return {name: value.detach().cpu().clone() for name, value in found.items()}


def test_fused_adamw_is_adamw_and_a_raised_flag_stops_it(device: torch.device) -> None:
    config = TrainConfig(adam_weight_decay=0.1, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 48, generator=generator)
    grads = [torch.randn(64, 48, generator=generator) for _ in range(4)]
    ours = torch.nn.Module()
    ours.weight = torch.nn.Parameter(start.to(device))
    exact = torch.nn.Parameter(start.double())
    optimizer = make_optimizer(config, ours, device)
    group = optimizer.param_groups[0]
    assert group["fused"] is True
    options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    reference = torch.optim.AdamW([exact], foreach=False, fused=False, **options)
    guard = NonFiniteGuard(optimizer, device)
    for step, grad in enumerate(grads[:3], start=1):
        ours.weight.grad, exact.grad = grad.to(device), grad.double()
        guard.observe(ours.weight.grad.norm(), step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.weight.detach().cpu().double(), exact.detach(), rtol=1e-5, atol=1e-6)
    before = ours.weight.detach().clone()
    for step, factor in ((4, math.nan), (5, 1.0)):
        ours.weight.grad = grads[3].to(device) * factor
        guard.observe(ours.weight.grad.norm(), step)
        optimizer.step()
    assert torch.equal(ours.weight, before), "nothing is applied from the bad step on"
    assert guard.failed_step() == 4


def draws(device: torch.device, step: int) -> StepDraws:
    return StepDraws.at_step(
        SpeeDDDPMScheduler(),
        seed=3,
        step=step,
        latent_shape=(512, 4, 32, 32),
        class_dropout_prob=0.1,
        random_flip=True,
        device=device,
    )


def test_draws_are_those_of_a_cpu_and_the_same_again(device: torch.device) -> None:
    found, again, on_cpu = draws(device, 7), draws(device, 7), draws(torch.device("cpu"), 7)
    for name in ("timesteps", "dropped", "flipped"):
        assert torch.equal(getattr(found, name).cpu(), getattr(on_cpu, name)), name
    for name in ("noise", "encoder_noise"):
        noise = getattr(found, name)
        assert noise.device.type == device.type and torch.equal(noise, getattr(again, name)), name
        # 2 million values: five standard errors of mean and variance.
        assert abs(float(noise.double().mean())) < 5 / math.sqrt(noise.numel())
        assert abs(float(noise.double().var()) - 1) < 5 * math.sqrt(2 / noise.numel())
    assert not torch.equal(found.noise, found.encoder_noise)
    assert not torch.equal(found.noise, draws(device, 8).noise)


NO_WAITS = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16", "random_flip": True, "max_grad_norm": 1.0},
    "flow": {"prediction_type": "flow_prediction", "variance_type": "fixed_small"},
    "muon": {"optimizer": "muon", "speed_draw": "stratified", "ema_tracks": [0.05, 0.1]},
}


@pytest.mark.parametrize("options", NO_WAITS.values(), ids=NO_WAITS)
def test_no_step_between_two_lines_of_the_log_waits_for_the_device(
    device: torch.device, run_config: RunConfig, options: dict[str, Any]
) -> None:
    with temporary_run(run_config(**options), steps=8) as run:
        steps = logged_steps(run)
        # The first ones copy tables to the device and make the optimizer's state.
        list(islice(steps, 2))
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                taken = list(islice(steps, 5))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            with OperationCounter() as counter:
                taken = list(islice(steps, 5))
            assert counter.host_waits.total() == 0
        assert [step.done for step in taken] == [3, 4, 5, 6, 7]
        assert all(torch.isfinite(step.micro_steps[0].result.loss) for step in taken)


def test_bf16_keeps_weights_moments_and_averages_in_float32(device: torch.device, run_config: RunConfig) -> None:
    losses = {}
    for precision in ("no", "bf16"):
        forget_the_last_run()
        with temporary_run(run_config(mixed_precision=precision, allow_tf32=False), steps=4) as run:
            losses[precision] = torch.stack([step.micro_steps[0].result.loss for step in training_steps(run)])
            dtypes = {value.dtype for name, value in state_of(run).items()}
            assert dtypes == {torch.float32}
    assert torch.isfinite(losses["bf16"]).all()
    torch.testing.assert_close(losses["bf16"], losses["no"], rtol=2e-2, atol=0.0)
    assert not torch.equal(losses["bf16"], losses["no"])


def test_bf16_gradients_are_near_those_of_float32(device: torch.device, model: str) -> None:
    core = stirred(device, model)
    exact = gradients(core, device)
    assert 1e-4 < relative_distance(gradients(core, device, bf16=True), exact) < 5e-2


def test_tf32_rounds_products_and_can_be_left_out(cuda: torch.device, run_config: RunConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    errors = {}
    for allowed in (True, False):
        forget_the_last_run()
        with temporary_run(run_config(allow_tf32=allowed), steps=1):
            product = left.to(cuda) @ right.to(cuda)
        errors[allowed] = float((product.double().cpu() - exact).norm() / exact.norm())
    assert errors[False] < 1e-5 < errors[True] < 2e-3


def test_attention_takes_the_flash_kernel(cuda: torch.device, model: str) -> None:
    core = stirred(cuda, model)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        gradients(core, cuda, bf16=True)
    names = {event.key for event in profiler.key_averages()}
    attention = {name for name in names if "_scaled_dot_product" in name or "flash_attention" in name}
    flash = {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"}
    assert flash & attention, attention
    assert not any("math" in name or "efficient" in name for name in attention), attention


def test_attention_of_the_largest_model_takes_the_flash_kernel(cuda: torch.device) -> None:
    heads = torch.randn(3, 4, 16, TOKENS, HEAD, device=cuda, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.nn.functional.scaled_dot_product_attention(*heads)
    names = {event.key for event in profiler.key_averages()}
    assert {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"} & names, names


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_compiled_blocks_compute_the_same_in_one_graph(device: torch.device, model: str, bf16: bool) -> None:
    core = stirred(device, model)
    exact = gradients(core, device)
    plain = gradients(core, device, bf16=bf16)
    torch._dynamo.utils.counters.clear()
    compile_blocks(core, "inductor" if device.type == "cuda" else "aot_eager")
    compiled = gradients(core, device, bf16=bf16)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], dict(counters)
    assert relative_distance(compiled, plain) < (5e-2 if bf16 else 1e-4)
    # Fusing rounds less often, so it may be nearer to the truth, and must not be farther.
    assert relative_distance(compiled, exact) < 1.5 * relative_distance(plain, exact) + 1e-4


def test_recomputed_activations_give_the_same_gradients_in_less_memory(device: torch.device, model: str) -> None:
    peaks: dict[float, int] = {}
    found = {}
    for share in (0.0, 0.5, 1.0):
        core = stirred(device, model)
        recompute_activations(core, share)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        found[share] = gradients(core, device)
        if device.type == "cuda":
            peaks[share] = torch.cuda.max_memory_allocated()
        # Kernels that add up in any order may differ in the last bits.
        assert relative_distance(found[share], found[0.0]) < 1e-5
    if device.type == "cuda":  # nothing counts what a CPU allocates
        assert peaks[0.0] > peaks[0.5] > peaks[1.0]


def test_the_exported_model_computes_the_same_on_device_and_cpu(device: torch.device, run_config: RunConfig) -> None:
    with temporary_run(run_config(allow_tf32=False, learning_rate=1e-2, ema_decay=0.5), steps=4) as run:
        for _ in training_steps(run):
            pass
        core = run.core.eval()
        exported = export_transformer(core.transformer.config, core.state_dict()).to(device)
        latents, timesteps, rows = batch(device)
        with torch.no_grad():
            trained = core(latents, timesteps, rows)
            stock = exported(latents, timestep=timesteps, class_labels=rows, return_dict=False)[0]
            on_cpu = exported.cpu()(latents.cpu(), timesteps.cpu(), class_labels=rows.cpu(), return_dict=False)
    assert float(trained.abs().max()) > 1e-3
    assert torch.equal(stock, trained)
    torch.testing.assert_close(on_cpu[0], trained.cpu(), rtol=1e-3, atol=1e-4 * float(trained.abs().max()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    device: torch.device, run_config: RunConfig, tmp_path: Path, precision: str
) -> None:
    options = {"deterministic": True, "mixed_precision": precision, "max_train_steps": 6, "random_flip": True}
    with temporary_run(run_config(**options), steps=6) as run:
        for _ in training_steps(run):
            pass
        whole = state_of(run)
    options["output_dir"] = str(tmp_path / "broken")
    forget_the_last_run()
    run = start_run(check_inputs(run_config(**options)))
    try:
        steps = list(islice(training_steps(run), 3))
        save_state(run, steps[-1].done)
    finally:
        run.close()
    del run, steps
    forget_the_last_run()
    run = start_run(check_inputs(run_config(**options, resume_from_checkpoint="latest")))
    try:
        assert run.first_step == 3
        for _ in training_steps(run):
            pass
        resumed = state_of(run)
    finally:
        run.close()
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_losses_are_those_of_a_cpu(device: torch.device, model: str) -> None:
    found = {}
    for place in (device, torch.device("cpu")):
        core, scheduler = stirred(place, model), SpeeDDDPMScheduler(prediction_type="v_prediction")
        latents, timesteps, rows = batch(place)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(place)
        dropped = torch.arange(len(rows), device=place) == 2

        def mean_half(sample: Tensor, timestep: Tensor, class_rows: Tensor, core: Any = core) -> Tensor:
            half: Tensor = core(sample, timestep, class_rows)[:, :4]
            return half

        result = denoising_loss(mean_half, scheduler, latents, drop_labels(rows, dropped), timesteps, noise)
        found[place.type if place is device else "reference"] = result.squared_error.cpu()
    torch.testing.assert_close(found[device.type], found["reference"], rtol=1e-4, atol=1e-6)


def test_the_log_has_the_utilization_of_a_known_card(cuda: torch.device, run_config: RunConfig) -> None:
    known = gpu_of_device(torch.cuda.get_device_name(cuda))
    if known is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name(cuda)} is not known")
    with temporary_run(run_config(mixed_precision="bf16"), steps=3) as run:
        log = StepLog(run)
        for step in training_steps(run):
            log.add(step)
        assert 0 < (log._utilization(1000.0) or 0.0) < 1
        log.write(step)
        assert '"mfu"' in (run.output_dir / "metrics.jsonl").read_text()
        log.close()
