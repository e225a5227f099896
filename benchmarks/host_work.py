"""What a training step asks of the host: how often it waits for the device, and how many operations it dispatches.

    OMP_NUM_THREADS=1 python benchmarks/host_work.py

Takes the training script's own steps between two logging steps, with a network of DiT-XL/2's depth and a width
of 8: each operation costs the host some microseconds, and on a GPU mostly a launch, whatever its tensors' size, so the
counts are those of the large model. They depend on no clock and no load. This is host work, not the time of a step:
a fused operation counts once, and waits within an operation are not seen. Beside them, on the same network, stand the
usual ways to average parameters and to update them.

Takes every option of train_dit_speed.py besides its own. Under a minute. Results: result.json, table.md and
host_work.png in host_work/ beside this file.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from torch.profiler import record_function

from measurement import SCRIPT_DIR, environment
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.models import DIT_SIZES, build_dit
from speed_diffusers.objective import denoising_loss
from speed_diffusers.randomness import keyed_generator
from speed_diffusers.training.config import TrainConfig, trainer_options
from speed_diffusers.training.profiling import PARTS, OperationCounter
from speed_diffusers.training.run import Inputs, TrainingRun
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import draws_of, training_steps
from speed_diffusers.training.step_log import StepLog
from training_runs import SPEED_CONFIG

NETWORK = "network"
"""Label of the network's forward pass, within that of forward and loss."""
WIDTH = 8
DECAY = 0.9999
BUDGETS = {"draws, noise and loss": 60, "latents": None, "gradient norm": None, "optimizer": 30, "ema": 10}
"""Operations per step that we allow ourselves; None: no promise."""
OURS = "this package"


@dataclass
class HostWorkConfig(TrainConfig):
    """Options of this benchmark: the trainer's, and these."""

    counted_steps: int = option(20, "Steps to count, between two logging steps.", interval="[1, inf)")
    results_dir: str = option(str(Path(__file__).resolve().parent / "host_work"), "Where the results go.", path=True)
    # A few images do; counts do not depend on them.
    max_train_samples: int | None = option(256, "Train on so many images, chosen at random.", interval="[1, inf)")


