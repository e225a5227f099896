"""See before you spend: areas, densities and weights of any strategies on any noise schedule, and what a run costs.

    python train_scripts/plan.py
    python train_scripts/plan.py config=imagenet_256/dit_xl2 strategies=paper,official,uniform gpu=H100 num_gpus=8
    python train_scripts/plan.py scheduler=FlowMatchEulerDiscreteScheduler \\
        'strategies=["paper", "logit_normal:mean=0+none", "uniform+min_snr:gamma=5"]'

Takes every option of train_dit_speed.py and trains nothing; it lists what lies in train_data_dir. A strategy is a
preset (paper, official, uniform, ...) or density+weighting, or density+weighting+draw, with parameters as in
`speed_sampling`. Commas part the strategies, so one with a comma of its own is quoted:
'strategies=["uniform+p2:k=1,gamma=1", "paper"]'. Costs are estimates by formula.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from diffusers import DiTTransformer2DModel

from speed_diffusers.assets import EMBEDDED, EMBEDDED_IMAGES, EMBEDDED_PIPELINE
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.data.listing import describe_ignored, describe_images
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_output_file
from speed_diffusers.generation.pretrained import read_scheduler_config, transformer_config_of
from speed_diffusers.json_files import check_values, read_object
from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.reports.strategy_plot import save_strategy_plot
from speed_diffusers.reports.strategy_report import describe_cost, describe_strategies, strategy_tables
from speed_diffusers.reports.training_cost import GPUS, TrainingCost, gpu_named
from speed_diffusers.schedulers import speed_scheduler
from speed_diffusers.training.config import DEFAULT_CONFIG, TrainConfig, with_steps_of_epochs
from speed_diffusers.training.parts import make_scheduler, open_data
from speed_diffusers.training.run_folder import is_run, load_run_config
from speed_diffusers.variance import LEARNED_RANGE

SCRIPT_DIR = Path(__file__).resolve().parent
SCHEDULER_FILE = "scheduler_config.json"

IMAGENET, IMAGENET_IMAGES = "ILSVRC/imagenet-1k", 1_281_167
DEFAULT_VAE = (4, 8)
"""Latent channels, and pixels along a side of one latent, of Stable Diffusion's autoencoders."""


@dataclass
class PlanConfig(TrainConfig):
    """Options of `plan.py`: the trainer's, and these."""

    scheduler: str | None = option(
        None,
        "Noise schedule: folder of a scheduler, pipeline or run, or a scheduler class of diffusers; "
        "None: from the options of the training.",
        path=True,
    )
    strategies: list[str] = option(
        [], 'What to compare: presets or density+weighting, ["a","b"] if one has a comma; empty: the run\'s, uniform.'
    )
    progress: float = option(
        0.0, "Share of the training that is done, for what changes in its course.", interval="[0, 1]"
    )
    gpu: str | None = option("A100", f"For hours and memory: {', '.join(GPUS)}; None leaves them out.")
    num_gpus: int = option(
        1, "GPUs that share the run, each taking train_batch_size images at once.", interval="[1, 10^6]"
    )
    mfu: float = option(0.25, "Assumed share of the GPU's bf16 peak that training reaches.", interval="(0, 1]")
    num_images: int | None = option(
        None,
        "Images of the data; None: known for train_data_dir, the embedded images and ImageNet.",
        interval="[1, 10^12]",
    )
    output: str | None = option("plan.png", "PNG file to write; None writes none.", path=True)


def main(argv: list[str]) -> None:
    """Prints the plan and draws the picture.

    Raises:
        InputError: Wrong options, or a strategy that the schedule does not allow; nothing has been written.
    """
    config = load_config(PlanConfig, argv, SCRIPT_DIR, default=DEFAULT_CONFIG)
    _check(config)
    data = ""
    if config.scheduler is None:
        if config.train_data_dir is not None:
            config, data = _with_own_images(config)
        scheduler = make_scheduler(config)
        costs = describe_cost(training_cost(config), gpu=config.gpu, num_gpus=config.num_gpus, mfu=config.mfu)
    else:
        _refuse_options_of_training(argv)
        scheduler = open_scheduler(config.scheduler)
        costs = "A scheduler says nothing of a network: for costs give config=NAME or the options of a training."
    strategies = strategy_tables(scheduler, config.strategies, config.progress)
    areas = scheduler.speed_areas
    print(*filter(None, (describe_strategies(strategies, areas), data, costs)), sep="\n\n")
    if config.output is not None:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        save_strategy_plot(strategies, areas, _title(scheduler, config), output)
        print(f"\nSaved {output}.")


def _check(config: PlanConfig) -> None:
    if config.gpu is not None:
        gpu_named(config.gpu)
    if len(set(config.strategies)) < len(config.strategies):
        raise InputError(f"strategies={','.join(config.strategies)}: one is given twice.")
    if config.output is not None:
        check_output_file("output", config.output, ".png")


def _with_own_images(config: PlanConfig) -> tuple[PlanConfig, str]:
    """The options with the numbers of `train_data_dir`, and what lies in it."""
    source = open_data(config)
    numbers = {"num_images": len(source), "num_classes": source.num_classes}
    known: dict[str, Any] = {name: value for name, value in numbers.items() if getattr(config, name) is None}
    ignored = describe_ignored(source) or "nothing"
    return replace(config, **known), f"Images: {describe_images(source)}\nIgnored: {ignored}"


