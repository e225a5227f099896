"""What a training run of a DiT will cost, by formula: operations, GPU hours, memory of its state, size of its cache.

Nothing here is measured. Peaks and memory are those of the vendors' data sheets, and what share of a peak a training
reaches is an assumption of whoever asks.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.schema import Interval
from ..errors import unknown_name


@dataclass(frozen=True)
class GPU:
    """One model of GPU.

    Attributes:
        bf16_tflops: Peak of its matrix units in bf16, sums in float32, no sparsity, in 10^12 operations per second.
        tf32_tflops: The same in TF32; None where the vendor names none.
        memory_gb: Its memory as it is sold, in GB.
        device_name: Regular expression of the whole name that its driver gives it (`torch.cuda.get_device_name`).
        source: Where the peaks stand.
    """

    bf16_tflops: float
    tf32_tflops: float | None
    memory_gb: float
    device_name: str
    source: str


# Data sheets give Ada's, Hopper's and Blackwell's peaks with sparsity, which is twice what dense matrices get.
GPUS: dict[str, GPU] = {
    "A10": GPU(125.0, 62.5, 24, "NVIDIA A10", "NVIDIA A10 data sheet"),
    "A100": GPU(312.0, 156.0, 80, "NVIDIA A100(-SXM4-80GB| 80GB PCIe)", "NVIDIA A100 data sheet"),
    "A100-40GB": GPU(312.0, 156.0, 40, "NVIDIA A100-(SXM4|PCIE)-40GB", "NVIDIA A100 data sheet"),
    "B200": GPU(2250.0, 1125.0, 180, "NVIDIA B200", "NVIDIA DGX B200 data sheet, an eighth"),
    "H100": GPU(989.0, 494.5, 80, "NVIDIA H100 80GB HBM3", "NVIDIA H100 data sheet, SXM"),
    "H100-PCIe": GPU(756.0, 378.0, 80, "NVIDIA H100 PCIe", "NVIDIA H100 data sheet, PCIe"),
    "H200": GPU(989.0, 494.5, 141, "NVIDIA H200", "NVIDIA H200 data sheet, SXM"),
    "L4": GPU(121.0, 60.0, 24, "NVIDIA L4", "NVIDIA L4 data sheet"),
    "L40S": GPU(362.0, 183.0, 48, "NVIDIA L40S", "NVIDIA L40S data sheet"),
    "MI300X": GPU(1307.0, 653.7, 192, "AMD Instinct MI300X.*", "AMD Instinct MI300X data sheet"),
    "RTX3090": GPU(71.0, 35.6, 24, "NVIDIA GeForce RTX 3090", "NVIDIA Ampere GA102 white paper"),
    "RTX4090": GPU(165.0, 82.6, 24, "NVIDIA GeForce RTX 4090", "NVIDIA Ada white paper"),
    "RTX5090": GPU(209.0, 104.8, 32, "NVIDIA GeForce RTX 5090", "NVIDIA RTX Blackwell white paper"),
    "RTXA6000": GPU(155.0, 77.4, 48, "NVIDIA RTX A6000", "NVIDIA Ampere GA102 white paper"),
}
"""GPUs by name, with the peaks of the vendors' data sheets; case does not matter to `gpu_named`."""

MOMENTS = "AdamW's moments"
BYTES_A_PARAMETER = {"weights": 4, "gradients": 4, MOMENTS: 8, "EMA weights": 4}
"""Of the training script's state, which is float32 throughout; bf16 is autocast's and never kept."""

BYTES_OF_TRACK = 4
"""Of a power-function average (`ema_tracks`)."""

BYTES_OF_MUON = 4
"""Of its momentum, which a matrix has instead of AdamW's moments."""

BYTES_A_MOMENT = 2
"""The cache holds mean and log-variance of every latent value in float16."""

RECOMPUTED = 4 / 3
"""Gradient checkpointing runs the forward pass twice: 8 operations per multiply-accumulate instead of 6."""


def gpu_named(name: str) -> GPU:
    """A GPU by name, whatever its case.

    Raises:
        InputError: It is not in the table; the message gives the nearest name.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise unknown_name("gpu", name.upper(), GPUS)
    return found


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU whose driver gives it this name; None for one that is not in the table, or not for sure."""
    matching = (gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_name, device_name))
    return next(matching, None)


def model_flops_utilization(
    config: Mapping[str, Any], images_per_second: float, gpu: GPU, *, precision: str = "bf16"
) -> float | None:
    """MFU: the model's operations per second over the peak of one GPU (PaLM, arXiv 2204.02311, appendix B).

    Args:
        config: As in `forward_macs`.
        images_per_second: Of one GPU.
        gpu: The GPU.
        precision: "bf16" or "tf32": of the matrix products, whose peak is meant.

    Returns:
        A share of the peak; None where the table has no peak.

    Raises:
        InputError: Another precision.
    """
    peaks = {"bf16": gpu.bf16_tflops, "tf32": gpu.tf32_tflops}
    if precision not in peaks:
        raise unknown_name("precision", precision, peaks)
    peak = peaks[precision]
    return None if peak is None else training_flops(config) * images_per_second / (peak * 1e12)


