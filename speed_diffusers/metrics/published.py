"""Feature extractors of the literature by name, with weights from a file, a folder or a Hub id."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.schema import option
from ..files import tensors_sha256
from .clip import CLIP, CLIP_MODEL, load_clip
from .dinov2 import DINOV2, DINOV2_MODEL, load_dinov2
from .extractors import EXTRACTORS, Extraction, FeatureExtractor
from .inception import INCEPTION, INCEPTION_CLEAN, INCEPTION_SPATIAL, load_inception

_INCEPTION_SOURCE = "torch-fidelity's conversion of TensorFlow's Inception of 2015-12-05 (Apache-2.0)"


def inception_option() -> Any:
    """The option that says where Inception's weights are."""
    return option(None, "torch-fidelity's weights-inception-2015-12-05-*.pth; None: its download.", path=True)


def dinov2_option() -> Any:
    """The option that says where DINOv2 is."""
    return option(DINOV2_MODEL, "DINOv2, for fd_dinov2: folder or Hub id.", path=True)


def clip_option() -> Any:
    """The option that says where CLIP is."""
    return option(CLIP_MODEL, "CLIP, for cmmd and clip_score: folder or Hub id.", path=True)


@dataclass(frozen=True)
class ExtractorFiles:
    """Where the weights of published extractors are."""

    inception_weights: str | None = inception_option()
    dinov2_model: str = dinov2_option()
    clip_model: str = clip_option()

    def weights_of(self, extractor: str) -> str | None:
        """Where an extractor's weights are; None where it needs none to be named."""
        if extractor in (INCEPTION, INCEPTION_SPATIAL, INCEPTION_CLEAN):
            return self.inception_weights
        return {DINOV2: self.dinov2_model, CLIP: self.clip_model}.get(extractor)


def _published(name: str, function: Extraction, network: nn.Module, device: torch.device) -> FeatureExtractor:
    # The name is hashed too: the same weights behind another resizing are another extractor.
    sha256 = tensors_sha256(network.state_dict(), header=name.encode())
    # No classes: whose logits are whose is not asked of published networks.
    return FeatureExtractor(name, sha256, function, (), device, published=True)


@EXTRACTORS.register(
    INCEPTION,
    summary="Inception v3 of FID: 2,048 features, 1,008 logits; resized to 299x299 as TensorFlow 1 does.",
    reference=_INCEPTION_SOURCE,
)
def inception(device: torch.device, weights: str | None = None) -> FeatureExtractor:
    """Features of FID, KID and Inception Score."""
    network = load_inception(weights, device)
    return _published(INCEPTION, network.pooled, network.network, device)


@EXTRACTORS.register(
    INCEPTION_SPATIAL,
    summary="The same network's first seven channels of a 17x17 map: 2,023 features.",
    reference="Nash et al., [arXiv 2103.03841](https://arxiv.org/abs/2103.03841), as in ADM's evaluator",
)
def inception_spatial(device: torch.device, weights: str | None = None) -> FeatureExtractor:
    """Features of sFID."""
    network = load_inception(weights, device)
    return _published(INCEPTION_SPATIAL, network.spatial, network.network, device)


@EXTRACTORS.register(
    INCEPTION_CLEAN,
    summary="The same network behind clean-fid's resizing.",
    reference="Parmar et al., [arXiv 2104.11222](https://arxiv.org/abs/2104.11222)",
)
def inception_clean(device: torch.device, weights: str | None = None) -> FeatureExtractor:
    """Features of clean FID."""
    network = load_inception(weights, device)
    return _published(INCEPTION_CLEAN, network.clean, network.network, device)


@EXTRACTORS.register(
    DINOV2,
    summary="DINOv2's class token, by transformers; resized to 224x224 as EDM2 does.",
    reference="Stein et al., [arXiv 2306.04675](https://arxiv.org/abs/2306.04675)",
)
def dinov2(device: torch.device, weights: str | None = None) -> FeatureExtractor:
    """Features of FD-DINOv2."""
    network = load_dinov2(weights or DINOV2_MODEL, device)
    return _published(DINOV2, network, network, device)


@EXTRACTORS.register(
    CLIP,
    summary="CLIP's embeddings of length 1, by transformers; resized as CMMD's authors do.",
    reference="Jayasumana et al., [arXiv 2401.09603](https://arxiv.org/abs/2401.09603)",
)
def clip(device: torch.device, weights: str | None = None) -> FeatureExtractor:
    """Features of CMMD and CLIP score."""
    network = load_clip(weights or CLIP_MODEL, device)
    made = _published(CLIP, network, network, device)
    return FeatureExtractor(made.name, made.sha256, network, (), device, published=True, texts=network.texts)
