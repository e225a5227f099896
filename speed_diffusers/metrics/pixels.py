"""What published feature extractors ask of images: eight bits, one size, the mean and spread of their training."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def to_uint8(images: Tensor) -> Tensor:
    """Images as they would lie in a PNG file, since published figures are of saved images.

    Args:
        images: (N, 3, H, W), floating point, in [0, 1].

    Returns:
        (N, 3, H, W), uint8, rounded to the nearest.
    """
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def resized_bicubic(images: Tensor, size: int) -> Tensor:
    """Eight-bit images at another size by the antialiased bicubic filter, without rounding or clipping afterwards.

    Args:
        images: (N, 3, H, W), uint8.
        size: Height and width of the result.

    Returns:
        (N, 3, size, size), float32, about [0, 1]; the filter overshoots a little at edges.
    """
    return functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True) / 255


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (N, 3, H, W) less a mean, over a standard deviation, both by channel."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)
