"""Published scores: each extractor at random weights against its library's own call, each number against a library's.

Needs the extra `eval`; `.ci/run` installs it in a stage of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
torch_fidelity = pytest.importorskip("torch_fidelity")

from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # noqa: E402
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id  # noqa: E402

from published_extractors import write_clip, write_dinov2  # noqa: E402
from score_libraries import Pixels, write_random_inception  # noqa: E402
from speed_diffusers.errors import InputError  # noqa: E402
from speed_diffusers.metrics import (  # noqa: E402
    METRICS,
    MetricSettings,
    Reference,
    Samples,
    cmmd,
    frechet_distance,
    kernel_distance,
    load_extractor,
    load_npz_reference,
    precision_recall,
    statistics_of,
)
from speed_diffusers.metrics.clip_score import prompt_of  # noqa: E402
from speed_diffusers.metrics.inception import load_inception  # noqa: E402
from speed_diffusers.metrics.pixels import to_uint8  # noqa: E402


def images_of(count: int, side: int, seed: int) -> Tensor:
    """Smooth random images, (count, 3, side, side), in [0, 1]: noise alone looks the same to every network."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def normal(count: int, seed: int, dim: int = 32) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_inception(tmp_path_factory.mktemp("inception") / "weights-inception.pth"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("models") / "clip"))


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dinov2(tmp_path_factory.mktemp("models") / "dinov2"))


