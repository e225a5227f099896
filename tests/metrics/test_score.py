"""The score of a pipeline, its protocol and its file."""

import importlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from matplotlib.figure import Figure
from PIL import Image

from speed_diffusers.errors import InputError
from speed_diffusers.files import save_tensors
from speed_diffusers.generation.generate import row_names_of
from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.metrics import (
    METRICS,
    Measurement,
    MetricSettings,
    general_metrics,
    load_extractor,
    load_reference,
)
from speed_diffusers.metrics.curves import ScoreCurve, save_score_curves
from speed_diffusers.metrics.protocol import (
    Protocol,
    labels_in_words,
    protocol_differences,
    require_equal_protocols,
)
from speed_diffusers.metrics.score import (
    ClassesOfImages,
    ScoreSettings,
    _class_rows,
    make_protocol,
    score_pipeline,
    wanted_classes,
)
from speed_diffusers.metrics.score_record import Environment, Score, ScoreRecord, load_score, load_scores, save_score
from speed_diffusers.pipelines import SpeeDDiTPipeline

FEW = ScoreSettings(num_images=20, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    return load_pipeline("embedded")


@pytest.fixture(scope="module")
def protocol(pipeline: DiTPipeline) -> Protocol:
    return make_protocol(pipeline, ScoreSettings())


def a_score(protocol: Protocol, distance: float = 3.0, **values: float | None) -> Score:
    return Score({"frechet_distance": distance, **values}, "ab", protocol, Environment("2", "0", "0", "cpu", 1.5))


def test_the_shipped_checkpoint_scores_far_better_than_noise() -> None:
    pipeline = load_pipeline("embedded")
    settings = ScoreSettings(num_images=100, num_inference_steps=10, batch_size=50)
    score = score_pipeline(pipeline, settings)
    for parameter in pipeline.transformer.parameters():
        parameter.data.zero_()
    noise = score_pipeline(pipeline, settings)
    assert list(score.values) == [n for name in general_metrics() for n in METRICS[name].function.numbers]
    values: dict[str, Any] = dict(score.values)
    assert values["class_agreement"] > 0.6 > noise.values["class_agreement"]
    assert values["frechet_distance"] < 0.5 * noise.values["frechet_distance"]
    assert values["kernel_distance"] < 0.5 * noise.values["kernel_distance"]
    # Its precision is no worse: the same blurred thing over and over lies near the middle of all images.
    assert values["recall"] > 0.4 > noise.values["recall"]
    assert score.protocol == noise.protocol and score.weights_sha256 != noise.weights_sha256
    assert score.to_dict()["frechet_distance"] == score.frechet_distance == values["frechet_distance"]
    assert json.loads(json.dumps(score.to_dict()))["protocol"]["num_images"] == 100
    assert score.environment.device == "cpu" and score.environment.seconds > 0


def test_the_same_noise_gives_the_same_score_whatever_the_batch(pipeline: DiTPipeline) -> None:
    one, other = (score_pipeline(pipeline, replace(FEW, batch_size=batch_size)) for batch_size in (20, 7))
    assert one.values == pytest.approx(dict(other.values), rel=1e-3, abs=1e-3)
    assert replace(one, values={}) == replace(other, values={}), "the time is no part of it"


def test_the_protocol_tells_all_that_a_score_depends_on(pipeline: DiTPipeline, protocol: Protocol) -> None:
    assert (protocol.sampler, protocol.num_inference_steps, protocol.seed) == ("DDIMScheduler", 50, 0)
    assert protocol.sampler_settings["timestep_spacing"] == "leading"
    assert (protocol.labels, protocol.resolution, protocol.weights) == ("0..9 in turn", 32, "ema")
    assert (protocol.extractor, protocol.reference, protocol.num_reference_images) == (
        "fashion_mnist",
        "embedded",
        10_000,
    )
    assert {len(getattr(protocol, name)) for name in ("vae_sha256", "extractor_sha256", "reference_sha256")} == {64}
    assert Protocol.from_dict(json.loads(json.dumps(protocol.compared() | {"reference": "embedded"}))) == protocol
    ancestral = make_protocol(pipeline, ScoreSettings(sampler="ddpm"))
    assert (ancestral.sampler, ancestral.sampler_settings["variance_type"]) == ("DDPMScheduler", "fixed_small")
    assert "2,000 images of 32x32 (0..9 in turn), DDIM 50 steps, no guidance, ema weights" in protocol.in_words()


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"sampler": "ddpm"}, {"sampler", "sampler_settings"}),
        ({"sampler": "ddim"}, set()),
        ({"num_images": 2001}, {"num_images"}),
        ({"class_rows": (0, 1, 2, 5)}, {"labels"}),
        ({"class_rows": tuple(range(10))}, set()),
        ({"guidance_scale": 1.5}, {"guidance_scale"}),
        ({"guidance_channels": 3}, set()),
        ({"guidance_scale": 1.5, "guidance_channels": 3}, {"guidance_scale", "guidance_channels"}),
        ({"guidance_scale": 1.5, "guidance_interval": (0.1, 0.8)}, {"guidance_scale", "guidance_interval"}),
        ({"num_inference_steps": 20, "seed": 1}, {"num_inference_steps", "seed"}),
        ({"weights": "model"}, {"weights"}),
        ({"batch_size": 7}, set()),
        ({"metrics": ("frechet_distance",)}, set()),
    ],
)
def test_settings_that_change_images_change_the_protocol_and_no_others(
    pipeline: DiTPipeline, protocol: Protocol, change: dict[str, Any], different: set[str]
) -> None:
    other = make_protocol(pipeline, ScoreSettings(**change))
    assert {phrase.split(":")[0] for phrase in protocol_differences(protocol, other)} == different
    assert (other == protocol) == (other.short_hash() == protocol.short_hash()) == (not different)


