"""Inception v3 as FID knows it: TensorFlow's network of 2015-12-05, in torch-fidelity's conversion.

Three protocols share the network. `inception` resizes as the TensorFlow graph does, inside the network; published FID,
KID, Inception Score and ADM's and DiT's figures are of this kind. `inception_clean` resizes as clean-fid does (Parmar
et al. 2022, arXiv:2104.11222). `inception_spatial` has the features of sFID (Nash et al. 2021, arXiv:2103.03841), as
ADM's evaluator takes them.
"""

import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from .pixels import to_uint8

INCEPTION, INCEPTION_SPATIAL, INCEPTION_CLEAN = "inception", "inception_spatial", "inception_clean"
FEATURES, SPATIAL_FEATURES = 2048, 2023
SPATIAL_CHANNELS = 7
"""Of the 192 of the layer; 7 x 17 x 17 = 2,023 features, about as many as the pooled ones."""

TRUNK = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)
"""torch-fidelity's modules between resizing and features, in order."""


class Inception:
    """The three kinds of features of one network. Images are (N, 3, H, W), floating point, in [0, 1].

    Args:
        network: torch-fidelity's `FeatureExtractorInceptionV3` for "2048" and "logits_unbiased".
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._trunk = nn.Sequential(*(getattr(network, name) for name in TRUNK), nn.Flatten())
        self._map = torch.empty(0)
        self._images: Any = lambda: None
        self._result: tuple[Tensor, Tensor, Tensor] | None = None
        # TensorFlow's mixed_6/conv is the first branch of the third block of 17x17 maps, after its activation.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_map)  # type: ignore[union-attr]

    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 2048) and logits without bias (N, 1008), resized to 299x299 as TensorFlow 1 does."""
        features, logits, _ = self._run(images)
        return features, logits

    def spatial(self, images: Tensor) -> Tensor:
        """Features (N, 2023): rows, columns and the first seven channels of a 17x17 map, in ADM's order."""
        return self._run(images)[2]

    def clean(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 2048) and logits without bias (N, 1008), resized by clean-fid's own function."""
        from cleanfid.resize import build_resizer

        resize = build_resizer("clean")
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
        resized = torch.from_numpy(np.stack([resize(image) for image in pixels])).permute(0, 3, 1, 2)
        features: Tensor = self._trunk((resized.to(images.device) - 128) / 128)
        return features, features @ self.network.fc.weight.T  # type: ignore[union-attr, operator]

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Two extractors that are asked for the same batch in turn share one pass.
        if self._result is None or self._images() is not images:
            features, logits = self.network(to_uint8(images))
            self._result = features, logits, self._map.permute(0, 2, 3, 1).flatten(1)
            self._images = weakref.ref(images)
        return self._result

    def _keep_map(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._map = output[:, :SPATIAL_CHANNELS]


@lru_cache(maxsize=1)
def load_inception(weights: str | None, device: torch.device) -> Inception:
    """The network in evaluation mode.

    Args:
        weights: torch-fidelity's file of weights; None: the one that torch-fidelity downloads, once.
        device: Where it goes.

    Raises:
        InputError: torch-fidelity or clean-fid is not installed, the file is missing or holds something else, or there
            is no network to download it.
    """
    try:
        import cleanfid.resize  # noqa: F401
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise InputError(
            f"feature_extractor={INCEPTION}: {(error.name or '').partition('.')[0]} is not installed; "
            "run: pip install 'speed-diffusers[eval]'"
        ) from error
    if weights is not None:
        _check_weights(weights)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    except (URLError, OSError) as error:
        raise InputError(
            f"inception_weights=None: torch-fidelity could not download them ({error}); fetch {URL_INCEPTION_V3} "
            "elsewhere and give inception_weights=FILE."
        ) from error
    except RuntimeError as error:  # load_state_dict
        raise InputError(
            f"inception_weights={weights}: not torch-fidelity's Inception ({URL_INCEPTION_V3.rpartition('/')[2]}); "
            "its tensors have other names or shapes."
        ) from error
    return Inception(network.to(device))


def _check_weights(weights: str) -> None:
    """Checks that a file holds tensors and nothing else: torch-fidelity unpickles whatever it is given."""
    if not Path(weights).is_file():
        raise InputError(f"inception_weights={weights}: there is no such file.")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or a pickle raises nearly anything
        raise InputError(
            f"inception_weights={weights}: cannot be read as weights ({type(error).__name__})."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"inception_weights={weights}: holds something else than named tensors.")
