"""Our FID, KID, Inception Score, precision and recall beside torch-fidelity's and torchmetrics' on the same images.

    OMP_NUM_THREADS=1 python benchmarks/score_libraries.py
    OMP_NUM_THREADS=1 python benchmarks/score_libraries.py inception_weights=weights-inception-2015-12-05-6726825d.pth

Needs the extra `eval`. Images of the embedded checkpoint are compared with embedded training images twice: in
EfficientNet-Lite0's features with its ImageNet weights, and in Inception's, whose weights no package index has.
Without inception_weights they are random, and the numbers say that two computations agree and nothing of the images.
Each library is given the images in eight bits and does all else by itself. Results: score_libraries/result.json, from
which docs/make_tables.py makes the table of docs/scoring.md.
"""

import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from measurement import environment
from speed_diffusers.assets import EMBEDDED
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.data import ImageDataset, open_images
from speed_diffusers.generation import GenerationSettings, generate, load_pipeline
from speed_diffusers.metrics import (
    FeatureExtractor,
    MetricSettings,
    Reference,
    Samples,
    frechet_distance,
    kernel_distance,
    load_extractor,
    precision_recall,
    statistics_of,
)
from speed_diffusers.metrics.inception_score import inception_score_of
from speed_diffusers.metrics.kid import kid
from speed_diffusers.metrics.pixels import to_uint8

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "score_libraries"


@dataclass
class BenchmarkConfig(Options):
    """Options of this benchmark."""

    num_images: int = option(500, "Images of each set in EfficientNet-Lite0's features.", interval="[20, 9000]")
    num_inception_images: int = option(50, "Images of each set in Inception's.", interval="[20, 9000]")
    kid_subset_size: int = option(40, "Images in each of KID's subsets.", interval="[2, 9000]")
    inception_weights: str | None = option(None, "torch-fidelity's file; None: random weights.", path=True)
    write: bool = option(True, "Write the results beside this file.")


class Pixels(Dataset[Tensor]):
    """Images (N, 3, H, W) in [0, 1] in eight bits, as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.pixels = to_uint8(images)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def write_random_inception(path: Path) -> Path:
    """torch-fidelity's Inception at its real size with random weights, in torch-fidelity's format.

    They keep the spread of activations from layer to layer (He et al. 2015), or all features would be 0.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as module

    state: dict[str, Any] = {}

    class Untrained(module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, loaded: Any, *args: Any, **options: Any) -> Any:
            torch.manual_seed(0)
            for part in self.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                if isinstance(part, nn.BatchNorm2d):
                    nn.init.uniform_(part.bias, -0.2, 0.2)
            state.update(self.state_dict())

    load, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *args, **options: {}
    try:
        Untrained("inception-v3-compat", ["2048"])
    finally:
        module.load_state_dict_from_url = load
    torch.save(state, path)
    return path


class EffLite0Bytes(nn.Module):
    """EfficientNet-Lite0 as torchmetrics takes feature modules: eight-bit images to features, or to logits."""

    seen: tuple[Tensor, Tensor] | None = None
    """The last batch of any instance, by which three metrics share a pass, and its features."""

    def __init__(self, extractor: FeatureExtractor, *, logits: bool = False) -> None:
        super().__init__()
        self.network = extractor.function
        self.logits = logits
        self.num_features = 1000 if logits else 1280

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 1280) or (N, 1000) of images (N, 3, H, W) in uint8."""
        if EffLite0Bytes.seen is None or EffLite0Bytes.seen[0] is not pixels:
            EffLite0Bytes.seen = pixels, self.network(pixels.float() / 255)
        features = EffLite0Bytes.seen[1]
        return self.network.network._fc(features) if self.logits else features


def register_efflite0() -> str:
    """EfficientNet-Lite0 under a name of torch-fidelity's registry."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    extractor = load_extractor("efflite0")

    class Registered(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list)
            self.bytes = EffLite0Bytes(extractor)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            features = self.bytes(pixels)
            found = {"features": features, "logits": self.bytes.network.network._fc(features)}
            return tuple(found[name] for name in self.features_list)

    register_feature_extractor("efflite0", Registered)
    return "efflite0"


