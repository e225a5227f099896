"""Feature extractors by name, from files and from modules of the user's; metrics without scipy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speed_diffusers.assets import EMBEDDED_CLASSIFIER
from speed_diffusers.errors import InputError
from speed_diffusers.files import file_sha256, tensors_sha256
from speed_diffusers.metrics import efficientnet_lite, load_classifier, load_extractor

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
import torch

class Extractor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 5)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.linear(images.mean(dim=(2, 3))))

def with_logits():
    extractor = Extractor()
    return lambda images: (extractor.eval()(images), images.mean(dim=(2, 3)))

def means():
    return lambda images: images.mean(dim=(2, 3))

def changed():
    extractor = Extractor()
    torch.nn.init.zeros_(extractor.linear.bias)
    return extractor

def not_callable():
    return 3

def fails():
    raise KeyError("weights")

SHAPES = {
    "maps": lambda images: images,
    "a number": lambda images: images.mean(),
    "text": lambda images: "features",
    "three": lambda images: (images.mean(dim=(2, 3)),) * 3,
    "one for all": lambda images: images.mean(dim=(2, 3))[:1],
    "not finite": lambda images: images.mean(dim=(2, 3)) / 0,
}

maps, number, text, three, one, infinite = (lambda made=made: made for made in SHAPES.values())
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_features.py"
    path.write_text(MODULE)
    return path


def test_the_shipped_one_is_the_shipped_classifier() -> None:
    extractor, classifier = load_extractor(), load_classifier()
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features, logits = extractor(images)
    assert torch.equal(features, classifier.features(images))
    assert logits is not None and torch.equal(logits, classifier(images))
    assert (extractor.name, extractor.sha256) == ("fashion_mnist", file_sha256(EMBEDDED_CLASSIFIER))
    assert extractor.classes is not None and extractor.classes[9] == "Ankle boot"
    same = load_extractor(str(EMBEDDED_CLASSIFIER))
    assert (same.name, same.sha256) == ("classifier.safetensors", extractor.sha256)


def test_a_module_of_a_file_is_put_into_evaluation_mode_and_known_by_its_weights(file: Path) -> None:
    extractor = load_extractor(f"{file}:Extractor")
    images = torch.rand(4, 3, 8, 8)
    features, logits = extractor(images)
    assert features.shape == (4, 5) and logits is None and not features.requires_grad
    assert torch.equal(features, extractor(images)[0]), "dropout is off"
    assert extractor.name == "my_features.py:Extractor"
    again, changed = load_extractor(f"{file}:Extractor"), load_extractor(f"{file}:changed")
    assert extractor.sha256 == again.sha256 != changed.sha256
    # The weights are its identity, wherever the file lies and whatever else is in it.
    file.write_text(MODULE + "\n# a remark\n")
    assert load_extractor(f"{file}:Extractor").sha256 == extractor.sha256


def test_a_function_is_known_by_its_source(file: Path) -> None:
    extractor = load_extractor(f"{file}:means")
    assert extractor.sha256 == file_sha256(file)
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(extractor(images)[0], images.mean(dim=(2, 3)))
    features, logits = load_extractor(f"{file}:with_logits")(images)
    assert features.shape == (4, 5) and logits is not None and logits.shape == (4, 3)


def test_an_importable_module_is_named_with_dots(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    assert load_extractor("my_features:Extractor").sha256 == load_extractor(f"{file}:Extractor").sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnst", "Unknown feature_extractor 'fashion_mnst'. Did you mean 'fashion_mnist'.*module:attribute"),
        ("nowhere.safetensors", "No classifier at 'nowhere.safetensors'"),
        ("nowhere/features.py:Extractor", "feature_extractor=nowhere/features.py:Extractor: there is no file"),
        ("no_such_module:Extractor", "No module named 'no_such_module'. A file is named path/to/file.py"),
        ("{file}:Extracter", "Unknown attribute of .*my_features.py.*'Extracter'. Did you mean 'Extractor'"),
        ("{file}:not_callable", "returned int, expected a torch module or a function"),
        ("{file}:fails", "calling it failed: KeyError: 'weights'"),
        ("{broken}:Extractor", "importing it failed: SyntaxError"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(name: str, message: str, file: Path) -> None:
    broken = file.with_name("broken.py")
    broken.write_text("def (")
    with pytest.raises(InputError, match=message) as error:
        load_extractor(name.format(file=file, broken=broken))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("maps", r"made \(2, 3, 8, 8\) of 2 images; expected features \(2, D\), or a pair"),
        ("number", r"made \(\) of 2 images"),
        ("text", "made str of 2 images"),
        ("three", "made 3 tensors; expected one or a pair"),
        ("one", r"made \(1, 3\) of 2 images"),
        ("infinite", "NaN or infinite"),
    ],
)
def test_features_of_another_shape_are_refused(attribute: str, message: str, file: Path) -> None:
    extractor = load_extractor(f"{file}:{attribute}")
    with pytest.raises(InputError, match=message):
        extractor(torch.rand(2, 3, 8, 8))


def test_the_hash_of_a_state_sees_names_types_shapes_and_values_only() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    base = tensors_sha256(state)
    assert (
        base
        == tensors_sha256(dict(reversed(state.items())))
        == tensors_sha256({**state, "a": state["a"].T.contiguous().T})
    )
    others = [
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"] + 1},
        {**state, "a": state["a"].view(torch.int32)},
        {"c": state["a"], "b": state["b"]},
    ]
    assert len({base, *map(tensors_sha256, others)}) == 5


WITHOUT_SCIPY = """
import sys

for name in ("scipy", "cleanfid", "sklearn", "torch_fidelity", "torchmetrics", "transformers"):
    sys.modules[name] = None  # raises on import

import torch
from speed_diffusers.metrics import METRICS, Samples, general_metrics, load_reference, statistics_of

reference = load_reference()
features = reference.features[:50].float() + 0.5
samples = Samples(features, statistics_of([features]), torch.zeros(50), torch.zeros(50), reference)
values = {}
for name in general_metrics():
    values |= METRICS[name].function(samples)
import speed_diffusers.metrics.score
print(*values)
"""


def test_metrics_work_without_scipy_and_clean_fid() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_SCIPY], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["class_agreement", "frechet_distance", "kernel_distance", "precision", "recall"]


def test_efflite0_is_the_packages_network_and_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load_extractor("efflite0")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features, logits = extractor(images)
    assert features.shape == (2, 1280) and logits is None and extractor.sha256.startswith("57934424")
    network = extractor.function.network  # type: ignore[union-attr]
    sheets = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    resized = np.stack([np.asarray(sheet.resize((224, 224), Image.Resampling.BICUBIC)) for sheet in sheets])
    pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(network._fc(features), network(pixels), rtol=0.05, atol=0.15)
    # A batch is divided, and the last part is smaller.
    more = torch.rand(efficientnet_lite.IMAGES_AT_A_TIME + 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([extractor(image[None])[0] for image in more])
    torch.testing.assert_close(extractor(more)[0], alone, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(efficientnet_lite, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(InputError, match="efficientnet-lite0-57934424.pth holds other weights"):
        load_extractor("efflite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match="not installed; run: pip install efficientnet-lite-pytorch"):
        load_extractor("efflite0")
