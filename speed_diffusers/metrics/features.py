"""A small image classifier whose penultimate features measure how close generated images are to real ones."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..assets import EMBEDDED_CLASSIFIER
from ..errors import InputError
from ..files import save_tensors

FEATURE_DIM = 64
_MAP_SIZE = 4  # height and width of the last feature map; at 32x32 input the pooling to it is the identity
_WIDTHS = (32, 48, 64, 64)


class SmallClassifier(nn.Module):
    """Four convolutions, a 64-dimensional embedding of the whole 4x4 map, one linear head.

    The embedding sees where a part of the object is, not only that it is there (no global average pooling), and is
    batch-normalised without an activation, so that over real images each feature has about zero mean and unit
    variance and is closer to Gaussian than rectified features would be: that is what a Fréchet distance assumes.

    Args:
        num_classes: Number of classes of the head, at least 2.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"num_classes={num_classes}, but a classifier needs at least 2 classes.")
        self.num_classes = num_classes
        self.trunk = nn.Sequential(
            _convolution(1, _WIDTHS[0], stride=2),  # (N, 32, H/2, W/2)
            _convolution(_WIDTHS[0], _WIDTHS[1], stride=1),  # (N, 48, H/2, W/2)
            _convolution(_WIDTHS[1], _WIDTHS[2], stride=2),  # (N, 64, H/4, W/4)
            _convolution(_WIDTHS[2], _WIDTHS[3], stride=2),  # (N, 64, H/8, W/8)
            nn.AdaptiveAvgPool2d(_MAP_SIZE),  # (N, 64, 4, 4)
            nn.Flatten(),  # (N, 1024)
        )
        self.embedding = nn.Sequential(
            nn.Linear(_WIDTHS[3] * _MAP_SIZE**2, FEATURE_DIM, bias=False), nn.BatchNorm1d(FEATURE_DIM)
        )
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features.

        Args:
            images: (N, 3, H, W), floating point, in [0, 1]; H and W at least 8. Trained at 32x32. The channels are
                averaged, so colour is not seen.

        Returns:
            (N, 64) in the dtype of the weights, about zero mean and unit variance over the training images.

        Raises:
            InputError: If the images have another number of dimensions or channels, or are not floating point.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(
                f"images of shape {tuple(images.shape)} and {images.dtype}, expected (N, 3, H, W) floating point."
            )
        grey = images.mean(dim=1, keepdim=True)  # (N, 1, H, W)
        embedded: torch.Tensor = self.embedding(self.trunk(grey * 2 - 1))
        return embedded

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (N, 64) and class logits (N, num_classes), in one pass, for images as `features` takes them."""
        features = self.features(images)
        return features, self.head(nn.functional.silu(features))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (N, num_classes) for images as `features` takes them."""
        return self.features_and_logits(images)[1]


def _convolution(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


def save_classifier(classifier: SmallClassifier, path: Path) -> None:
    """Writes the weights in half precision as safetensors; equal weights give equal bytes.

    Args:
        classifier: The trained classifier.
        path: File to write; an existing one is replaced.
    """
    state = classifier.state_dict().items()
    save_tensors({name: value.half() if value.is_floating_point() else value for name, value in state}, path)


def load_classifier(path: str | Path | None = None, *, device: str | torch.device = "cpu") -> SmallClassifier:
    """The classifier in float32, frozen and in evaluation mode.

    Args:
        path: File written by `train_scripts/assets/train_classifier.py`. None: the embedded one (32x32).
        device: Where the weights go.

    Raises:
        InputError: If there is no such file or it does not hold this classifier.
    """
    path = EMBEDDED_CLASSIFIER if path is None else Path(path)
    if not path.is_file():
        raise InputError(f"No classifier at '{path}'. Make one with train_scripts/assets/train_classifier.py.")
    try:
        state = load_file(path)
        classifier = SmallClassifier(num_classes=state["head.bias"].shape[0])
        classifier.load_state_dict(state)
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:  # cut short, or other tensors
        raise InputError(f"'{path}' holds no classifier of train_scripts/assets/train_classifier.py.") from error
    return classifier.float().eval().requires_grad_(False).to(device)
