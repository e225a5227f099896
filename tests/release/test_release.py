"""Releases on this machine: their files, their cards, and what a card says of models of every kind."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from loopback_hub import LoopbackHub
from pipeline_parts import autoencoder, pipeline_of, transformer
from speed_diffusers import SpeeDDDPMScheduler
from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.generation.export import inference_pipeline
from speed_diffusers.hub.upload import is_allowed
from speed_diffusers.metrics.score_record import load_scores, save_score
from speed_diffusers.release import Licences, Release, make_release
from speed_diffusers.release.model_card import recipe
from speed_diffusers.train_scripts import push_to_hub
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.run_folder import load_run_config
from speed_diffusers.training.snapshots import pipeline_place

QUICKSTART = [
    "dataset_name=embedded",
    "train_data_dir=None",
    "pretrained_vae_model_name_or_path=embedded",
    "resolution=32",
    "model=DiT-tiny/8",
    "max_train_samples=32",
    "max_train_steps=4",
    "checkpointing_steps=2",
    "num_score_images=20",
    "validation_split=test",
    "validation_steps=2",
    "max_validation_samples=8",
    "prediction_type=v_prediction",
    "speed_k=4",
    "hub_license=None",
]

ALWAYS = {"README.md", "model_index.json", "scheduler/scheduler_config.json"}
MODELS = {
    f"{part}/{name}"
    for part in ("transformer", "vae")
    for name in (
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    )
}
PICTURES = {"samples.png", "training_curve.png", "error_by_timestep.png"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release")


@pytest.fixture
def run(place: Path, train: Callable[..., Path]) -> Path:
    """A finished run of the embedded data in small, made once."""
    folder = place / "run"
    return folder if folder.is_dir() else train(folder, *QUICKSTART)


@pytest.fixture
def release(run: Path, place: Path) -> Release:
    """Its release, made once a test that asks for it and thrown away by the next."""
    shutil.rmtree(place / "of_run", ignore_errors=True)
    return make_release(str(run), place / "of_run", "alice/tiny", Licences(weights="mit"))


def card_of(release: Release) -> ModelCard:
    return ModelCard.load(release.folder / "README.md")


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run_usage(release: Release) -> list[Any]:
    """Runs the first example of a card on the release where it lies, in few steps; returns the images."""
    code = re.search(r"^```python\n(.*?)^```$", card_of(release).text, re.MULTILINE | re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    small = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code[1]).replace(
        '"alice/tiny"', repr(str(release.folder))
    )
    exec(small, names)
    return list(names["images"])


def test_a_run_is_released_whole_and_says_nothing_of_its_machine(run: Path, release: Release) -> None:
    assert files_of(release.folder) == ALWAYS | MODELS | PICTURES | {"speed_training.json"}
    assert all(is_allowed(name) for name in files_of(release.folder))
    for name in files_of(release.folder):
        content = (release.folder / name).read_bytes()
        assert str(run.parent).encode() not in content and b'"_name_or_path"' not in content, name
    for part in ("transformer", "vae"):
        full, half, trained = (
            load_file(folder / part / f"diffusion_pytorch_model{variant}.safetensors")
            for folder, variant in ((release.folder, ""), (release.folder, ".fp16"), (run / "pipeline", ""))
        )
        assert all(torch.equal(full[name], trained[name]) for name in trained)
        assert all(torch.equal(half[name], trained[name].half()) for name in trained)
    index = json.loads((release.folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and index["id2label"]["7"] == "Sneaker"
    assert len(run_usage(release)) == 2


def test_the_card_tells_how_the_model_was_made_and_measured(run: Path, release: Release) -> None:
    card, (record,) = card_of(release), load_scores(run / "scores")
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert results["frechet_distance"].metric_value == pytest.approx(record.score.frechet_distance, rel=1e-5)
    protocol = record.score.protocol
    assert results["recall"].metric_args == {"protocol": protocol.short_hash()}
    kept = card.data.to_dict()["protocols"][protocol.short_hash()]
    assert (kept["num_images"], kept["guidance_interval"], kept["extractor"]) == (20, [0.0, 1.0], "fashion_mnist")
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert card.data.datasets == ["zalando-datasets/fashion_mnist"]
    seconds = json.loads((run / "pipeline" / "speed_training.json").read_text())["training"]["seconds"]
    for words in (
        "# tiny\n",
        "](samples.png)",
        "](training_curve.png)",
        "](error_by_timestep.png)",
        "in 10 classes, trained with [SpeeD]",
        "| steps | 4 of 4 images (16 images, 0.5 epochs) |",
        f"| time | {seconds / 3600:.3g} hours in training steps |",
        "| hardware | 1 process of 1 thread on ",
        "tau = 700 of 1,000 timesteps",
        "| `speed_k` | `4` |",
        "| convergence | 700 to 999 |",
        "| Fréchet distance (lower is better) | ",
        f"Protocol: {protocol.in_words()}.",
        "| weights of the transformer | `mit` |",
        "| autoencoder (`vae/`) | [Apache-2.0, part of speed_diffusers",
        "[MIT, Zalando SE (Fashion-MNIST)]",
        "@article{wang2024closer",
    ):
        assert words in card.text, words


def test_the_recipe_trains_the_same_again(run: Path, release: Release) -> None:
    trained = load_run_config(run)
    script, *words = shlex.split(recipe(release.facts, trained).replace("\\\n", ""))[2:]
    assert script == "train_scripts/train_dit_speed.py"
    again = load_config(TrainConfig, words, run)
    bound = [each.name for each in fields(TrainConfig) if not each.metadata["free"]]
    assert {name: getattr(again, name) for name in bound} == {name: getattr(trained, name) for name in bound}
    assert again.train_batch_size == trained.train_batch_size
    local = replace(release.facts, record=replace(release.facts.record, dataset=None))
    large = replace(trained, gradient_checkpointing=1.0, compile=True, compile_backend="aot_eager")
    words = shlex.split(recipe(release.facts, large).replace("\\\n", ""))
    assert {"gradient_checkpointing=1", "compile=true", "compile_backend=aot_eager"} <= set(words)
    words = recipe(local, replace(trained, dataset_name=None))
    assert "train_data_dir=path/to/images" in words and "dataset_name" not in words


def test_scores_of_other_weights_are_not_claimed(run: Path, place: Path, tmp_path: Path) -> None:
    (record,) = load_scores(run / "scores")
    more = replace(record.score.protocol, num_images=40)
    save_score(replace(record.score, protocol=more, values={"recall": 0.25}), tmp_path / "scores")
    other = replace(record.score.protocol, num_images=30)
    save_score(replace(record.score, protocol=other, weights_sha256="0" * 64), tmp_path / "scores")
    # As evaluate.py writes them that is given an output_dir.
    samples = replace(record.score.protocol, num_images=50)
    save_score(replace(record.score, protocol=samples), tmp_path / "scores" / "samples")
    made = make_release(str(run), tmp_path / "release", "alice/tiny", scores_dir=tmp_path / "scores")
    assert [score.protocol.num_images for score in made.facts.scores] == [20, 40, 50]
    assert "| recall (higher is better) | 0.25 |" in card_of(made).text


def test_the_course_of_a_training_is_that_of_its_own_averages(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    (record,) = load_scores(run / "scores")

    def save(folder: Path, weights: str, *points: tuple[int, float]) -> None:
        for step, value in points:
            protocol = replace(record.score.protocol, weights=weights, num_images=30)
            score = replace(record.score, protocol=protocol, values={"frechet_distance": value})
            save_score(replace(score, weights_sha256=str(step)), folder, step=step)

    save(run / "scores", "ema", (4, 3.0), (2, 5.0))
    save(run / "scores", "model", (1, 9.0), (2, 8.0), (4, 7.0))
    save(tmp_path / "other", "ema", (1, 30.0), (2, 20.0), (3, 10.0))
    made = make_release(str(run), tmp_path / "release", "alice/tiny", scores_dir=tmp_path / "other")
    assert made.facts.course == {"frechet_distance": [(2.0, 5.0), (4.0, 3.0)]}


def test_a_grid_is_captioned_as_it_was_made(run: Path, tmp_path: Path) -> None:
    """Also where guidance takes what was never trained, of which a run warns."""
    run = shutil.copytree(run, tmp_path / "run")
    sidecar = run / "pipeline" / "speed_training.json"
    text = re.sub(r'("class_dropout_prob": )[^,\n]*', r"\g<1>0.0", sidecar.read_text())
    assert '"class_dropout_prob": 0.0' in text
    sidecar.write_text(text)
    assert "guidance 1.5, seed 0" in card_of(make_release(str(run), tmp_path / "release", "alice/tiny")).text
    (run / "samples.png").unlink()
    made = make_release(str(run), tmp_path / "again", "alice/tiny", num_images_per_class=1)
    assert "no guidance, seed 0" in card_of(made).text


def test_numbers_that_came_to_the_runs_own_score_are_released(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    (record,) = load_scores(run / "scores")
    save_score(replace(record.score, values={**record.score.values, "recall": 0.125}), run / "scores")
    made = make_release(str(run), tmp_path / "release", "alice/tiny", branch="v1")
    assert [score.values["recall"] for score in made.facts.scores] == [0.125]
    text = card_of(made).text
    assert (
        'from_pretrained("alice/tiny", revision="v1")' in text and 'load_pipeline("alice/tiny", revision="v1")' in text
    )
    assert "`pretrained_model_name_or_path=alice/tiny revision=v1`" in text


def test_a_run_that_is_not_finished_is_released_as_such(run: Path, tmp_path: Path) -> None:
    half = shutil.copytree(run, tmp_path / "half")
    for name in ("pipeline", "checkpoint-4"):
        shutil.rmtree(half / name)
    made = make_release(str(half), tmp_path / "release", "alice/tiny", num_images_per_class=1)
    text = card_of(made).text
    assert "for 2 steps of the 4 that its training is to have" in text
    assert "| steps | 2 of 4 images (8 images) |" in text and "## Scores" not in text
    assert pipeline_place(str(made.folder)).step == 2
    averaged = load_file(half / "checkpoint-2" / "ema.safetensors")
    released = load_file(tmp_path / "release" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(released["proj_out_2.weight"], averaged["transformer.proj_out_2.weight"])
    assert files_of(made.folder) == ALWAYS | MODELS | {"samples.png", "training_curve.png", "speed_training.json"}


def saved(folder: Path, pipeline: DiTPipeline) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)


def with_frequencies_of_dit() -> DiTPipeline:
    network = transformer(rows=1000)
    network.register_to_config(freq_shift=0)
    return pipeline_of(network)


KINDS: dict[str, Callable[[], DiTPipeline]] = {
    "flow": lambda: pipeline_of(transformer(rows=1000), FlowMatchEulerDiscreteScheduler()),
    "few rows": lambda: pipeline_of(transformer(rows=2), id2label={0: "cat", 1: "dog"}),
    "frequencies of DiT": with_frequencies_of_dit,
    "without classes": lambda: pipeline_of(transformer(rows=1000)),
    "few without names": lambda: pipeline_of(transformer(rows=5)),
    "ours": lambda: DiTPipeline(transformer(rows=1000), autoencoder(), SpeeDDDPMScheduler(clip_sample=False)),
    "names": lambda: inference_pipeline(
        transformer(rows=1000), autoencoder(), SpeeDDDPMScheduler(), ["crane, bird", 'the "big" one', "crane"]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_every_kind_of_model_runs(kind: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "pipeline", KINDS[kind]())
    made = make_release(name, tmp_path / "release", "alice/tiny", num_images_per_class=1)
    assert files_of(made.folder) == ALWAYS | MODELS | {"samples.png"}, "nothing is told that is not known"
    text = card_of(made).text
    not_for_stock = kind in ("flow", "few rows", "frequencies of DiT")
    assert ("load_pipeline" in text.partition("```python")[2].partition("```")[0]) == not_for_stock
    assert len(run_usage(made)) == (2 if kind in ("few rows", "names") else 4)
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["scheduler"][0] == "diffusers"
    assert ("rows of its label table, 0 to 5, of which 5 is no class" in text) == (kind == "few without names")
    if kind == "names":
        assert 'get_label_ids(["bird", "the \\"big\\" one"])' in text, "crane has two rows"
    assert "not stated by who released" in text and "## Training" not in text


def test_weights_that_half_precision_cannot_hold_have_no_variant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipeline_of(transformer(rows=1000))
    with torch.no_grad():
        pipeline.transformer.proj_out_2.bias[0] = 1e6
    made = make_release(
        saved(tmp_path / "large", pipeline), tmp_path / "release", "alice/tiny", num_images_per_class=0
    )
    assert "Weights of up to 1e+06 do not fit into half precision" in caplog.text
    assert not list(made.folder.rglob("*fp16*")) and "fp16" not in card_of(made).text
    assert not (made.folder / "samples.png").exists()


def test_the_embedded_model_knows_its_origin_from_its_options_alone(tmp_path: Path) -> None:
    text = card_of(make_release("embedded", tmp_path / "release", "alice/tiny", num_images_per_class=0)).text
    assert "| images | Fashion-MNIST, as embedded" in text and "| time | not recorded |" in text
    assert text.count("Zalando SE") == 2 and "DiT-tiny/2" in text


def test_licences_are_those_of_the_base_unless_others_are_given() -> None:
    dit = "facebook/DiT-XL-2-256"
    assert Licences().of_weights(dit) == "cc-by-nc-4.0" and Licences().of_weights("alice/tiny") is None
    lines = Licences("other", data="mine").lines(base_model=dit, vae="stabilityai/sd-vae-ft-ema", data=None)
    assert (
        lines["weights of the transformer"] == "`other`"
        and lines["training images (not in this repository)"] == "mine"
    )
    assert "MIT" in lines["autoencoder (`vae/`)"] and "CC BY-NC" in lines[f"fine-tuned from `{dit}`"]
    unknown = Licences().lines(base_model=None, vae="alice/vae", data="alice/data")
    assert "that of [alice/data]" in unknown["training images (not in this repository)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hub_model_id=alice/tiny"], "model and hub_model_id are needed"),
        (["model=embedded"], "model and hub_model_id are needed"),
        (["model=EMPTY"], "model=.*: the folder holds no pipeline"),
        (["model=RUN", "output_dir=RUN"], "output_dir=.*: is not empty; give a new folder"),
        (["model=RUN", "scores_dir=nowhere"], "scores_dir=nowhere: there is no such folder"),
        (["model=RUN", "hub_token=hf_write"], "Unknown config key 'hub_token'"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    given = [option.replace("RUN", str(run)).replace("EMPTY", str(tmp_path / "empty")) for option in options]
    if "needed" not in message:
        given.append("hub_model_id=alice/tiny")
    with pytest.raises(InputError, match=message) as error:
        push_to_hub.main([*given, "dry_run=true"])
    assert "\n" not in str(error.value) and "hf_write" not in str(error.value)


def test_a_damaged_file_is_named_and_nothing_is_pushed(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run / "pipeline", tmp_path / "damaged")
    weights = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="Could not load the vae"):
        push_to_hub.main([f"model={damaged}", "hub_model_id=alice/tiny"])
    assert hub.repositories == {}


def test_a_dry_run_asks_the_hub_for_nothing(
    hub: LoopbackHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="hub_model_id=a b/c: .* is no name of the Hub"):
        push_to_hub.main([f"model={run}", "hub_model_id=a b/c", "dry_run=true"])
    push_to_hub.main([f"model={run}", "hub_model_id=alice/tiny", f"output_dir={tmp_path / 'release'}", "dry_run=true"])
    said = capsys.readouterr().out
    assert hub.asked == [] and "bytes in 13 files" in said and "Nothing was pushed" in said
    assert "The card states no licence for the weights" in said
    assert "](samples.png)" in (tmp_path / "release" / "README.md").read_text()


def test_what_is_released_loads_as_both_variants(release: Release) -> None:
    for part, kind in (("transformer", DiTTransformer2DModel), ("vae", AutoencoderKL)):
        full = kind.from_pretrained(release.folder, subfolder=part)
        half = kind.from_pretrained(release.folder, subfolder=part, variant="fp16", torch_dtype=torch.float16)
        assert full.dtype == torch.float32 and half.dtype == torch.float16
        assert set(full.config) == set(half.config)
