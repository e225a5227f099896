"""Every option of the training script, its default, range and help, under the names that diffusers' scripts use."""

import math
from dataclasses import Field, dataclass, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any

from ..assets import EMBEDDED
from ..config.schema import Options, option
from ..errors import InputError
from ..generation.samplers import SAMPLERS
from ..metrics.extractors import FASHION_MNIST
from ..models import CONDITIONING_INITS, MODEL_NAMES
from ..objective import PREDICTION_TYPES
from ..registry import help_lines
from ..settings import SPEED_KEYS, SpeeDOptions
from ..strategy import REGISTRIES
from ..variance import VARIANCE_TYPES

DEFAULT_CONFIG = "quickstart/fast"
"""What the training script trains where it is told nothing."""

OPTIMIZERS = ("adamw", "muon")

COMPILE_BACKENDS = ("inductor", "aot_eager", "eager")
"""Of `torch.compile`: what makes kernels, and two that only trace, for tests and for the search for faults."""

DEFAULT_BUFFER = 10_000
"""Images of ImageNet: about a gigabyte."""

COOLDOWN = "warmup_stable_decay"
"""The schedule by its name in transformers; diffusers has none like it."""

POLYNOMIAL_END = 1e-7
"""Where diffusers' polynomial schedule ends; it must begin above."""

TARGET_OPTIONS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "prediction_type",
    "flow_shift",
)
"""What must be the same for errors at a timestep to be errors of the same thing."""


def _speed_field(key: str, field: "Field[Any]") -> tuple[str, Any, Any]:
    """An option of SpeeD as a field of the training script, with what may be chosen behind its help text."""
    about, kind = field.metadata["help"], field.type
    choices: tuple[str, ...] = ()
    if key in REGISTRIES:
        kind = str
        if any(entry.parameters for entry in REGISTRIES[key].values()):
            # Names with parameters behind them, which the registry reads.
            about = f"{about} With parameters as in NAME:a=1,b=2. {help_lines(REGISTRIES[key])}"
        else:
            choices = tuple(REGISTRIES[key])
    interval = field.metadata["interval"]
    return key, kind, option(field.default, about, interval=interval and interval.text, choices=choices)