def forward_macs(config: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one forward pass for one image; what DiT's paper calls its Gflops.

    Counted from the architecture (Peebles and Xie, arXiv 2212.09748, section 3.2): matrix products alone. Norms,
    activations and sums are left out, as is usual.

    Args:
        config: As `dit_config` makes it, or the config of a `DiTTransformer2DModel`.
    """
    patch = config["patch_size"]
    tokens = (config["sample_size"] // patch) ** 2
    width = _width(config)
    # Query, key, value and output are 4 d^2 per token, the feed-forward of ratio 4 is 8 d^2; adaLN is 6 d^2 per image.
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    embedder = 256 * width + width**2
    patches_in = tokens * patch**2 * config["in_channels"] * width
    patches_out = tokens * patch**2 * config["out_channels"] * width
    head = 2 * width**2
    return int(config["num_layers"] * block + embedder + patches_in + patches_out + head)


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def training_flops(config: Mapping[str, Any]) -> int:
    """Floating-point operations of forward and backward pass for one image: 6 per multiply-accumulate.

    Two for the product and the sum, and the backward pass costs twice the forward pass. What gradient checkpointing
    computes again does not count: it is no part of the model.

    Args:
        config: As in `forward_macs`.
    """
    return 6 * forward_macs(config)


@dataclass(frozen=True)
class TrainingCost:
    """A run by its numbers, from which all costs follow.

    Attributes:
        config: Config of the transformer, as `dit_config` makes it.
        num_parameters: Of the model in training form.
        global_batch: Images of an optimizer step, on all devices.
        max_train_steps: Optimizer steps of the run.
        num_images: Images of the data; None: not known.
        random_flip: The cache holds the flipped images too.
        gradient_checkpointing: Share of the blocks whose activations are computed twice, in [0, 1].
        muon_ns_steps: Newton-Schulz steps of Muon; None: AdamW takes all parameters.
        ema_tracks: How many power-function averages are kept beside the EMA weights.
    """

    config: Mapping[str, Any]
    num_parameters: int
    global_batch: int
    max_train_steps: int
    num_images: int | None = None
    random_flip: bool = False
    gradient_checkpointing: float = 0.0
    muon_ns_steps: int | None = None
    ema_tracks: int = 0

    @property
    def image_flops(self) -> float:
        """Operations of forward and backward pass for an image, recomputed activations included."""
        return training_flops(self.config) * (1.0 + (RECOMPUTED - 1.0) * self.gradient_checkpointing)

    @property
    def muon_flops(self) -> float:
        """Operations by which Muon orthogonalises in an optimizer step, on all devices, which share them.

        A Newton-Schulz step multiplies an a x b matrix, a <= b, by its transpose, the square of that by itself and the
        sum of both by the matrix: 2 (2 a^2 b + a^3). A block has four d x d and two d x 4d matrices. In float32 on a
        CPU it takes a quarter less (`training.optimizer`).
        """
        return float(60 * _width(self.config) ** 3 * self.config["num_layers"] * (self.muon_ns_steps or 0))

    @property
    def step_flops(self) -> float:
        """Operations of an optimizer step on all devices."""
        return self.image_flops * self.global_batch + self.muon_flops

    @property
    def run_flops(self) -> float:
        """Operations of the whole run."""
        return self.step_flops * self.max_train_steps

    def gpu_hours(self, gpu: GPU, utilization: float) -> float:
        """Hours of one GPU for the whole run; divided by the number of GPUs it is the time on the clock.

        Args:
            gpu: The GPU.
            utilization: Share of its bf16 peak that training reaches, in (0, 1].

        Raises:
            InputError: The share is outside (0, 1].
        """
        Interval("(0, 1]").require("mfu", utilization)
        return self.run_flops / (gpu.bf16_tflops * 1e12 * utilization) / 3600

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients, optimizer state and averages, on every device that holds all of them."""
        under_muon = 0 if self.muon_ns_steps is None else 12 * _width(self.config) ** 2 * self.config["num_layers"]
        saved = under_muon * (BYTES_A_PARAMETER[MOMENTS] - BYTES_OF_MUON)
        return self.num_parameters * (sum(BYTES_A_PARAMETER.values()) + BYTES_OF_TRACK * self.ema_tracks) - saved

    @property
    def latent_bytes(self) -> int:
        """Bytes of the cached latents of an image, with those of its flipped image if there are any."""
        shape = (2, self.config["in_channels"], self.config["sample_size"], self.config["sample_size"])
        return math.prod(shape) * BYTES_A_MOMENT * (2 if self.random_flip else 1)

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the cached latents of all images; None where their number is not known."""
        return None if self.num_images is None else self.num_images * self.latent_bytes