def features_of(extractor: FeatureExtractor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of images (N, 3, H, W)."""
    made, logits = [], []
    for batch in tqdm(images.split(50), desc=f"Ours, {extractor.name}", unit="batch"):
        features, own = extractor(batch)
        made.append(features)
        logits.append(extractor.function.network._fc(features) if own is None else own)
    return torch.cat(made), torch.cat(logits)


def ours(extractor: FeatureExtractor, generated: Tensor, real: Tensor, subset_size: int) -> dict[str, float]:
    """All numbers by speed_diffusers."""
    (features, logits), (others, _) = features_of(extractor, generated), features_of(extractor, real)
    statistics, reference = statistics_of([features]), statistics_of([others])
    shares = precision_recall(features, others)
    samples = Samples(
        features,
        statistics,
        None,
        None,
        Reference("real", "", reference, others),
        logits=logits,
        settings=MetricSettings(subset_size, equal_counts=False),
    )
    score = inception_score_of(samples)["inception_score"]
    assert score is not None
    return {
        "fid": frechet_distance(statistics, reference),
        "kid": kid(features, others, subset_size)[0],
        "kernel_distance": kernel_distance(features, others),
        "inception_score": score,
        "precision": shares.precision,
        "recall": shares.recall,
    }


def torch_fidelitys(generated: Tensor, real: Tensor, subset_size: int, **options: Any) -> dict[str, float]:
    """The same by torch-fidelity: one call, and one more for KID over a single subset of all images."""
    from torch_fidelity import calculate_metrics

    with tempfile.TemporaryDirectory() as cache:
        shared = {
            "input1": Pixels(generated),
            "input2": Pixels(real),
            "cuda": False,
            "verbose": False,
            # Features are kept between the two calls.
            "cache_root": cache,
            "input1_cache_name": "generated",
            "input2_cache_name": "real",
            **options,
        }
        found = calculate_metrics(isc=True, fid=True, kid=True, prc=True, kid_subset_size=subset_size, **shared)
        whole = calculate_metrics(kid=True, kid_subsets=1, kid_subset_size=len(generated), **shared)
    return {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "kernel_distance": whole["kernel_inception_distance_mean"],
        "inception_score": found["inception_score_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }


def torchmetrics_own(
    generated: Tensor, real: Tensor, subset_size: int, modules: Mapping[str, nn.Module]
) -> dict[str, float]:
    """The same by torchmetrics, which draws subsets and splits otherwise and has no precision and recall."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    torch.manual_seed(0)
    fid = FrechetInceptionDistance(feature=modules["features"])
    subsets = KernelInceptionDistance(feature=modules["features"], subset_size=subset_size)
    score = InceptionScore(feature=modules["logits"])
    pairs = ((real, True), (generated, False))
    for images, is_real in pairs:
        for batch in tqdm(to_uint8(images).split(50), desc="torchmetrics", unit="batch"):
            fid.update(batch, real=is_real)
            subsets.update(batch, real=is_real)
            if not is_real:
                score.update(batch)
    whole = copy.deepcopy(subsets)  # with the features, so that no network runs again
    whole.subsets, whole.subset_size = 1, len(generated)
    found = {"fid": fid.compute(), "kid": subsets.compute()[0]}
    found |= {"kernel_distance": whole.compute()[0], "inception_score": score.compute()[0]}
    return {name: float(value) for name, value in found.items()}


def generated_images(count: int) -> Tensor:
    """Images of the embedded checkpoint, classes in turn, (count, 3, 32, 32) in [0, 1]."""
    pipeline = load_pipeline(EMBEDDED)
    pipeline.set_progress_bar_config(disable=True)
    settings = GenerationSettings(batch_size=100, num_inference_steps=20)
    batches = generate(pipeline, [index % 10 for index in range(count)], settings)
    made = [torch.from_numpy(batch) for batch in tqdm(batches, desc="Generating", total=-(-count // 100))]
    return torch.cat(made).permute(0, 3, 1, 2).contiguous()


def real_images(count: int, cache_dir: str) -> Tensor:
    """The first embedded training images, (count, 3, 32, 32) in [0, 1]."""
    source = open_images(dataset_name=EMBEDDED, cache_dir=cache_dir)
    return ImageDataset(source, resolution=32).__getitems__(list(range(count)))["pixel_values"].float() / 255


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """All numbers, by features and then by who computed them."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    began, where = time.perf_counter(), environment()
    most = max(config.num_images, config.num_inception_images)
    generated = to_uint8(generated_images(most)).float() / 255  # the same pixels for all
    with tempfile.TemporaryDirectory() as folder:
        real = real_images(most, folder)
        weights = config.inception_weights or str(write_random_inception(Path(folder) / "inception.pth"))
        few, size = config.num_inception_images, config.kid_subset_size
        efflite0, inception = load_extractor("efflite0"), load_extractor("inception", weights=weights)
        one, other = generated[: config.num_images], real[: config.num_images]
        modules = {"features": EffLite0Bytes(efflite0), "logits": EffLite0Bytes(efflite0, logits=True)}
        found = {
            "efflite0": {
                "speed_diffusers": ours(efflite0, one, other, size),
                "torch-fidelity": torch_fidelitys(one, other, size, feature_extractor=register_efflite0()),
                "torchmetrics": torchmetrics_own(one, other, size, modules),
            }
        }
        one, other = generated[:few], real[:few]
        place = {"feature_extractor_weights_path": weights}
        # By default torchmetrics resizes with antialiasing, which no published figure does.
        layers = {
            name: NoTrainInceptionV3("inception-v3-compat", [layer], antialias=False, **place)
            for name, layer in (("features", "2048"), ("logits", "logits_unbiased"))
        }
        found["inception"] = {
            "speed_diffusers": ours(inception, one, other, size),
            "torch-fidelity": torch_fidelitys(one, other, size, feature_extractor="inception-v3-compat", **place),
            "torchmetrics": torchmetrics_own(one, other, size, layers),
        }
    return {
        "command": " ".join(["python benchmarks/score_libraries.py", *sys.argv[1:]]),
        **where,
        **{name: version(name) for name in ("torch-fidelity", "torchmetrics")},
        "images": {"efflite0": config.num_images, "inception": few},
        "kid_subset_size": size,
        "inception_weights": "random" if config.inception_weights is None else Path(weights).name,
        "seconds": round(time.perf_counter() - began, 1),
        "numbers": found,
    }


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    config = load_config(BenchmarkConfig, argv, HERE)
    torch.set_num_threads(1)
    np.random.seed(0)
    result = measure(config)
    text = json.dumps(result, indent=1)
    print(text)
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "result.json").write_text(text + "\n")


if __name__ == "__main__":
    run_script(main, __doc__, BenchmarkConfig)