@dataclass
class _DataAndModel(Options):
    """The options that stand before SpeeD's."""

    # Data
    dataset_name: str | None = option(
        None, "Dataset on the Hub, or 'embedded' for the Fashion-MNIST images in the package."
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset, if it has several.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the dataset on the Hub.")
    dataset_split: str = option("train", "Split to train on, or a part: train[:10%].")
    train_data_dir: str | None = option(
        None, "One sub-folder of images per class, or parquet files.", free=True, path=True
    )
    image_column: str = option("image", "Column that holds the images.")
    label_column: str | None = option("label", "Column that holds the classes; None trains without classes.")
    max_train_samples: int | None = option(None, "Train on so many images, chosen at random.", interval="[1, inf)")
    max_bad_images: float = option(
        0.01, "Share of images that may be unreadable; above it the run stops.", interval="[0, 1]", free=True
    )
    check_images: bool = option(False, "A dry run decodes every image too, and lists the bad ones.", free=True)
    cache_dir: str | None = option(
        None, "Of downloads and cached latents; None: that of datasets.", free=True, path=True
    )
    streaming: bool = option(
        False, "Read parquet or saved Arrow data, here or on the Hub, as the training goes, without a copy of it."
    )
    shuffle_buffer_size: int = option(
        DEFAULT_BUFFER,
        "Streamed images that may wait for their turn, over all processes; 1: none.",
        interval="[1, 10^9]",
        only_with=("streaming", True),
    )
    resolution: int = option(256, "Side of the square training images, in pixels.", interval="[1, 2^14]")
    center_crop: bool = option(True, "Crop the centre square; false squeezes the whole image into a square.")
    random_flip: bool = option(False, "Mirror half of the images left to right.")
    cache_latents: bool = option(True, "Encode the images once; false encodes them in every step.")
    vae_batch_size: int = option(
        32, "Images that the VAE encodes or decodes at once.", interval="[1, 10^6]", free=True
    )
    dataloader_num_workers: int = option(
        0, "Processes that load data; 0 loads in the training process.", interval="[0, 256]", free=True
    )
    dataloader_prefetch_factor: int = option(
        2, "Batches that each of them loads ahead.", interval="[1, 1000]", free=True
    )

    # Model
    model: str = option("DiT-XL/2", "Size and patch of the transformer.", choices=MODEL_NAMES)
    num_classes: int | None = option(
        None, "Classes of the model; None: as many as the data has.", interval="[0, 10^6]"
    )
    pretrained_model_name_or_path: str | None = option(
        None, "DiT to fine-tune: run, pipeline folder, Hub id.", path=True
    )
    pretrained_vae_model_name_or_path: str = option(
        "stabilityai/sd-vae-ft-ema",
        "AutoencoderKL: folder, Hub id, or 'embedded' for the one in the package.",
        path=True,
    )
    revision: str | None = option(None, "Branch, tag or commit of the pretrained model on the Hub.")
    tie_embedders: bool = option(True, "One timestep and label embedder for all blocks, as in DiT.")
    conditioning_init: str = option(
        "dit",
        "How timestep and label embedders begin: dit (N(0, 0.02^2)), or unit: their sum has size 1 at any width.",
        choices=CONDITIONING_INITS,
        only_with=("pretrained_model_name_or_path", None),
    )
    gradient_checkpointing: float = option(
        0.0,
        "Share of the blocks that recompute activations to save memory; true: all.",
        interval="[0, 1]",
        share=True,
        free=True,
    )

    # Diffusion process and SpeeD
    num_train_timesteps: int = option(1000, "Timesteps of the diffusion process.", interval="[2, 10^6]")
    beta_schedule: str = option(
        "linear", "Noise schedule.", choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    )
    beta_start: float = option(0.0001, "First beta.", interval="(0, 1)")
    beta_end: float = option(0.02, "Last beta; at least beta_start.", interval="(0, 1)")
    rescale_betas_zero_snr: bool = option(False, "End the noise schedule at zero signal.")
    prediction_type: str = option(
        "epsilon", "What the network predicts; flow_prediction trains a rectified flow.", choices=PREDICTION_TYPES
    )
    flow_shift: float = option(
        1.0,
        "Shift of a flow's times, for large images; above 1 favours much noise: log SNR falls by 2 ln(shift).",
        interval="[0.001, 1000]",
        only_with=("prediction_type", "flow_prediction"),
    )
    variance_type: str = option(
        "fixed_small",
        "learned_range: the network predicts the steps' variance too, as DiT does.",
        choices=VARIANCE_TYPES,
    )
    weight_variance_loss: bool = option(False, "The loss weight holds for the variance term too.")


if TYPE_CHECKING:
    _WithSpeeD = _DataAndModel
else:
    _FIELDS = {field.name: field for field in fields(SpeeDOptions)}
    _WithSpeeD = make_dataclass(
        "_WithSpeeD", [_speed_field(key, _FIELDS[name]) for key, name in SPEED_KEYS.items()], bases=(_DataAndModel,)
    )


@dataclass
class TrainConfig(_WithSpeeD):
    """Options of `train_dit_speed.py`, SpeeD's from `SpeeDOptions`. Steps are optimizer steps everywhere."""

    class_dropout_prob: float = option(
        0.1, "Share of samples trained without their class, for guidance.", interval="[0, 1)"
    )

    # Optimisation
    train_batch_size: int = option(32, "Images per device at once.", interval="[1, 10^6]", free=True)
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients make one optimizer step.", interval="[1, 10^6]", free=True
    )
    max_train_steps: int = option(400_000, "Optimizer steps of the run.", interval="[1, 10^9]")
    num_train_epochs: int | None = option(
        None,
        "Passes over the training images instead of max_train_steps, which follows from them when the run begins.",
        interval="[1, 10^6]",
        instead_of="max_train_steps",
    )
    learning_rate: float = option(1e-4, "Learning rate after the warm-up.", interval="(0, inf)")
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Learning-rate schedule; warmup_stable_decay is constant but for lr_warmup_steps and lr_decay_steps.",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            COOLDOWN,
        ),
    )
    lr_warmup_steps: int = option(
        0, "Optimizer steps over which the learning rate grows from 0.", interval="[0, 10^9]"
    )
    lr_decay_steps: int = option(
        0,
        "Last optimizer steps, over which warmup_stable_decay falls to 0 by 1 - sqrt.",
        interval="[0, 10^9]",
        only_with=("lr_scheduler", COOLDOWN),
    )
    optimizer: str = option(
        "adamw", "adamw; muon: Muon for the blocks' matrices, AdamW for all else.", choices=OPTIMIZERS
    )
    muon_learning_rate: float | None = option(
        None,
        "Learning rate of Muon's matrices, in AdamW's units; None: learning_rate.",
        interval="(0, inf)",
        only_with=("optimizer", "muon"),
    )
    muon_momentum: float = option(
        0.95, "Muon's decay of the momentum.", interval="[0, 1)", only_with=("optimizer", "muon")
    )
    muon_ns_steps: int = option(
        5,
        "Newton-Schulz steps by which Muon orthogonalises; its price is nearly proportional.",
        interval="[1, 99]",
        only_with=("optimizer", "muon"),
    )
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment.", interval="[0, 1)")
    adam_beta2: float = option(0.999, "AdamW's decay of the second moment.", interval="[0, 1)")
    adam_weight_decay: float = option(0.0, "AdamW's weight decay.", interval="[0, 1000]")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", interval="[1e-30, 1e6]")
    max_grad_norm: float | None = option(
        1.0, "Gradients are scaled down to this norm; None: never.", interval="[1e-12, inf)"
    )
    ema_decay: float | None = option(
        None, "Decay of the EMA weights; None: half-life of 5 % of the run.", interval="[0, 1)"
    )
    ema_tracks: list[float] = option(
        [],
        "Also keep power-function averages of these relative lengths, such as 0.05,0.1, written at each checkpoint: "
        "evaluate.py weights=ema:0.07 makes any length of them.",
        interval="(0, 0.28]",
    )
    mixed_precision: str | None = option(None, "None: as accelerate is configured.", choices=("no", "bf16"))
    compile: bool = option(
        False, "Compile the transformer's blocks (torch.compile); checkpoints stay plain.", free=True
    )
    compile_backend: str = option(
        "inductor", "Backend of torch.compile.", choices=COMPILE_BACKENDS, only_with=("compile", True), free=True
    )
    deterministic: bool = option(
        False, "Kernels that repeat to the bit on GPUs too, where some add up in any order; slower.", free=True
    )
    ddp_timeout: int = option(
        600, "Seconds that a process waits for the others before the run ends.", interval="[1, 604800]", free=True
    )
    allow_tf32: bool = option(True, "Let NVIDIA GPUs round float32 matrix products to TF32.")
    seed: int = option(0, "Seed of everything random.", interval="[0, 2^63)")

    # Samples during training, samples and score after it
    validation_steps: int | None = option(
        None, "Generate a grid of images every so many steps; None: never.", interval="[1, inf)", free=True
    )
    validation_data_dir: str | None = option(
        None,
        "Held-out images, like train_data_dir: their loss at fixed noise levels, every validation_steps.",
        free=True,
        path=True,
    )
    validation_split: str | None = option(None, "Held-out split of the data, or of validation_data_dir.", free=True)
    max_validation_samples: int = option(500, "Use at most so many held-out images.", interval="[1, inf)", free=True)
    validation_class_labels: list[str] = option(
        [], "Its classes, names or rows of the label table; empty: the first 10.", free=True
    )
    num_validation_images: int = option(8, "Images per class in the grid.", interval="[1, 1000]", free=True)
    guidance_scale: float = option(1.5, "Guidance of the grid; 1: none.", interval="[1, 1000]", free=True)
    sampler: str | None = option(None, "Of grid and score; None: DDIM.", choices=SAMPLERS, free=True)
    num_inference_steps: int = option(50, "Solver steps of grid and score.", interval="[1, inf)", free=True)
    num_score_images: int | None = option(
        None, "Score the result with so many images; None: no score.", interval="[2, 10^7]", free=True
    )
    score_reference: str = option(
        EMBEDDED,
        "What they are held against: 'embedded', or a file of make_reference_statistics.py.",
        free=True,
        path=True,
    )
    feature_extractor: str = option(
        FASHION_MNIST,
        "What they are seen with: fashion_mnist, or module:attribute as for evaluate.py.",
        free=True,
        path=True,
    )

    # Output
    output_dir: str = option("runs/dit_speed", "Folder of the run.", free=True, path=True)
    overwrite_output_dir: bool = option(False, "Delete the run that the folder holds.", free=True)
    logging_steps: int = option(50, "Log every so many steps.", interval="[1, inf)", free=True)
    report_to: list[str] = option(
        ["tensorboard"], "Trackers by name, or all; none or empty: metrics.jsonl only.", free=True
    )
    tracker_project_name: str = option("speed_diffusers", "Project name in the trackers.", free=True)
    checkpointing_steps: int | None = option(
        5000, "Save the state every so many steps; None: at the end.", interval="[1, inf)", free=True
    )
    checkpoints_total_limit: int | None = option(
        None, "Keep the newest so many; None: all.", interval="[1, inf)", free=True
    )
    resume_from_checkpoint: str | None = option(None, "'latest' or the folder of a checkpoint.", free=True, path=True)
    allow_config_changes: bool = option(False, "Resume although options that matter have changed.", free=True)
    dry_run: bool = option(False, "Check everything, print the plan, write nothing.", free=True)

    # The Hub
    push_to_hub: bool = option(
        False, "Release the result on the Hub; if that fails, the run is as good as without it.", free=True
    )
    hub_model_id: str | None = option(None, "Where to, OWNER/NAME; a NAME alone is one of yours.", free=True)
    hub_private_repo: bool | None = option(
        None, "Make the repository private; None: as the owner's default is.", free=True
    )
    hub_revision: str = option("main", "Branch to push to; made if it is not there.", free=True)
    hub_license: str | None = option(
        None, "Of the weights, as the Hub lists it (apache-2.0, mit, cc-by-nc-4.0, ...); None: not stated.", free=True
    )

    def cost_options(self) -> dict[str, Any]:
        """What of the options changes the costs of a run, by the names of `reports.training_cost.TrainingCost`."""
        return {
            "random_flip": self.random_flip,
            "gradient_checkpointing": self.gradient_checkpointing,
            "muon_ns_steps": self.muon_ns_steps if self.optimizer == "muon" else None,
            "ema_tracks": len(self.ema_tracks),
        }

    def __post_init__(self) -> None:
        self.gradient_checkpointing = float(self.gradient_checkpointing)  # True from Python, as of old
        if self.conditioning_init != "dit" and self.pretrained_model_name_or_path is not None:
            raise InputError(
                f"conditioning_init={self.conditioning_init}: a pretrained model has its weights already; leave it "
                "out."
            )
        super().__post_init__()
        if self.check_images and not self.dry_run:
            raise InputError("check_images=true: only with dry_run=true.")
        if self.streaming and self.cache_latents:
            raise InputError("streaming=true encodes images as they come: it needs cache_latents=false.")
        if self.beta_start > self.beta_end:
            raise InputError(
                f"beta_start={self.beta_start} beta_end={self.beta_end}: must be in order, and beta_end below 1."
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise InputError(
                f"lr_warmup_steps={self.lr_warmup_steps}: lr_scheduler=constant has none; take constant_with_warmup."
            )
        if self.lr_scheduler == COOLDOWN:
            # How many steps epochs are is known when the images are; this is then called again.
            known = self.num_train_epochs is None
            if known and not 1 <= self.lr_decay_steps <= self.max_train_steps - self.lr_warmup_steps:
                raise InputError(
                    f"lr_decay_steps={self.lr_decay_steps}: lr_scheduler={COOLDOWN} needs some in [1, max_train_steps "
                    f"- lr_warmup_steps], here [1, {self.max_train_steps - self.lr_warmup_steps}]."
                )
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise InputError(f"learning_rate={self.learning_rate}: lr_scheduler=polynomial ends at {POLYNOMIAL_END}.")
        if self.push_to_hub and self.hub_model_id is None:
            raise InputError("push_to_hub=true needs hub_model_id=OWNER/NAME.")
        if self.num_inference_steps > self.num_train_timesteps:
            raise InputError(
                f"num_inference_steps={self.num_inference_steps}: at most "
                f"num_train_timesteps={self.num_train_timesteps}."
            )

    def saves_at(self, step: int) -> bool:
        """Whether a run that nothing stops saves its state after an optimizer step, counted from 1."""
        every = self.checkpointing_steps
        return step == self.max_train_steps or (every is not None and step % every == 0)

    @property
    def speed(self) -> dict[str, Any]:
        """The options of SpeeD, as keywords of a scheduler."""
        return {key: getattr(self, key) for key in SPEED_KEYS}


def with_steps_of_epochs(config: TrainConfig, num_images: int, global_batch: int) -> TrainConfig:
    """Options whose length is a number of steps: as many as it takes to see every image num_train_epochs times.

    Args:
        config: The options.
        num_images: Images that a training goes through before it begins again.
        global_batch: Images of an optimizer step, over all processes and batches.

    Raises:
        InputError: lr_decay_steps does not fit into so many steps.
    """
    if config.num_train_epochs is None:
        return config
    steps = math.ceil(config.num_train_epochs * num_images / global_batch)
    return replace(config, max_train_steps=steps, num_train_epochs=None)


def trainer_options(config: TrainConfig) -> TrainConfig:
    """The trainer's own options out of those of a script that has some more."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})