def test_every_part_of_a_protocol_counts_but_the_name_of_the_reference(protocol: Protocol) -> None:
    for each in fields(Protocol):
        other = replace(protocol, **{each.name: "other"})
        expected = [] if each.name == "reference" else [f"{each.name}: {getattr(protocol, each.name)} and other"]
        assert protocol_differences(protocol, other) == expected
    with pytest.raises(InputError, match=r"of a and c do not compare: seed: 0 and 1; weights: ema and model\.$"):
        require_equal_protocols({"a": protocol, "b": protocol, "c": replace(protocol, seed=1, weights="model")})


def test_labels_in_words() -> None:
    assert labels_in_words(range(10)) == "0..9 in turn"
    assert labels_in_words([3, 5, 6, 7, 1]) == "3, 5..7, 1 in turn"
    assert labels_in_words([4]) == "4 in turn"


def test_agreement_goes_by_name_and_without_names_by_number(pipeline: DiTPipeline) -> None:
    by_name = score_pipeline(pipeline, FEW).class_agreement
    renamed = load_pipeline("embedded")
    renamed.register_to_config(id2label={str(row): f"class {row}" for row in range(10)})
    assert score_pipeline(renamed, FEW).class_agreement is None, "classes that the extractor does not know"
    renamed.labels = {}
    renamed.register_to_config(id2label=None)
    rows = tuple(range(10))
    assert score_pipeline(renamed, replace(FEW, class_rows=rows)).class_agreement == by_name
    assert score_pipeline(renamed, FEW).protocol.labels == "no class"
    assert score_pipeline(renamed, FEW).class_agreement is None
    # The names of another order of classes are followed.
    names = load_extractor().classes
    assert names is not None
    few = replace(load_extractor(), classes=None)
    far = ClassesOfImages([207, 360], {207: "golden retriever", 360: "otter"}, null=1000)
    measurement = Measurement(few, load_reference("embedded"), [], MetricSettings())
    measurement.update(torch.zeros(2, 3, 32, 32))
    assert measurement.samples(wanted_classes(far, None)).wanted is None, "it has ten classes"
    renamed.register_to_config(id2label={str(9 - row): names[row] for row in range(10)})
    swapped = score_pipeline(renamed, replace(FEW, class_rows=rows)).class_agreement
    assert swapped is not None and by_name is not None and swapped < 0.3 < by_name


def test_every_class_is_scored_though_others_have_its_name(pipeline: DiTPipeline) -> None:
    names = {row: f"class {row}" for row in range(1000)}
    names |= {134: "crane", 517: "crane", 638: "maillot", 639: "maillot, tank suit", 657: "missile"}
    names |= {744: "projectile, missile"}
    named = SpeeDDiTPipeline(**pipeline.components, id2label=names)
    assert _class_rows(named, ScoreSettings()) == list(range(1000))
    # A stock pipeline loses three of them, and must not be scored on the other 997 without a word.
    lossy = DiTPipeline(**pipeline.components, id2label=names)
    with pytest.raises(InputError, match="has lost the names of 3 classes, such as row 134") as error:
        make_protocol(lossy, ScoreSettings())
    assert "\n" not in str(error.value)
    assert make_protocol(lossy, ScoreSettings(class_rows=range(1000))).labels == "0..999 in turn"
    # Equal names are told apart by their order, on both sides.
    asked = ClassesOfImages([744, 134, 517, 638, 639], row_names_of(named), null=1000)
    wanted = wanted_classes(asked, list(names.values()))
    assert wanted is not None and wanted.tolist() == [744, 134, 517, 638, 639]
    asked = replace(asked, labels=[134])
    assert wanted_classes(asked, [*names.values(), "crane"]) is None, "three of them there, two here"


def test_the_row_of_no_class_is_no_class_of_the_extractor(pipeline: DiTPipeline) -> None:
    extractor = load_extractor()

    def always_the_first(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean(dim=(2, 3)).repeat(1, 22)[:, :64], torch.eye(10)[:1].expand(len(images), 10)

    settings = replace(FEW, class_rows=(1, 2), extractor=replace(extractor, function=always_the_first, classes=None))
    other = SpeeDDiTPipeline(**pipeline.components, null_class_id=0)
    assert score_pipeline(pipeline, settings).class_agreement == 0.0, "rows 1 and 2 are classes 1 and 2"
    assert score_pipeline(other, settings).class_agreement == 0.5, "rows 1 and 2 are classes 0 and 1"


def test_wrong_rows_are_named(pipeline: DiTPipeline) -> None:
    for rows in ((1001,), (-1,), ()):
        with pytest.raises(InputError, match="must be rows of the label table, 0 to 1000"):
            make_protocol(pipeline, ScoreSettings(class_rows=rows))
    with pytest.raises(InputError, match=r"guidance_channels=5: must lie in \[1, 4\]"):
        make_protocol(pipeline, ScoreSettings(guidance_channels=5))
    with pytest.raises(InputError, match=r"guidance_interval=\(0.8, 0.1\): must be two numbers in \[0, 1\]"):
        make_protocol(pipeline, ScoreSettings(guidance_interval=(0.8, 0.1)))
    with pytest.raises(InputError, match=r"seed=-1: must lie in \[0, 2\^63\)"):
        make_protocol(pipeline, ScoreSettings(seed=-1))
    with pytest.raises(InputError, match="Unknown metric 'frechet'. Did you mean 'frechet_distance'"):
        make_protocol(pipeline, ScoreSettings(metrics=("frechet",)))


def test_a_score_survives_its_file_and_replaces_the_one_before(protocol: Protocol, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "scores"
    score = a_score(protocol, precision=0.5, class_agreement=None)
    path = save_score(score, folder, step=3000, images_seen=192_000, seconds=241.5)
    assert path.name == f"step-0003000-{protocol.short_hash()}.json"
    record = load_score(path)
    assert record == ScoreRecord(score, 3000, 192_000, 241.5) and record.score.environment == score.environment
    save_score(a_score(protocol, 2.0), folder, step=3000)
    other = save_score(a_score(replace(protocol, seed=1)), folder, step=500)
    nowhere = save_score(score, folder)
    assert nowhere.name.startswith("score-") and len(list(folder.iterdir())) == 3, "no temporary file is left"
    assert [(each.step, each.score.frechet_distance) for each in load_scores(folder)] == [
        (None, 3.0),
        (500, 3.0),
        (3000, 2.0),
    ]
    other.write_text(other.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(InputError, match="holds no score of this version"):
        load_score(other)
    nowhere.write_text(nowhere.read_text().replace('"nearest"', '"k"'))
    with pytest.raises(InputError, match="missing or unknown: k, nearest"):
        load_score(nowhere)
    assert [each.step for each in load_scores(folder)] == [3000]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"step": "3000"}, "step"),
        ({"training_seconds": [1]}, "training_seconds"),
        ({"protocol": []}, "protocol"),
        ({"environment": None}, "environment"),
        ({"weights_sha256": 7}, "weights_sha256"),
        ({"frechet_distance": "3"}, "frechet_distance"),
        ({"protocol": {"num_images": "2000"}}, "num_images"),
        ({"protocol": {"guidance_interval": 0.5}}, "guidance_interval"),
        ({"protocol": {"sampler_settings": "x"}}, "sampler_settings"),
        ({"environment": {"seconds": None}}, "seconds"),
    ],
)
def test_a_score_of_wrong_types_names_file_and_key(
    protocol: Protocol, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    path = save_score(a_score(protocol), tmp_path, step=3000)
    values = json.loads(path.read_text())
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        load_score(path)
    assert str(caught.value).startswith(f"{path}: {key} is ") and "\n" not in str(caught.value)
    assert load_scores(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[1]", '{"format_version": 1', "[" * 100_000, '{"format_version": 1}'])
def test_a_file_that_is_no_score_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(text)
    with pytest.raises(InputError, match=r"step\.json (cannot be read as JSON|holds)") as caught:
        load_score(tmp_path / "step.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    ["[]", "{", '{"count": "9", "extractor_sha256": ""}', '{"count": 9}', '{"count": 9, "extractor_sha256": 1}'],
)
def test_a_reference_whose_header_or_shapes_are_wrong_is_one_line(header: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    tensors = {"mean": torch.zeros(2, dtype=torch.float64), "covariance": torch.zeros(2, 2, dtype=torch.float64)}
    save_tensors(tensors, path, {"feature_statistics": header})
    with pytest.raises(InputError, match=r"reference\.safetensors") as caught:
        load_reference(path)
    assert "\n" not in str(caught.value)
    whole = {"feature_statistics": '{"count": 9, "extractor_sha256": ""}'}
    save_tensors({**tensors, "mean": torch.zeros(3)}, path, whole)
    with pytest.raises(InputError, match="holds no reference statistics"):
        load_reference(path)
    save_tensors(tensors, path, whole)
    assert load_reference(path).statistics.count == 9


def test_curves_show_names_as_they_are(protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    names = ["$10_$20", "_mine"]
    save_score_curves([curve(name, protocol, [90, 20]) for name in names], tmp_path / "curves.png")
    texts = figures[0].axes[0].get_legend().get_texts()
    assert [text.get_text().strip() for text in texts] == names and not any(text.get_parse_math() for text in texts)


def curve(name: str, protocol: Protocol, distances: list[float], *, known: bool = True) -> ScoreCurve:
    steps = [500 * (index + 1) for index in range(len(distances))]
    return ScoreCurve(
        name,
        [
            ScoreRecord(a_score(protocol, distance), step, step * 64 if known else None, step / 10 if known else None)
            for step, distance in zip(steps, distances, strict=True)
        ],
    )


def test_curves_have_a_panel_for_what_all_scores_know(protocol: Protocol, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    first, second = curve("speed", protocol, [90, 20, 8, 4]), curve("uniform", protocol, [99, 40, 12, 7])
    assert save_score_curves([first, second], path) == []
    three = Image.open(path)
    left_out = save_score_curves([first, curve("unknown", protocol, [80, 30], known=False)], path)
    assert left_out == ["images seen", "minutes of training"]
    assert Image.open(path).width * 3 == three.width
    for curves, message in (
        (
            [first, curve("other", replace(protocol, num_images=100), [5])],
            "speed, step 500 and other, step 500 do not",
        ),
        ([ScoreCurve("none", [ScoreRecord(a_score(protocol))])], "no score with a step and frechet_distance"),
    ):
        path.unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            save_score_curves(curves, path)
        assert not path.exists()


def test_a_number_of_a_known_distribution_reaches_the_score(pipeline: DiTPipeline) -> None:
    # Features that do not depend on the image but are the reference's own: the distances of equal sets.
    settings = replace(FEW, metrics=("frechet_distance", "precision_recall"))
    reference = settings.reference
    assert reference.features is not None
    own = iter(reference.features[:22].float().split([2, 20]))
    extractor = replace(settings.extractor, function=lambda images: next(own))
    small = replace(reference, features=reference.features[2:22])
    values = score_pipeline(pipeline, replace(settings, extractor=extractor, reference=small)).values
    assert (values["precision"], values["recall"]) == (1.0, 1.0)
    assert torch.isfinite(torch.tensor(values["frechet_distance"]))


def test_the_committed_comparison_can_still_be_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Its scores hold the protocol of their time.
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    comparison = importlib.import_module("speed_vs_uniform")
    committed = comparison.RESULTS
    results = shutil.copytree(committed, tmp_path / "results")
    table = comparison.report(comparison.BenchmarkConfig(results_dir=str(results)))
    assert table == (committed / "table.md").read_text().rstrip()
    for other in ("max_train_steps=10", "num_images=20"):
        with pytest.raises(InputError, match=f"^{other}: .*was measured with 2000; give a new results_dir"):
            comparison.main([f"results_dir={results}", f"runs_dir={tmp_path / 'runs'}", other])
    assert not (tmp_path / "runs").exists()
