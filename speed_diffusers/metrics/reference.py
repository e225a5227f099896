"""Reference files: mean, covariance and, for the metrics that need them, the features of real images."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..assets import EMBEDDED, EMBEDDED_REFERENCE
from ..errors import InputError
from ..files import file_sha256, save_tensors
from ..json_files import check_values
from .statistics import FeatureStatistics

HEADER_KEY = "feature_statistics"


@dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared with. References are equal if their hashes are; as objects they never are.

    Attributes:
        name: "embedded", or the name of the file.
        sha256: Hash of the file.
        statistics: Mean and covariance of the features, from their full precision.
        features: (M, D) float16 or float32, in the order of the images; None in a file made without them.
        resolution: Side of the images in pixels; None in a file that does not say.
    """

    name: str
    sha256: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    resolution: int | None = None


NO_REFERENCE = Reference("none", "", FeatureStatistics(torch.empty(0), torch.empty(0, 0), 0))
"""For scores whose metrics compare with nothing."""


def save_statistics(
    statistics: FeatureStatistics,
    path: str | Path,
    *,
    features: Tensor | None = None,
    resolution: int | None = None,
) -> None:
    """Writes a reference as safetensors: mean and covariance (float64), the features, and a header with the rest.

    Args:
        statistics: Mean and covariance, in full precision.
        path: File to write; an existing one is replaced.
        features: (M, D), the features behind them, stored in half precision unless they exceed its range. None leaves
            them out.
        resolution: Side of the images in pixels.

    Raises:
        InputError: There are not as many features as the statistics count.
    """
    tensors = {"mean": statistics.mean.contiguous(), "covariance": statistics.covariance.contiguous()}
    if features is not None:
        if features.shape != (statistics.count, len(statistics.mean)):
            raise InputError(
                f"features of shape {tuple(features.shape)}, but the statistics are of {statistics.count} images and "
                f"{len(statistics.mean)} features."
            )
        half = features.half()
        tensors["features"] = (half if bool(torch.isfinite(half).all()) else features.float()).contiguous()
    header: dict[str, object] = {"count": statistics.count, "extractor_sha256": statistics.extractor_sha256}
    if resolution is not None:
        header["resolution"] = resolution
    # one header entry: safetensors writes several in a random order, and the file's hash names the reference
    save_tensors(tensors, Path(path), {HEADER_KEY: json.dumps(header, sort_keys=True)})


def load_reference(name: str | Path = EMBEDDED) -> Reference:
    """A reference by name.

    Args:
        name: "embedded" (the 10,000 held-out Fashion-MNIST images), or a file of `make_reference_statistics.py`.

    Raises:
        InputError: If there is no such file or it holds no reference.
    """
    path = EMBEDDED_REFERENCE if name == EMBEDDED else Path(name)
    if not path.is_file():
        raise InputError(f"No reference statistics at '{path}'. Make them with make_reference_statistics.py.")
    wrong = InputError(f"'{path}' holds no reference statistics of make_reference_statistics.py.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "null"))
            if not isinstance(header, dict) or set(file.keys()) - {"features"} != {"mean", "covariance"}:
                raise wrong
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        missing = {"count", "extractor_sha256"} - header.keys()
    except (SafetensorError, ValueError, RecursionError) as error:
        raise wrong from error
    check_values(path, header, {"count": int, "extractor_sha256": str, "resolution": int | None})
    width, features = len(tensors["mean"].flatten()), tensors.get("features")
    fits = tensors["mean"].shape == (width,) and tensors["covariance"].shape == (width, width)
    if missing or not fits or (features is not None and features.shape != (header["count"], width)):
        raise wrong
    return Reference(
        name=EMBEDDED if name == EMBEDDED else path.name,
        sha256=file_sha256(path),
        statistics=FeatureStatistics(
            tensors["mean"], tensors["covariance"], int(header["count"]), str(header["extractor_sha256"])
        ),
        features=features,
        resolution=header.get("resolution"),
    )


def load_reference_statistics(path: str | Path | None = None) -> FeatureStatistics:
    """Mean and covariance of a reference file; None: the embedded one. Errors as in `load_reference`."""
    return load_reference(EMBEDDED if path is None else path).statistics
