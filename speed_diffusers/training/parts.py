"""The parts of a run, each made and checked from the options alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import PartialState
from accelerate.utils import DynamoBackend, ProjectConfiguration
from diffusers import AutoencoderKL

from ..data.batch_sampler import BatchLayout
from ..data.images import ImageRows, ImageSource, open_images
from ..data.latents import check_resolution
from ..data.local import can_be_streamed
from ..data.streaming import open_stream
from ..errors import InputError
from ..generation.pretrained import label_rows_of, load_transformer, prediction_type_of
from ..models import TrainableDiT, build_dit, dit_config
from ..predictions import FLOW_PREDICTION
from ..randomness import keyed_generator
from ..schedulers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from ..variance import LEARNED_RANGE, LearnedVariance
from .blocks import prepare_blocks
from .checkpoints import read_state
from .config import TrainConfig
from .label_table import fit_label_table
from .run import TrainingScheduler
from .run_folder import LOGGING_FOLDER
from .tracking import tracker_names


def open_data(config: TrainConfig, *, first_rows: bool = False) -> ImageRows:
    """The images to train on.

    Args:
        config: Options of the run.
        first_rows: Of `max_train_samples`, as version 0.1 took them.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    where: dict[str, Any] = {
        "dataset_name": config.dataset_name,
        "dataset_config_name": config.dataset_config_name,
        "train_data_dir": config.train_data_dir,
        "split": config.dataset_split,
        "image_column": config.image_column,
        "label_column": config.label_column,
        "cache_dir": config.cache_dir,
        "revision": config.dataset_revision,
        "max_train_samples": config.max_train_samples,
    }
    return open_stream(**where) if config.streaming else open_images(**where, first_rows=first_rows)


