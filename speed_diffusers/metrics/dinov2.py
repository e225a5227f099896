"""DINOv2's features, for FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675)."""

from typing import Any

import torch
from torch import Tensor, nn

from .pixels import normalized, resized_bicubic, to_uint8
from .transformers_models import load_transformers_model

DINOV2 = "dinov2"
DINOV2_MODEL = "facebook/dinov2-large"
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, with which it was trained."""


class Dinov2(nn.Module):
    """The class token after the last normalisation, (N, width), of images (N, 3, H, W) in [0, 1].

    Images are resized to 224x224 as EDM2's evaluation does, by the antialiased bicubic filter on eight-bit images.
    transformers fits the position embedding to that size by the target's size where the authors' code goes by a scale
    factor with an offset of 0.1, so features differ from theirs in the third digit: compare with references made here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, width)."""
        pixels = normalized(resized_bicubic(to_uint8(images), SIZE), MEAN, STD)
        output: Any = self.model(pixel_values=pixels)
        token: Tensor = output.last_hidden_state[:, 0]
        return token


def load_dinov2(model: str, device: torch.device) -> Dinov2:
    """The network from a folder or Hub id; errors as in `load_transformers_model`."""
    return Dinov2(load_transformers_model("Dinov2Model", "dinov2_model", model, device))