def _refuse_options_of_training(argv: list[str]) -> None:
    """Options that a given scheduler would leave without effect are no slip to pass over."""
    own = {"scheduler", "strategies", "progress", "output"}
    given = [re.sub("^--", "", word).split("=")[0].replace("-", "_") for word in argv]
    known = {*PlanConfig.__dataclass_fields__, "config"}
    for name in given:
        if name in known and name not in own:
            allowed = ", ".join(sorted(own - {"scheduler"}))
            raise InputError(f"{name} has no effect beside scheduler=...; what goes with it: {allowed}.")


def open_scheduler(name: str) -> Any:
    """A scheduler with SpeeD: saved in a folder, that of a run or a pipeline, or of a class by its defaults.

    Raises:
        InputError: There is none, or it cannot be used for training.
    """
    folder = Path(name)
    if is_run(folder):
        # What a run's pipeline carries is for sampling; its options have SpeeD's settings too.
        return make_scheduler(load_run_config(folder))
    if not folder.exists():
        return speed_scheduler({"_class_name": name})
    places = [folder / "scheduler" / SCHEDULER_FILE, folder / SCHEDULER_FILE]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"scheduler={name}: neither a run, nor a pipeline or scheduler (no {SCHEDULER_FILE} in it).")
    saved = read_scheduler_config(found)
    try:
        return speed_scheduler(saved)
    except InputError:
        raise
    except Exception as error:  # whatever diffusers makes of values that its scheduler cannot have
        raise InputError(f"scheduler={name}: {found} makes no scheduler ({error}).") from error


def training_cost(config: PlanConfig) -> TrainingCost:
    """The run that the options describe, by its numbers; nothing is loaded but small files of the package.

    Raises:
        InputError: The autoencoder or the patches do not divide the images.
    """
    architecture = _architecture(config)
    with torch.device("meta"):
        core = build_dit(architecture, None, tie_embedders=config.tie_embedders)
    num_images = _num_images(config)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * config.num_gpus
    if config.num_train_epochs is not None and num_images is None:
        raise InputError(f"num_train_epochs={config.num_train_epochs}: of how many images? Give num_images=N too.")
    return TrainingCost(
        config=architecture,
        num_parameters=sum(parameter.numel() for parameter in core.parameters() if parameter.requires_grad),
        global_batch=global_batch,
        max_train_steps=with_steps_of_epochs(config, num_images or 0, global_batch).max_train_steps,
        num_images=num_images,
        **config.cost_options(),
    )


def _architecture(config: PlanConfig) -> Mapping[str, Any]:
    """Config of the transformer: a pretrained one's own, or that of the model which is named."""
    if (name := config.pretrained_model_name_or_path) is not None:
        saved = transformer_config_of(name)
        if saved is None:
            raise InputError(
                f"pretrained_model_name_or_path={name}: is not on this disk, and a plan asks no Hub; leave it out and "
                "name a model=... of its size, or take train_dit_speed.py dry_run=true."
            )
        with torch.device("meta"):
            full = DiTTransformer2DModel.from_config(saved).config  # with what the file leaves out
        return {**full, "out_channels": full["out_channels"] or full["in_channels"]}
    channels, factor = _latent_form(config.pretrained_vae_model_name_or_path)
    if config.resolution % factor:
        raise InputError(f"resolution={config.resolution}: must be a multiple of the autoencoder's factor, {factor}.")
    return dit_config(
        config.model,
        sample_size=config.resolution // factor,
        in_channels=channels,
        out_channels=2 * channels if config.variance_type == LEARNED_RANGE else channels,
        num_classes=config.num_classes or 0,
    )


def _latent_form(vae: str) -> tuple[int, int]:
    """Latent channels and factor of an autoencoder in a folder; of one elsewhere, Stable Diffusion's are assumed."""
    folder = EMBEDDED_PIPELINE if vae == EMBEDDED else Path(vae)
    places = [folder / "pipeline" / "vae", folder / "vae", folder]
    found = next((place / "config.json" for place in places if (place / "config.json").is_file()), None)
    if found is None:
        return DEFAULT_VAE
    saved = read_object(found)
    check_values(found, saved, {"latent_channels": int, "block_out_channels": list[int]})
    if not (saved.get("latent_channels") and saved.get("block_out_channels")):
        raise InputError(f"pretrained_vae_model_name_or_path={vae}: {found} is not that of an AutoencoderKL.")
    return int(saved["latent_channels"]), int(2 ** (len(saved["block_out_channels"]) - 1))


def _num_images(config: PlanConfig) -> int | None:
    known = config.num_images
    # How many images another split or a part of one has, a plan does not know.
    if known is None and config.train_data_dir is None and config.dataset_split == "train":
        if config.dataset_name == EMBEDDED:
            known = pyarrow.parquet.read_metadata(EMBEDDED_IMAGES).num_rows
        elif config.dataset_name == IMAGENET:
            known = IMAGENET_IMAGES
    limit = config.max_train_samples
    return known if known is None or limit is None else min(known, limit)


def _title(scheduler: Any, config: PlanConfig) -> str:
    process = scheduler.speed_strategy.process
    kind = scheduler.config.get("beta_schedule")
    kind = f"{kind} schedule" if kind else f"rectified flow, shift {process.flow_shift:g}"
    if scheduler.config.get("rescale_betas_zero_snr"):
        kind += ", zero terminal SNR"
    progress = f", at {config.progress:.0%} of the training" if config.progress else ""
    name = type(scheduler).__name__.removeprefix("SpeeD")
    predicted = scheduler.speed_strategy.options.prediction_type
    return f"Timestep strategies on {name}: {kind}, {process.num_train_timesteps:,} steps, {predicted}{progress}"


if __name__ == "__main__":
    run_script(main, __doc__, PlanConfig)
