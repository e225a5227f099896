"""References in NumPy's npz, as the field hands them round: ADM's batches, and statistics of other FID tools.

ADM's files hold images (arr_0: N, H, W, 3 in uint8) and, of the whole training set, mean and covariance of Inception's
features (mu, sigma) and of its spatial ones (mu_s, sigma_s). Distances take the statistics, and metrics over pairs the
images, as ADM's evaluator does. pytorch-fid's and clean-fid's files hold mu and sigma alone.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import file_sha256
from .extractors import FeatureExtractor
from .inception import FEATURES, INCEPTION, INCEPTION_CLEAN, INCEPTION_SPATIAL, SPATIAL_FEATURES
from .reference import Reference
from .statistics import FeatureStatistics, statistics_of

IMAGES = "arr_0"
STATISTICS = {INCEPTION: ("mu", "sigma"), INCEPTION_SPATIAL: ("mu_s", "sigma_s"), INCEPTION_CLEAN: ("mu", "sigma")}
WIDTHS = {"mu": FEATURES, "mu_s": SPATIAL_FEATURES}


def is_npz(path: str | Path) -> bool:
    """Whether a reference is of this kind, by its name."""
    return str(path).endswith(".npz")


def load_npz_reference(
    path: str | Path, extractor: FeatureExtractor, *, needs_features: bool, batch_size: int = 50
) -> Reference:
    """A reference for one extractor from an npz file.

    Args:
        path: The file.
        extractor: Whose features are asked for. Statistics in the file serve Inception's three only; for any other the
            images are run through it. Files do not say how their images were resized: those with spatial statistics
            are ADM's and refused for clean-fid's resizing, and with mu and sigma alone the user must know.
        needs_features: Whether features of single images are needed too, not only mean and covariance.
        batch_size: Images run through the extractor at once.

    Raises:
        InputError: The file is missing or damaged, an array has another shape or type, or what is needed is not there.
    """
    path = Path(path)
    arrays = _read(path)
    mean, covariance = STATISTICS.get(extractor.name, ("", ""))
    if extractor.name == INCEPTION_CLEAN and "mu_s" in arrays:
        mean, covariance = "", ""
    statistics = None
    if mean in arrays:
        statistics = FeatureStatistics(_float64(arrays[mean]), _float64(arrays[covariance]), None)
    features = None
    if IMAGES in arrays and (needs_features or statistics is None):
        features = _features(arrays[IMAGES], extractor, batch_size)
        statistics = statistics or statistics_of([features], extractor_sha256=extractor.sha256)
    if statistics is None:
        raise InputError(
            f"reference={path}: holds {', '.join(arrays)}, neither images ({IMAGES}) nor statistics in features of "
            f"{extractor.name}; make a reference with make_reference_statistics.py feature_extractor={extractor.name}."
        )
    resolution = arrays[IMAGES].shape[1] if IMAGES in arrays else None
    return Reference(path.name, file_sha256(path), statistics, features, resolution)


def _read(path: Path) -> Mapping[str, Any]:
    """The arrays of the file that are known here, with their shapes and types checked."""
    if not path.is_file():
        raise InputError(f"reference={path}: there is no such file.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (IMAGES, *WIDTHS, "sigma", "sigma_s") if name in file.files}
            others = file.files
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"reference={path}: cannot be read as npz ({type(error).__name__}: {error}).") from error
    if not arrays:
        raise InputError(
            f"reference={path}: holds {', '.join(others) or 'nothing'}; expected {IMAGES}, or mu and sigma."
        )
    if IMAGES in arrays:
        images = arrays[IMAGES]
        if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2] or images.dtype != np.uint8:
            raise InputError(
                f"reference={path}: {IMAGES} is {images.shape} of {images.dtype}; expected (N, H, H, 3) of uint8."
            )
    for mean, width in WIDTHS.items():
        covariance = mean.replace("mu", "sigma")
        for name, shape in ((mean, (width,)), (covariance, (width, width))):
            found = arrays[name].shape if name in arrays else None
            if found != shape and (mean in arrays or covariance in arrays):
                raise InputError(f"reference={path}: {name} is {found or 'missing'}; expected {shape}.")
            if found is not None and not np.isfinite(arrays[name]).all():
                raise InputError(f"reference={path}: {name} holds NaN or infinite values.")
    return arrays


def _float64(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def _features(images: Any, extractor: FeatureExtractor, batch_size: int) -> Tensor:
    """Features of images (N, H, W, 3) in uint8, (N, D), under a progress bar."""
    made = []
    with tqdm(total=len(images), desc=f"Reference in features of {extractor.name}", unit="image") as progress:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
            made.append(extractor(batch)[0])
            progress.update(len(batch))
    return torch.cat(made)
