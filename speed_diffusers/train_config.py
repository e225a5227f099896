"""Every option of the training script, its default and its help, under the names that diffusers' scripts use."""

from dataclasses import dataclass, field
from typing import Any

from .embedded import EMBEDDED
from .metrics.extractors import FASHION_MNIST
from .models import MODEL_NAMES
from .objective import PREDICTION_TYPES
from .registry import help_lines
from .samplers import SAMPLERS
from .timesteps import DENSITIES, DRAWS
from .variance import VARIANCE_TYPES
from .weightings import WEIGHTINGS


def option(default: Any, help: str, *, choices: Any = None, free: bool = False) -> Any:
    """A dataclass field with its help text.

    Args:
        default: Default value; lists are copied.
        help: One line for `--help`.
        choices: Allowed names, if the value is one of a few.
        free: The value may differ when a run is resumed, because it does not touch what is computed.
    """
    metadata = {"help": help, "free": free} | ({"choices": tuple(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Options of `train_dit_speed.py`. Steps are optimizer steps everywhere."""

    # Data
    dataset_name: str | None = option(None, "Dataset on the Hub, or 'embedded' for the shipped Fashion-MNIST images.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, if it has several.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the dataset on the Hub.")
    dataset_split: str = option("train", "Split to train on.")
    train_data_dir: str | None = option(None, "Sub-folders of images a class, or parquet files.", free=True)
    image_column: str = option("image", "Column that holds the images.")
    label_column: str | None = option("label", "Column that holds the classes; None trains without classes.")
    max_train_samples: int | None = option(None, "Train on the first so many images only.")
    cache_dir: str | None = option(None, "Of downloads and cached latents; None: that of datasets.", free=True)
    resolution: int = option(256, "Side of the square training images, in pixels.")
    center_crop: bool = option(True, "Crop the centre square; false squeezes the whole image into a square.")
    random_flip: bool = option(False, "Mirror half of the images left to right.")
    cache_latents: bool = option(True, "Encode the images once; false encodes them in every step.")
    vae_batch_size: int = option(32, "Images that the VAE encodes or decodes at once.", free=True)
    dataloader_num_workers: int = option(0, "Processes that load data; 0 loads in the training process.", free=True)

    # Model
    model: str = option("DiT-XL/2", "Size and patch of the transformer.", choices=MODEL_NAMES)
    num_classes: int | None = option(None, "Classes of the model; None: as many as the data has.")
    pretrained_model_name_or_path: str | None = option(None, "DiT to fine-tune: run, pipeline folder, Hub id.")
    pretrained_vae_model_name_or_path: str = option(
        "stabilityai/sd-vae-ft-ema", "AutoencoderKL: folder, Hub id, or 'embedded' for the shipped one."
    )
    revision: str | None = option(None, "Branch, tag or commit of the pretrained model on the Hub.")
    tie_embedders: bool = option(True, "One timestep and label embedder for all blocks, as in DiT.")
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")

    # Diffusion process and SpeeD
    num_train_timesteps: int = option(1000, "Timesteps of the diffusion process.")
    beta_schedule: str = option(
        "linear", "Noise schedule.", choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    )
    beta_start: float = option(0.0001, "First beta.")
    beta_end: float = option(0.02, "Last beta.")
    rescale_betas_zero_snr: bool = option(False, "End the noise schedule at zero signal.")
    prediction_type: str = option(
        "epsilon", "What the network predicts; flow_prediction trains a rectified flow.", choices=PREDICTION_TYPES
    )
    flow_shift: float = option(1.0, "Shift of a flow's times towards noise, for large images.")
    variance_type: str = option(
        "fixed_small",
        "learned_range: the network predicts the steps' variance too, as DiT does.",
        choices=VARIANCE_TYPES,
    )
    weight_variance_loss: bool = option(False, "The loss weight holds for the variance term too.")
    # These two may have parameters behind their names, which their registries read.
    speed_sampling: str = option(
        "asymmetric", f"Density over timesteps, as in logit_normal:mean=0,std=1. {help_lines(DENSITIES)}"
    )
    speed_weighting: str = option(
        "change_aware", f"Loss weight over timesteps, as in min_snr:gamma=5. {help_lines(WEIGHTINGS)}"
    )
    speed_k: float = option(5.0, "How many times more often steps before tau are drawn; at least 1.")
    speed_tau: float | None = option(
        None, "First timestep of the convergence area, or a share of all below 1; None: from speed_r."
    )
    speed_r: float = option(145.0, "Convergence begins where 1/r of the signal's variance is left; above 1.")
    speed_lambda: float = option(0.6, "Change-aware weights run from 1 - lambda to lambda; in [0.5, 1].")
    speed_draw: str = option("independent", "How a global batch is drawn.", choices=DRAWS)
    speed_normalize_weights: bool = option(False, "Scale the weights to mean 1 under the draws.")
    speed_anneal_start: float = option(1.0, "Share of the run after which k falls to 1; 1: never.")
    speed_anneal_end: float = option(1.0, "Share of the run at which k is 1.")
    class_dropout_prob: float = option(0.1, "Share of samples trained without their class, for guidance.")

    # Optimisation
    train_batch_size: int = option(32, "Images a device takes at once.", free=True)
    gradient_accumulation_steps: int = option(1, "Batches whose gradients make one optimizer step.", free=True)
    max_train_steps: int = option(400_000, "Optimizer steps of the run.")
    learning_rate: float = option(1e-4, "Learning rate after the warm-up.")
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Learning-rate schedule.",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_warmup_steps: int = option(0, "Optimizer steps over which the learning rate grows from 0.")
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment.")
    adam_beta2: float = option(0.999, "AdamW's decay of the second moment.")
    adam_weight_decay: float = option(0.0, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float | None = option(1.0, "Gradients are scaled down to this norm; None: never.")
    ema_decay: float | None = option(None, "Decay of the moving average; None: half-life of 5 % of the run.")
    mixed_precision: str | None = option(None, "None: as accelerate is configured.", choices=("no", "bf16"))
    allow_tf32: bool = option(True, "Let NVIDIA GPUs round float32 matrix products to TF32.")
    seed: int = option(0, "Seed of everything random.")

    # Samples during training, samples and score after it
    validation_steps: int | None = option(None, "Draw a grid of samples every so many steps; None: never.", free=True)
    validation_class_labels: list[str] = option([], "Its classes, names or ids; empty: the first 10.", free=True)
    num_validation_images: int = option(8, "Images a class in the grid.", free=True)
    guidance_scale: float = option(1.5, "Guidance of the grid; 1: none.", free=True)
    sampler: str | None = option(None, "Of grid and score; None: DDIM.", choices=SAMPLERS, free=True)
    num_inference_steps: int = option(50, "Solver steps of grid and score.", free=True)
    num_score_images: int | None = option(None, "Score the result with so many images; None: no score.", free=True)
    score_reference: str = option(
        EMBEDDED, "What they are held against: 'embedded', or a file of make_reference_statistics.py.", free=True
    )
    feature_extractor: str = option(
        FASHION_MNIST, "What they are seen with: fashion_mnist, or module:attribute as for evaluate.py.", free=True
    )

    # Output
    output_dir: str = option("runs/dit_speed", "Folder of the run.", free=True)
    overwrite_output_dir: bool = option(False, "Delete the run that the folder holds.", free=True)
    logging_steps: int = option(50, "Log every so many steps.", free=True)
    report_to: list[str] = option(["tensorboard"], "Trackers by name; empty: metrics.jsonl only.", free=True)
    tracker_project_name: str = option("speed_diffusers", "Project name in the trackers.", free=True)
    checkpointing_steps: int | None = option(5000, "Save the state every so many steps; None: at the end.", free=True)
    checkpoints_total_limit: int | None = option(None, "Keep the newest so many; None: all.", free=True)
    resume_from_checkpoint: str | None = option(None, "'latest' or the folder of a checkpoint.", free=True)
    allow_config_changes: bool = option(False, "Resume although options that matter have changed.", free=True)
    dry_run: bool = option(False, "Check everything, print the plan, write nothing.", free=True)