def open_resumed_data(config: TrainConfig, checkpoint: Path | None) -> ImageRows:
    """The images to train on: of `max_train_samples` those that a checkpoint was trained on, if it was on either.

    A run of version 0.1 took the first rows, and goes on with them.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    source = open_data(config)
    if checkpoint is None or config.max_train_samples is None or config.streaming:
        return source
    saved = read_state(checkpoint)["data_signature"]
    if source.signature(saved) == saved:
        return source
    first = open_data(config, first_rows=True)
    return first if first.signature(saved) == saved else source


def open_held_out(config: TrainConfig, source: ImageRows) -> ImageRows | None:
    """The images that the validation loss is measured on; None where the options name none.

    Args:
        config: Options of the run.
        source: The images to train on.

    Raises:
        InputError: They cannot be read, their classes are not those of the training, or they are its images.
    """
    if config.validation_data_dir is None and config.validation_split is None:
        return None
    data_dir = config.validation_data_dir or config.train_data_dir
    # What lies here is not streamed unless it would be copied.
    streamed = config.streaming and (data_dir is None or can_be_streamed(Path(data_dir).expanduser()))
    held_out = (open_stream if streamed else open_images)(
        dataset_name=config.dataset_name if data_dir is None else None,
        dataset_config_name=config.dataset_config_name,
        train_data_dir=data_dir,
        split=config.validation_split,
        image_column=config.image_column,
        label_column=config.label_column,
        cache_dir=config.cache_dir,
        revision=config.dataset_revision if data_dir is None else None,
    )
    options = f"validation_data_dir={config.validation_data_dir} validation_split={config.validation_split}"
    numbered = with_classes_of(source, held_out, options)
    if numbered.signature() == source.signature():
        raise InputError(
            f"{options}: these are the training images again, so nothing is held out; give others, or None for both."
        )
    return numbered


def with_classes_of(source: ImageRows, held_out: ImageRows, options: str) -> ImageRows:
    """Held-out images with the class ids of the training, of which they need not have every one.

    Args:
        source: The training images.
        held_out: Numbered by themselves.
        options: Beginning of an error.

    Raises:
        InputError: Their classes are not among those of the training.
    """
    theirs, ours = held_out.label_names, source.label_names
    if theirs == ours:
        return held_out
    if theirs and ours:
        if theirs == ours[: len(theirs)]:
            return held_out  # numbered alike, as integers are
        if isinstance(held_out, ImageSource) and not set(theirs) - set(ours) and len(set(ours)) == len(ours):
            ids = np.array([ours.index(name) for name in theirs])
            return replace(held_out, labels=ids[held_out.labels], label_names=ours)
    raise InputError(
        f"{options}: its {held_out.num_classes} classes are not all among the {source.num_classes} of the training, "
        "or are streamed in another order."
    )


ONLY_DIFFUSION = ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "variance_type")
"""Options that a flow knows nothing of."""


def make_scheduler(config: TrainConfig) -> TrainingScheduler:
    """The noise schedule with SpeeD.

    Raises:
        InputError: A `speed_` value is outside its range or does not fit the schedule, an option has no effect, or the
            network would predict the noise where there is nothing else.
    """
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise InputError(
            "rescale_betas_zero_snr=true prediction_type=epsilon: the schedule ends without signal, where the "
            "noise tells nothing of the image and samplers divide by zero; with rescale_betas_zero_snr take "
            "prediction_type=v_prediction."
        )
    if config.prediction_type != FLOW_PREDICTION:
        diffusion: TrainingScheduler = SpeeDDDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            prediction_type=config.prediction_type,
            variance_type=config.variance_type,
            clip_sample=False,
            **config.speed,
        )
        return diffusion
    defaults = TrainConfig()
    for name in ONLY_DIFFUSION:
        if getattr(config, name) != getattr(defaults, name):
            raise InputError(f"{name}={getattr(config, name)}: prediction_type=flow_prediction does not know it.")
    flow: TrainingScheduler = SpeeDFlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=config.flow_shift, **config.speed
    )
    return flow


def make_learned_variance(
    config: TrainConfig, scheduler: TrainingScheduler, device: torch.device
) -> LearnedVariance | None:
    """The variance term of the loss, or None where the network predicts no variance.

    Raises:
        InputError: The schedule and the prediction type allow none, or there is nothing to weigh.
    """
    if config.variance_type != LEARNED_RANGE:
        if config.weight_variance_loss:
            raise InputError("weight_variance_loss=true, but only variance_type=learned_range has a variance term.")
        return None
    assert isinstance(scheduler, SpeeDDDPMScheduler)  # a flow with a learned variance is no scheduler at all
    return LearnedVariance.from_scheduler(
        scheduler,
        prediction_type=config.prediction_type,
        weighted=config.weight_variance_loss,
        device=device,
    )


def make_model(
    config: TrainConfig, num_data_classes: int, vae: AutoencoderKL, label_names: Sequence[str] | None = None
) -> TrainableDiT:
    """The transformer in training form, new or pretrained; a pretrained one's label table is fitted to the data.

    Args:
        config: Options of the run.
        num_data_classes: Classes of the data; 0: none.
        vae: The autoencoder that makes the latents.
        label_names: Names of the classes, by which those of a pretrained model are found again; None: by number.

    Raises:
        InputError: It does not fit the images, their classes or the autoencoder.
    """
    side = check_resolution(config.resolution, vae)
    channels = int(vae.config["latent_channels"])
    out_channels = 2 * channels if config.variance_type == LEARNED_RANGE else channels
    num_classes = config.num_classes if config.num_classes is not None else num_data_classes
    if num_data_classes > num_classes:
        raise InputError(
            f"num_classes={num_classes}: the data has {num_data_classes} classes, with ids up to "
            f"{num_data_classes - 1}; allowed: at least {num_data_classes}, or None."
        )
    if config.pretrained_model_name_or_path is None:
        architecture = dit_config(
            config.model, sample_size=side, in_channels=channels, out_channels=out_channels, num_classes=num_classes
        )
        core = build_dit(
            architecture,
            keyed_generator(config.seed, "weights", 0),
            tie_embedders=config.tie_embedders,
            conditioning_init=config.conditioning_init,
        )
    else:
        transformer = load_transformer(config.pretrained_model_name_or_path, revision=config.revision)
        found = transformer.config
        for name, needed in (("sample_size", side), ("in_channels", channels), ("out_channels", out_channels)):
            if found[name] != needed:
                raise InputError(
                    f"pretrained_model_name_or_path={config.pretrained_model_name_or_path}: its {name} is "
                    f"{found[name]}, but resolution={config.resolution}, variance_type={config.variance_type} and the "
                    f"VAE need {needed}."
                )
        predicted = prediction_type_of(config.pretrained_model_name_or_path, revision=config.revision)
        if predicted not in (None, config.prediction_type):
            raise InputError(
                f"prediction_type={config.prediction_type}, but {config.pretrained_model_name_or_path} was trained "
                f"with {predicted}."
            )
        names, null_row = label_rows_of(config.pretrained_model_name_or_path, revision=config.revision)
        fit_label_table(transformer, num_classes, label_names, pretrained_names=names, null_row=null_row)
        core = TrainableDiT(transformer, tie_embedders=config.tie_embedders)
    prepare_blocks(core, config)
    return core.train()


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for devices, processes, precision and trackers; never for accumulation, loaders or checkpoints.

    Raises:
        InputError: The launcher asks for what would not happen or do harm: fp16, more processes than accelerate sees,
            a flow whose timesteps FSDP would round, an optimizer whose matrices it would shard; or the environment
            holds a part only of what a launcher sets.
    """
    check_launcher(os.environ)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.deterministic:
        # What cuBLAS asks for. Errors, not warnings: with warnings attention keeps its other kernels.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    folder = Path(config.output_dir)
    cpu = not torch.accelerator.is_available()
    # InitProcessGroupKwargs would leave out what happens to be NCCL's default, and gloo has another.
    PartialState(cpu=cpu, timeout=timedelta(seconds=config.ddp_timeout))
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        log_with=tracker_names(config.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / LOGGING_FOLDER)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(f"mixed_precision={accelerator.mixed_precision}: allowed: no, bf16 (needs no loss scaling).")
    if config.compile and (compiler := accelerator.state.dynamo_plugin.backend) != DynamoBackend.NO:
        raise InputError(
            f"compile=true, and accelerate is configured to compile too (dynamo_backend {compiler.value}): keep one."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError("DeepSpeed is not supported; to shard a model take accelerate_configs/fsdp2.yaml.")
    if accelerator.distributed_type == DistributedType.FSDP:
        instead = "or accelerate_configs/multi_gpu.yaml"
        if accelerator.mixed_precision == "bf16" and config.prediction_type == FLOW_PREDICTION:
            raise InputError(
                "mixed_precision=bf16 prediction_type=flow_prediction: FSDP would round a flow's timesteps to 8 bits; "
                f"take mixed_precision=no, {instead}."
            )
        if config.optimizer != "adamw":
            raise InputError(
                f"optimizer={config.optimizer}: works on whole matrices, which FSDP shards; take optimizer=adamw, "
                f"{instead}."
            )
    _check_joined(accelerator.num_processes)
    return accelerator


LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate launch tell each of several processes."""


def check_launcher(environment: Mapping[str, str]) -> None:
    """Checks that the environment is that of one process, or of one of several with all that it must know.

    Raises:
        InputError: A part of it is missing, or it is no number.
    """
    # -1 is what older scripts set for a process that is alone.
    given = {name: value for name in LAUNCHED_BY if (value := environment.get(name, "-1")) != "-1"}
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    try:
        rank, _, world = (int(given.get(name, default)) for name, default in zip(LAUNCHED_BY, "001", strict=False))
    except ValueError as error:
        raise InputError(f"The environment has {told}: ranks and sizes are whole numbers.") from error
    missing = [name for name in LAUNCHED_BY if not given.get(name)]
    if missing and (world > 1 or rank > 0 or "LOCAL_RANK" in given):
        raise InputError(
            f"The environment has {told}, but not {', '.join(missing)}: launch with torchrun or accelerate launch, "
            "which set them all, or unset those for a single process."
        )
    if not 0 <= rank < world:
        raise InputError(f"The environment has {told}: RANK must lie in [0, WORLD_SIZE).")


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several."""
    return environment.get("WORLD_SIZE", "1") not in ("", "-1", "1")


def _check_joined(num_processes: int) -> None:
    """Checks that accelerate has joined as many processes as the launcher started.

    Raises:
        InputError: It runs another number of them.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if is_launched(os.environ) and int(launched) != num_processes:
        raise InputError(
            f"WORLD_SIZE={launched}, but accelerate runs {num_processes} process(es); on CPUs launch with: "
            f"torchrun --nproc_per_node {launched}"
        )


def start_process() -> PartialState:
    """Joins the other processes, if a launcher started several, for what is no training.

    Raises:
        InputError: The launcher's environment is not whole.
    """
    check_launcher(os.environ)
    # The others wait while one works alone, however long that takes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    _check_joined(state.num_processes)
    return state


def check_same_step(accelerator: Accelerator, checkpoint: Path | None) -> None:
    """Checks that all processes resume from the same checkpoint.

    Raises:
        InputError: They do not: the machines of the run see different folders.
    """
    step = read_state(checkpoint)["step"] if checkpoint is not None else 0
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise InputError(f"The processes found checkpoints of different steps ({steps}); output_dir must be shared.")


def make_layout(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> BatchLayout:
    """How a global batch is split; a resumed run keeps its global batch by accumulating more or less.

    Raises:
        InputError: The global batch of the checkpoint is no multiple of what the processes take at once.
    """
    accumulation = config.gradient_accumulation_steps
    at_once = config.train_batch_size * accelerator.num_processes
    if checkpoint is not None:
        kept = read_state(checkpoint)["global_batch"]
        if kept % at_once:
            raise InputError(
                f"train_batch_size={config.train_batch_size} x {accelerator.num_processes} process(es) = {at_once} "
                f"does not divide the global batch of {kept} that {checkpoint} was trained with."
            )
        accumulation = kept // at_once
    return BatchLayout(config.train_batch_size, accelerator.num_processes, accelerator.process_index, accumulation)


def set_learning_rate(lr_scheduler: Any, step: int) -> None:
    """Puts a schedule to a step: the rate is a function of it, so nothing else needs to be restored."""
    lr_scheduler.last_epoch = step
    rates = [base * rate(step) for base, rate in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates
