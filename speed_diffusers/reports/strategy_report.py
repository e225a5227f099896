"""Strategies by name, and the text that plan.py and a dry run of the trainer print of them and of a run's cost."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError, unknown_name
from ..presets import PRESETS
from ..process import Areas
from ..registry import Registry
from ..schedulers import speed_scheduler
from ..settings import PREFIX, SPEED_DEFAULTS, SPEED_KEYS, SpeeDOptions
from ..strategy import REGISTRIES, SpeeDStrategy
from ..tables import SpeeDTables
from ..timesteps import DENSITIES, UNIFORM
from ..weightings import WEIGHTINGS
from .strategy_plot import area_shares, log_snr_moments, mean_weight, relative_density
from .training_cost import BYTES_A_PARAMETER, BYTES_OF_MUON, BYTES_OF_TRACK, TrainingCost, gpu_named

# A plus before a digit is a number's, as in 1e+3.
PLUS = re.compile(r"\+(?=[A-Za-z_])")


def strategy_tables(scheduler: Any, names: Sequence[str], progress: float = 0.0) -> dict[str, SpeeDTables]:
    """Tables of named strategies on the noise schedule of a SpeeD scheduler, in the order given.

    Args:
        scheduler: With SpeeD; densities and weightings named by themselves take its k, tau, r and lambda.
        names: Each a preset, or "density+weighting", or "density+weighting+draw", with parameters or without. None at
            all: the scheduler's own strategy, and uniform sampling.
        progress: Share of the training that is done, for what changes in its course.

    Raises:
        InputError: A name is unknown, or its strategy is undefined on this schedule; the message begins with the name.
    """
    if not names:
        own = own_name(scheduler)
        return {own: scheduler.speed_strategy.tables(progress)} | strategy_tables(scheduler, [UNIFORM], progress)
    tables = {}
    for name in names:
        values = speed_values(name)
        try:
            tables[name] = speed_scheduler(scheduler, **values).speed_strategy.tables(progress)
        except InputError as error:
            raise InputError(f"strategy '{name}': {error}") from error
    return tables


def own_name(scheduler: Any) -> str:
    """The name of a scheduler's own strategy: a preset's if it is one, else its parts."""
    own = {key: scheduler.config.get(key, default) for key, default in SPEED_DEFAULTS.items()}
    for preset, values in PRESETS.items():
        # What uniform draws without weights leave unread may have any value.
        compared = {key: values[key] for key in REGISTRIES} if preset == UNIFORM else SPEED_DEFAULTS | values
        if all(own[key] == value for key, value in compared.items()):
            return preset
    parts = [str(own[key]) for key in REGISTRIES]
    return "+".join(parts[:2] if parts[2] == SPEED_DEFAULTS["speed_draw"] else parts)


def speed_values(name: str) -> dict[str, Any]:
    """The keywords of a SpeeD scheduler that make a strategy.

    Args:
        name: As in `strategy_tables`.

    Raises:
        InputError: It is unknown; the message begins with the name, or gives the nearest.
    """
    if name in PRESETS:
        return SPEED_DEFAULTS | PRESETS[name]
    parts = PLUS.split(name)
    if len(parts) == 1:
        bare = name.split(":")[0]
        if bare in DENSITIES:
            raise InputError(f"strategy '{name}': is a density alone; add a weighting, as in '{name}+none'.")
        if bare in WEIGHTINGS:
            raise InputError(f"strategy '{name}': is a weighting alone; put a density before it: 'uniform+{name}'.")
        raise unknown_name("strategy (a preset, or density+weighting)", name, [*PRESETS, *DENSITIES, *WEIGHTINGS])
    if len(parts) > len(REGISTRIES):
        raise InputError(f"strategy '{name}': must be a preset, density+weighting or density+weighting+draw.")
    chosen = {"speed_draw": SPEED_DEFAULTS["speed_draw"]}
    for part, (key, registry) in zip(parts, REGISTRIES.items(), strict=False):
        try:
            chosen[key] = str(registry.parse(part))
        except InputError as error:
            raise InputError(f"strategy '{name}': {error}") from error
    return chosen


def unused_options(strategy: SpeeDStrategy) -> list[str]:
    """Options of a strategy that were given though neither draws nor weights depend on them, as `speed_NAME=VALUE`.

    Found by making the tables with other values of each, at the beginning, in the middle and at the end of a training.
    A learned density or weighting is compared as it is before it has learned anything.
    """

    def tables(**changed: object) -> list[SpeeDTables]:
        made = SpeeDStrategy(strategy.process, replace(strategy.options, **changed))  # type: ignore[arg-type]
        return [made.tables(progress) for progress in (0.0, 0.5, 1.0)]

    default = SpeeDOptions()
    # The default, and what no other option comes to by itself: the tau that is given may be the one that r gives.
    others: dict[str, list[dict[str, object]]] = {
        name: [{name: getattr(default, name)}] for key, name in SPEED_KEYS.items() if key not in REGISTRIES
    }
    others["tau"].append({"tau": 0.37})
    for name in ("anneal_start", "anneal_end"):  # means nothing without the other
        others[name] = [{"anneal_start": default.anneal_start, "anneal_end": default.anneal_end}]
    values = {name: getattr(strategy.options, name) for name in others}
    given = {name: value for name, value in values.items() if value != getattr(default, name)}
    if strategy.is_loss_aware:
        given.pop("normalize_weights", None)  # the weights that are learned may have any mean
    own = tables() if given else []
    return [
        f"{PREFIX}{name.rstrip('_')}={value}"
        for name, value in given.items()
        if not any(_differ(own, tables(**changed)) for changed in others[name])
    ]


def _differ(some: Sequence[SpeeDTables], others: Sequence[SpeeDTables]) -> bool:
    return not all(
        torch.allclose(mine.pmf, its.pmf, rtol=1e-6, atol=0) and torch.allclose(mine.weights, its.weights, rtol=1e-6)
        for mine, its in zip(some, others, strict=True)
    )


def describe_run(scheduler: Any, cost: TrainingCost, *, gpu: str | None = None, num_gpus: int = 1) -> str:
    """A run's own strategy beside uniform sampling, and its costs, as text: what a dry run has to say of both.

    Args:
        scheduler: The run's, with SpeeD.
        cost: The run by its numbers.
        gpu: As for `describe_cost`.
        num_gpus: As for `describe_cost`.

    Raises:
        InputError: Unknown GPU.
    """
    strategies = describe_strategies(strategy_tables(scheduler, []), scheduler.speed_areas)
    return f"{strategies}\n\n{describe_cost(cost, gpu=gpu, num_gpus=num_gpus)}"


def describe_strategies(strategies: Mapping[str, SpeeDTables], areas: Areas) -> str:
    """Areas, shares of the draws in them, and density, weight and product at some timesteps, as text.

    Args:
        strategies: Name of each and its tables, of one process.
        areas: The areas in which draws are counted.
    """
    total = areas.convergence.stop
    ranges = ", ".join(f"{name} {_words(area)}" for name, area in vars(areas).items())
    width = max(len(name) for name in [*strategies, "density x weight  "])
    lines = [f"Areas of {total:,} timesteps (0: least noise): {ranges}", ""]
    lines.append(
        f"{'share of draws':<{width}}" + "".join(f"{name:>14}" for name in vars(areas)) + "   mean weight E_p[w]"
    )
    for name, tables in strategies.items():
        shares = "".join(f"{share:>14.1%}" for share in area_shares(tables, areas).values())
        lines.append(f"{name:<{width}}{shares}{mean_weight(tables):>21.4g}")
    steps = _steps_to_show(areas)
    first = next(iter(strategies.values()))
    lines += ["", f"{'timestep':<{width}}" + "".join(f"{step:>9}" for step in steps)]
    lines.append(_row("noise level", first.process.noise_level, steps, width))
    for name, tables in strategies.items():
        tau = "" if tables.settings.tau == areas.convergence.start else f"  (tau {tables.settings.tau})"
        density = relative_density(tables)
        lines.append(name + tau + ("  (loss-aware; shown as it begins)" if _learns(name) else ""))
        mean, deviation = log_snr_moments(tables)
        lines.append(f"  log SNR of the draws: mean {mean:.2f}, standard deviation {deviation:.2f}")
        lines.append(_row("  density/uniform", density, steps, width))
        lines.append(_row("  weight", tables.weights, steps, width))
        lines.append(_row("  density x weight", density * tables.weights, steps, width))
    return "\n".join(lines)


def _learns(name: str) -> bool:
    """Whether a strategy follows the errors of the training, which a plan cannot know."""
    parts = PLUS.split(name)
    registries: list[Registry[Any]] = list(REGISTRIES.values())
    return len(parts) > 1 and any(
        registry.parse(part).learns for part, registry in zip(parts, registries, strict=False)
    )


def _words(area: range) -> str:
    return f"{area.start}-{area.stop - 1}" if len(area) else "(none)"


def _steps_to_show(areas: Areas) -> list[int]:
    """Both ends, the edges of the areas, and a few between."""
    total, fastest, tau = areas.convergence.stop, areas.deceleration.start, areas.convergence.start
    steps = {0, total // 10, fastest, (fastest + tau) // 2, tau - 1, tau, (tau + total) // 2, total - 1}
    return sorted(step for step in steps if 0 <= step < total)


def _row(name: str, values: Any, steps: list[int], width: int) -> str:
    return f"{name:<{width}}" + "".join(f"{_short(float(values[step])):>9}" for step in steps)


def _short(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def describe_cost(cost: TrainingCost, *, gpu: str | None = None, num_gpus: int = 1, mfu: float = 0.25) -> str:
    """What a run costs, each number with its formula and marked as an estimate, as text.

    Args:
        cost: The run by its numbers.
        gpu: Name of a GPU in `GPUS`; None leaves out hours and what is left of its memory.
        num_gpus: That share the work.
        mfu: Assumed share of the GPU's bf16 peak that is reached, in (0, 1].

    Raises:
        InputError: Unknown GPU, or a share outside its range.
    """
    per_mac = f"{6 + 2 * cost.gradient_checkpointing:.3g}"
    byte_words = ", ".join(f"{name} {count}" for name, count in BYTES_A_PARAMETER.items())
    if cost.muon_ns_steps is not None:
        byte_words += f", Muon's momentum {BYTES_OF_MUON} instead of the moments of what it takes"
    if cost.ema_tracks:
        byte_words += f", {cost.ema_tracks} of ema_tracks {BYTES_OF_TRACK} each"
    rows = [
        ("parameters", f"{cost.num_parameters / 1e6:,.2f} M", "counted, in training form"),
        ("compute, per image", _flops(cost.image_flops), f"{per_mac} x multiply-accumulates of a forward pass"),
        ("compute, per step", _flops(cost.step_flops), f"x {cost.global_batch:,} images{_muon_words(cost)}"),
        ("compute, the run", _flops(cost.run_flops), f"x max_train_steps = {cost.max_train_steps:,}"),
    ]
    if gpu is not None:
        found = gpu_named(gpu)
        hours = cost.gpu_hours(found, mfu)
        assumed = f"the run / ({found.bf16_tflops:,.0f} TFLOP/s of {gpu} in bf16 x mfu = {mfu:g}, an ASSUMPTION)"
        rows.append(("GPU hours", f"{hours:,.4g}", assumed))
        rows.append(("hours on the clock", f"{hours / num_gpus:,.4g}", f"/ {num_gpus} GPU(s), if they scale"))
    rows.append(("state, per device", _bytes(cost.state_bytes), f"parameters x bytes: {byte_words}; float32"))
    if gpu is not None:
        left = found.memory_gb * 1e9 - cost.state_bytes
        fits = "for activations and the rest" if left > 0 else "does NOT fit: shard it (accelerate_configs/fsdp2.yaml)"
        rows.append((f"left of {found.memory_gb:g} GB", _bytes(left), fits))
    side, flipped = cost.config["sample_size"], ", flipped images too" if cost.random_flip else ""
    latents = f"2 moments of {cost.config['in_channels']}x{side}x{side} in float16{flipped}"
    if cost.cache_bytes is None:
        rows.append(("latent cache", f"{_bytes(cost.latent_bytes)} an image", f"{latents}; give num_images"))
    else:
        rows.append(("latent cache", _bytes(cost.cache_bytes), f"{cost.num_images:,} images x {latents}"))
    lines = ["Estimates by formula; nothing here was measured:"]
    lines += [f"  {name:<20}{value:>18}   {how}" for name, value, how in rows]
    lines.append(
        "Left out: activations (they grow with train_batch_size; profile_training.py measures them), copies in bf16,\n"
        "the VAE, the driver's memory; time of optimizer, data, latents, samples and scores. Published trainings of\n"
        "DiT-XL reach 7 to 25 % of the peak, small models far less. No strategy changes what a step costs, only how\n"
        "many steps a quality needs."
    )
    return "\n".join(lines)


def _muon_words(cost: TrainingCost) -> str:
    if cost.muon_ns_steps is None:
        return ""
    return f" + {_flops(cost.muon_flops)} of Muon's {cost.muon_ns_steps} Newton-Schulz steps, whatever the batch"


def _flops(number: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number / 1e9:,.4g} GFLOP"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if abs(number) >= 1e8 else f"{number / 1e3:,.1f} kB"