def test_inception_is_torch_fidelitys_own_call(inception_file: str) -> None:
    images = images_of(3, 40, 0)
    extractor = load_extractor("inception", weights=inception_file)
    features, logits = extractor(images)
    options = {"feature_extractor_weights_path": inception_file, "cuda": False, "verbose": False}
    network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    theirs = extract_featuresdict_from_input_id(1, network, input1=Pixels(images), **options)
    assert features.shape == (3, 2048) and float(features.std(0).mean()) > 1e-3, "or anything would be equal"
    torch.testing.assert_close(features, theirs["2048"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, theirs["logits_unbiased"], rtol=1e-4, atol=1e-5)

    # Spatial features: the block before by a hook, the branch by hand, in the order of TensorFlow's arrays.
    before: list[Tensor] = []
    network.Mixed_6c.register_forward_hook(lambda module, inputs, output: before.append(output))
    network(to_uint8(images))
    spatial, none = load_extractor("inception_spatial", weights=inception_file)(images)
    branch = network.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(nn.functional.conv2d(before[0], branch.conv.weight)))
    assert spatial.shape == (3, 2023) and none is None
    torch.testing.assert_close(spatial.reshape(3, 17, 17, 7)[:, 3, 8, 2], maps[:, 2, 3, 8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spatial.reshape(3, 17, 17, 7), maps[:, :7].permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_one_pass_serves_features_and_spatial_features(inception_file: str) -> None:
    network = load_inception(inception_file, torch.device("cpu"))
    passes: list[object] = []
    hook = network.network.Conv2d_1a_3x3.register_forward_hook(lambda module, inputs, output: passes.append(output))
    pooled, spatial = (load_extractor(name, weights=inception_file) for name in ("inception", "inception_spatial"))
    images, others = images_of(1, 32, 1), images_of(1, 32, 2)
    first = spatial(images)[0]
    pooled(images)
    assert len(passes) == 1
    assert not torch.equal(spatial(others)[0], first) and len(passes) == 2
    assert torch.equal(spatial(images)[0], first) and len(passes) == 3
    hook.remove()
    assert len({pooled.sha256, spatial.sha256, load_extractor("inception_clean", weights=inception_file).sha256}) == 3


def test_clean_inception_is_clean_fids_own_call(inception_file: str, tmp_path: Path) -> None:
    """clean-fid's loader, resizing and folder reader, on the same weights in the TorchScript form that it takes."""
    fid = pytest.importorskip("cleanfid.fid")
    from cleanfid.inception_torchscript import InceptionV3W

    class Scripted(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = torch.jit.trace(layers, torch.rand(1, 3, 299, 299), check_trace=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    trunk = load_inception(inception_file, torch.device("cpu"))._trunk
    torch.jit.script(Scripted(trunk)).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = InceptionV3W(str(tmp_path), download=False, resize_inside=False)
    images = images_of(2, 48, 3)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    theirs = fid.get_folder_features(
        str(folder), network, num_workers=0, batch_size=2, device=torch.device("cpu"), mode="clean", verbose=False
    )
    features, logits = load_extractor("inception_clean", weights=inception_file)(images)
    np.testing.assert_allclose(features.numpy(), theirs, rtol=1e-3, atol=1e-4)
    assert logits is not None and logits.shape == (2, 1008)
    plain, _ = load_extractor("inception", weights=inception_file)(images)
    assert np.abs(plain.numpy() - theirs).mean() > 30 * np.abs(features.numpy() - theirs).mean(), "another protocol"


def test_dinov2_is_transformers_own_call_on_images_resized_by_torchvision(dinov2_folder: str) -> None:
    from torchvision.transforms.v2 import functional as vision
    from transformers import Dinov2Model

    images = images_of(3, 300, 4)
    features, logits = load_extractor("dinov2", weights=dinov2_folder)(images)
    resized = vision.resize(
        to_uint8(images).float() / 255, [224, 224], vision.InterpolationMode.BICUBIC, antialias=True
    )
    pixels = vision.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixel_values=pixels).pooler_output
    assert features.shape == (3, 384) and logits is None and float(features.std(0).mean()) > 1e-3
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


class _Pooled:
    """A CLIPModel whose features are tensors, as torchmetrics 1.9 expects them; transformers 5 returns outputs."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> "_Pooled":
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        found = self.model.get_image_features(pixel_values=pixels)
        return found if isinstance(found, Tensor) else found.pooler_output

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.model.get_text_features(input_ids=ids, attention_mask=mask)
        return found if isinstance(found, Tensor) else found.pooler_output


@torch.no_grad()
def test_clip_is_transformers_own_call_and_its_score_torchmetrics(clip_folder: str) -> None:
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    extractor = load_extractor("clip", weights=clip_folder)
    assert extractor.texts is not None
    prompts = [prompt_of(name) for name in ("Sneaker", "tench, Tinca tinca", "T-shirt/top", "Bag")]
    assert prompts[1] == "a photo of a tench."
    texts = extractor.texts(prompts)
    for side, tolerance in ((56, 1e-5), (200, 2e-2)):  # of the model's own size, and resized without rounding
        images = images_of(4, side, 5)
        pixels = list(to_uint8(images))
        both = model(**processor(text=prompts, images=pixels, return_tensors="pt", padding=True))
        features, _ = extractor(images)
        torch.testing.assert_close(features, both.image_embeds, rtol=0, atol=tolerance)
        torch.testing.assert_close(texts, both.text_embeds, rtol=1e-4, atol=1e-5)
        samples = Samples(
            features, statistics_of([features]), None, None, Reference("", "", statistics_of([features])), texts=texts
        )
        theirs = float(clip_score(pixels, prompts, lambda: (_Pooled(model), processor)))
        ours = METRICS["clip_score"].function(samples)["clip_score"]
        assert ours == pytest.approx(theirs, abs=100 * tolerance) and theirs > 1


@pytest.mark.parametrize("count", [20, 400], ids=["fewer images than features", "more"])
def test_the_frechet_distance_is_torch_fidelitys(count: int) -> None:
    generated, real = normal(count, 0), 1.1 * normal(500, 1) + 0.2
    theirs = metric_fid.fid_statistics_to_metric(
        metric_fid.fid_features_to_statistics(generated), metric_fid.fid_features_to_statistics(real), False
    )["frechet_inception_distance"]
    assert frechet_distance(statistics_of([generated]), statistics_of([real])) == pytest.approx(theirs, rel=1e-3)


def test_kernel_distance_kid_and_precision_recall_are_torch_fidelitys() -> None:
    generated, real = 0.9 * normal(150, 2) + 0.1, normal(120, 3)
    whole = metric_kid.kid_features_to_metric(
        generated[:120].double(), real.double(), kid_subsets=1, kid_subset_size=120, verbose=False
    )["kernel_inception_distance_mean"]
    assert kernel_distance(generated[:120], real) == pytest.approx(whole, rel=1e-6)
    settings = MetricSettings(kid_subset_size=50, equal_counts=False)
    reference = Reference("real", "", statistics_of([real]), real)
    samples = Samples(generated, statistics_of([generated]), None, None, reference, settings=settings)
    theirs = metric_kid.kid_features_to_metric(generated, real, kid_subset_size=50, verbose=False)
    ours = METRICS["kid"].function(samples)
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)
    assert METRICS["clean_kid"].function(samples)["clean_kid"] == ours["kid"]
    # All images of both sides count.
    theirs = metric_prc.prc_features_to_metric(generated, real, verbose=False)
    found = METRICS["precision_recall"].function(samples)
    assert (found["precision"], found["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)
    assert precision_recall(generated[:120], real) != found and 0.1 < theirs["recall"] < 1


def test_inception_score_is_torch_fidelitys() -> None:
    logits = 3 * normal(100, 4)
    statistics = statistics_of([logits])
    samples = Samples(logits, statistics, None, None, Reference("", "", statistics), logits=logits)
    assert list(METRICS["inception_score"].function(samples).values()) == list(
        metric_isc.isc_features_to_metric(logits).values()
    )


@pytest.mark.parametrize("chunk", [7, 1000])
def test_cmmd_is_the_biased_sum_of_torch_fidelitys_kernels(chunk: int) -> None:
    generated = nn.functional.normalize(normal(90, 5), dim=1)
    real = nn.functional.normalize(normal(90, 6) + 0.5, dim=1)
    one, other = generated.double().numpy(), real.double().numpy()
    kernels = [
        metric_kid.kernel_rbf(x, y, kid_kernel_rbf_sigma=10) for x, y in ((one, one), (one, other), (other, other))
    ]
    theirs = 1000 * metric_kid.mmd2(*kernels, mmd_est="biased")
    assert cmmd(generated, real, chunk=chunk) == pytest.approx(theirs, rel=1e-6) and theirs > 0.1


class _Flat(nn.Module):
    """Twelve means of eight-bit images, in the form that torchmetrics takes any features in."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float() / 255, 16).flatten(1)


def test_distances_are_torchmetrics_with_any_feature_module() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = to_uint8(images_of(60, 32, 7)), to_uint8(0.9 * images_of(60, 32, 8))
    fid = FrechetInceptionDistance(feature=_Flat()).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=_Flat(), subsets=1, subset_size=60)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    ours, theirs = (_Flat()(each) for each in (generated, real))
    assert frechet_distance(statistics_of([ours]), statistics_of([theirs])) == pytest.approx(
        float(fid.compute()), rel=1e-3
    )
    assert kernel_distance(ours, theirs) == pytest.approx(float(kid.compute()[0]), rel=1e-3)


def test_adms_npz_gives_statistics_to_distances_and_images_to_pairs(inception_file: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    statistics = {
        "mu": rng.normal(size=2048),
        "sigma": np.eye(2048),
        "mu_s": rng.normal(size=2023),
        "sigma_s": np.eye(2023),
    }
    adm, plain = tmp_path / "VIRTUAL.npz", tmp_path / "plain.npz"
    np.savez(adm, arr_0=pixels, **statistics)
    np.savez(plain, mu=statistics["mu"], sigma=statistics["sigma"])
    pooled, spatial, clean = (
        load_extractor(name, weights=inception_file) for name in ("inception", "inception_spatial", "inception_clean")
    )
    for extractor, mean in ((pooled, "mu"), (spatial, "mu_s")):
        reference = load_npz_reference(adm, extractor, needs_features=False)
        assert np.array_equal(reference.statistics.mean.numpy(), statistics[mean])
        assert reference.statistics.count is None and reference.features is None and reference.resolution == 16
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    reference = load_npz_reference(adm, pooled, needs_features=True, batch_size=2)
    assert np.array_equal(reference.statistics.mean.numpy(), statistics["mu"])
    torch.testing.assert_close(reference.features, pooled(images)[0], rtol=1e-4, atol=1e-4)
    # ADM's statistics are not behind clean-fid's resizing; of others the user must know.
    reference = load_npz_reference(adm, clean, needs_features=False)
    torch.testing.assert_close(reference.statistics.mean.float(), clean(images)[0].mean(0), rtol=1e-3, atol=1e-4)
    assert np.array_equal(
        load_npz_reference(plain, clean, needs_features=False).statistics.mean.numpy(), statistics["mu"]
    )
    with pytest.raises(
        InputError, match=r"holds mu, sigma, neither images \(arr_0\) nor statistics in features of inception_s"
    ):
        load_npz_reference(plain, spatial, needs_features=False)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("extractor", "place", "message"),
    [
        ("inception", "nowhere.pth", "inception_weights=.*nowhere.pth: there is no such file"),
        ("inception", "cut.pth", "inception_weights=.*cut.pth: cannot be read as weights"),
        ("inception", "code.pth", "inception_weights=.*code.pth: cannot be read as weights"),
        ("inception", "list.pth", "holds something else than named tensors"),
        (
            "inception_clean",
            "other.pth",
            r"not torch-fidelity's Inception \(weights-inception-2015-12-05-6726825d.pth\)",
        ),
        ("inception", None, "torch-fidelity could not download them .*give inception_weights=FILE"),
        ("dinov2", "nowhere", "dinov2_model=.*nowhere: cannot be loaded"),
        ("dinov2", "clip", "dinov2_model=.*clip: is of type clip, expected dinov2"),
        ("dinov2", "cut", "dinov2_model=.*cut: cannot be loaded .*"),
        ("dinov2", "lacking", "lacks 1 of Dinov2Model's weights, such as layernorm.weight"),
    ],
)
def test_wrong_weights_are_one_line(
    extractor: str, place: str | None, message: str, clip_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file
    from torch_fidelity import feature_extractor_inceptionv3

    def offline(*args: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    for name in ("cut", "other"):
        torch.save({"weight": torch.zeros(1000)}, tmp_path / f"{name}.pth")
    damaged(tmp_path / "cut.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"weight": print}, tmp_path / "code.pth")
    (tmp_path / "clip").symlink_to(clip_folder)
    for name in ("cut", "lacking"):
        write_dinov2(tmp_path / name, small=True)
    damaged(tmp_path / "cut" / "model.safetensors")
    state = load_file(tmp_path / "lacking" / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    load_inception.cache_clear()
    with pytest.raises(InputError, match=message) as error:
        load_extractor(extractor, weights=None if place is None else str(tmp_path / place))
    assert "\n" not in str(error.value)


def test_all_of_them_in_one_command(
    inception_file: str,
    clip_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from speed_diffusers.generation.generate import generate_together
    from speed_diffusers.metrics.score_record import load_scores
    from speed_diffusers.train_scripts import evaluate

    monkeypatch.chdir(tmp_path)
    counts: list[int] = []

    def counting(pipeline: Any, rows: Sequence[int], *settings: Any) -> Any:
        counts.append(len(rows))
        return generate_together(pipeline, rows, *settings)

    monkeypatch.setattr("speed_diffusers.metrics.score.generate_together", counting)
    images = images_of(10, 32, 9)
    rng = np.random.default_rng(0)
    np.savez(
        "adm.npz",
        arr_0=to_uint8(images).permute(0, 2, 3, 1).numpy(),
        mu=rng.normal(size=2048),
        sigma=np.eye(2048),
        mu_s=rng.normal(size=2023),
        sigma_s=np.eye(2023),
    )
    metrics = ["fid", "kid", "inception_score", "sfid", "precision_recall", "cmmd", "clip_score", "fd_dinov2"]
    options = [
        "models=embedded",
        "num_images=20",
        "num_inference_steps=2",
        "kid_subset_size=10",
        "reference=adm.npz",
        f"inception_weights={inception_file}",
        f"clip_model={clip_folder}",
        f"dinov2_model={write_dinov2(tmp_path / 'dinov2', small=True)}",
    ]
    evaluate.main([f"metrics={','.join(metrics)}", *options])
    assert counts == [20], "generated once for all of them"
    records = {
        record.score.protocol.extractor: record.score for record in load_scores(tmp_path / "scores" / "embedded")
    }
    assert {name: list(score.values) for name, score in records.items()} == {
        "inception": ["fid", "kid", "kid_std", "inception_score", "inception_score_std", "precision", "recall"],
        "inception_spatial": ["sfid"],
        "clip": ["cmmd", "clip_score"],
        "dinov2": ["fd_dinov2"],
    }
    assert all(
        value is not None and np.isfinite(value) for score in records.values() for value in score.values.values()
    )
    protocol = records["inception"].protocol
    assert protocol.measures == {
        "kid": {"subsets": 100, "subset_size": 10, "seed": 2020},
        "inception_score": {"splits": 10, "seed": 2020},
        "fid": {},
        "precision_recall": {"equal_counts": False},
    }
    assert (protocol.reference, protocol.num_reference_images) == ("adm.npz", None)
    printed = capsys.readouterr().out
    assert printed.count("Protocol: ") == 4 and "features of inception, reference adm.npz." in printed
    # What is there is not generated again, and another subset size is another protocol.
    evaluate.main(["metrics=fid", *options])
    assert counts == [20]
    with pytest.raises(InputError, match="num_images=20: kid needs at least 30"):
        evaluate.main(["metrics=kid", *[option for option in options if "kid" not in option], "kid_subset_size=30"])
    assert counts == [20]