def main(argv: list[str]) -> None:
    """Counts, writes the results and prints the table.

    Raises:
        InputError: Wrong options; nothing has been written.
    """
    config = load_config(HostWorkConfig, argv, SCRIPT_DIR, default=SPEED_CONFIG)
    options = replace(
        trainer_options(config),
        logging_steps=config.counted_steps + 1,
        checkpointing_steps=None,
        validation_steps=None,
    )
    with temporary_run(options, steps=2 * config.counted_steps + 1, change=deep_and_narrow) as run:
        run.model.forward = record_function(NETWORK)(run.model.forward)
        counter = count(run, config.counted_steps)
        result: dict[str, Any] = {
            "host_waits": {
                "steps": config.counted_steps,
                "scalar_reads": counter.scalar_reads,
                "others": counter.host_waits.total() - counter.scalar_reads,
                "by_operation": dict(+counter.host_waits),
            },
            "operations_a_step": {
                part: operations.total() / config.counted_steps for part, operations in counter.by_part.items()
            },
            "comparison": compare(run, counter, config.counted_steps),
            "protocol": {
                "layers": run.core.transformer.config.num_layers,
                "width": WIDTH,
                "parameter_tensors": len(list(run.core.parameters())),
                "batch": run.layout.global_batch,
                **{key: options.speed[key] for key in ("speed_sampling", "speed_weighting")},
                "prediction_type": options.prediction_type,
                "seed": options.seed,
            },
        }
    result["environment"] = environment()
    folder = Path(config.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.md").write_text(table(result) + "\n")
    save_picture(result, folder / "host_work.png")
    print(table(result))


def deep_and_narrow(inputs: Inputs) -> Inputs:
    """The same run with a network as deep as DiT-XL and 8 channels wide."""
    shape = dict(inputs.core.transformer.config)
    layers = DIT_SIZES["XL"].num_layers
    names = ("patch_size", "sample_size", "in_channels", "out_channels", "num_embeds_ada_norm", "norm_type")
    shape = {name: shape[name] for name in names}
    shape |= {"num_layers": layers, "num_attention_heads": 1, "attention_head_dim": WIDTH}
    generator = keyed_generator(inputs.config.seed, "weights", 0)
    return replace(inputs, core=build_dit(shape, generator, tie_embedders=inputs.config.tie_embedders).train())


def count(run: TrainingRun, steps: int) -> OperationCounter:
    """Counts the steps that follow on the first logging step, up to the second."""
    taken, log = training_steps(run), StepLog(run)
    for step in islice(taken, run.config.logging_steps):
        log.add(step)
    log.write(step)
    with OperationCounter((*PARTS, NETWORK)) as counter:
        for step in islice(taken, steps):
            log.add(step)
    log.close()
    return counter


def compare(run: TrainingRun, counter: OperationCounter, steps: int) -> dict[str, dict[str, float]]:
    """Operations a step of the parts around the network, by who does them.

    The loss counts with its share of the backward pass, and without the network.
    """
    found = {part: operations.total() / steps for part, operations in counter.by_part.items()}
    loss = found["draws"] + found["forward and loss"] + run.layout.accumulation * loss_backward(run)
    references = reference_counts(list(run.core.parameters()), run.config)
    return {
        "draws, noise and loss": {OURS: loss},
        "latents": {OURS: found["latents"]},
        "gradient norm": {OURS: found["gradient norm"]},
        "optimizer": {OURS: found["optimizer"]} | references["optimizer"],
        "ema": {OURS: found["ema"]} | references["ema"],
    }


def loss_backward(run: TrainingRun) -> int:
    """Operations of a batch from the loss to the gradient of the network's output."""
    draws = draws_of(run, 0)
    prediction = torch.zeros_like(draws.noise, requires_grad=True)
    rows = torch.zeros_like(draws.timesteps)
    result = denoising_loss(lambda *_: prediction, run.scheduler, draws.noise, rows, draws.timesteps, draws.noise)
    with OperationCounter() as counter:
        result.loss.backward()
    return counter.total


def reference_counts(parameters: list[torch.nn.Parameter], config: TrainConfig) -> dict[str, dict[str, int]]:
    """Operations of the usual averages and optimizers over the same parameters."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    averages = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def plain_loop() -> None:
        for average, parameter in zip(averages, parameters, strict=True):
            average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    def ema_model(foreach: bool) -> Callable[[], None]:
        model = EMAModel(parameters, decay=DECAY, foreach=foreach)
        return lambda: model.step(parameters)

    def adamw(foreach: bool) -> Callable[[], object]:
        return torch.optim.AdamW(parameters, lr=config.learning_rate, foreach=foreach, fused=False).step

    return {
        "optimizer": {
            "AdamW(foreach=True)": repeated(adamw(foreach=True)),
            "AdamW(foreach=False)": repeated(adamw(foreach=False)),
        },
        "ema": {
            "EMAModel(foreach=True)": repeated(ema_model(foreach=True)),
            "EMAModel(foreach=False)": repeated(ema_model(foreach=False)),
            "loop of mul_ and add_": repeated(plain_loop),
        },
    }


def repeated(function: Callable[[], object]) -> int:
    """Operations of a call that is not the first, which makes state."""
    for _ in range(2):
        function()
    with OperationCounter() as counter:
        function()
    return counter.total


def table(result: dict[str, Any]) -> str:
    """The counts in Markdown."""
    waits, protocol = result["host_waits"], result["protocol"]
    lines = [
        f"Waits of the host in {waits['steps']} steps between two logging steps: {waits['scalar_reads']} reads of a "
        f"number, {waits['others']} others. Operations per step, {protocol['layers']} layers, "
        f"{protocol['parameter_tensors']} parameter tensors:",
        "",
        "| part | by | operations | at most |",
        "|---|---|---|---|",
    ]
    for part, counts in result["comparison"].items():
        for name, operations in counts.items():
            budget = BUDGETS[part] if name == OURS else None
            lines.append(f"| {part} | {name} | {operations:,.0f} | {budget or ''} |")
    return "\n".join(lines)


def save_picture(result: dict[str, Any], path: Path) -> None:
    """The counts as bars, ours and the usual ways, on a logarithmic axis."""
    rows = [(part, name, n) for part, counts in result["comparison"].items() for name, n in counts.items()]
    figure = Figure(figsize=(7.5, 0.9 + 0.34 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    colours = ["tab:blue" if name == OURS else "0.7" for _, name, _ in rows]
    bars = axes.barh(places, [operations for _, _, operations in rows], color=colours)
    labels = [
        f"{operations:,.0f}" + f" (at most {BUDGETS[part]})" * bool(name == OURS and BUDGETS[part])
        for part, name, operations in rows
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(places, [f"{part}: {name}" for part, name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=0.7)
    axes.margins(x=0.15)
    axes.set_xlabel("operations dispatched per step")
    axes.set_title(f"Host work, {result['protocol']['parameter_tensors']} parameter tensors", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, __doc__, HostWorkConfig)
