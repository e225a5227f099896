"""The evaluation script on a tiny run: its files, that it goes on, and that it refuses before it generates."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from speed_diffusers.assets import EMBEDDED_CLASSIFIER
from speed_diffusers.errors import InputError
from speed_diffusers.files import tensors_sha256
from speed_diffusers.generation import load_pipeline
from speed_diffusers.generation.generate import generate_together
from speed_diffusers.generation.image_set import Manifest
from speed_diffusers.locks import LOCK_FILE
from speed_diffusers.metrics import load_extractor, load_npz_reference, load_reference, save_statistics
from speed_diffusers.metrics.protocol import protocol_differences
from speed_diffusers.metrics.score import ScoreSettings, check_measurable
from speed_diffusers.metrics.score_record import load_scores
from speed_diffusers.train_scripts import evaluate, generate_samples, make_reference_statistics, train_dit_speed
from speed_diffusers.training.snapshots import put_weights

FEW = ["num_images=8", "num_inference_steps=2", "batch_size=8"]
QUICK = [*FEW, "metrics=frechet_distance,precision_recall"]


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run that these tests share is trained by the first of them."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(trained_folder: Path, train: Callable[..., Path]) -> Path:
    """A run of 12 steps with checkpoints at 5, 10 and 12."""
    return trained_folder if trained_folder.exists() else train(trained_folder)


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return Path("run")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of every generation."""
    counts: list[int] = []

    def counting(pipeline: DiTPipeline, rows: Sequence[int], *settings: Any) -> Iterator[Any]:
        counts.append(len(rows))
        return generate_together(pipeline, rows, *settings)

    monkeypatch.setattr("speed_diffusers.metrics.score.generate_together", counting)
    return counts


def files(folder: Path) -> list[str]:
    """Names in a folder, without the hashes of protocols and the lock."""
    names = [path.name for path in folder.iterdir() if path.name != LOCK_FILE]
    return sorted(name.split("-")[0] + name[4:12] if "-" in name else name for name in names)


def without_seconds(run: Path) -> None:
    """Takes the training time out of the run's metrics, as older runs have them."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: line[key] for key in line if key != "seconds"}) + "\n" for line in lines))


def with_seconds(run: Path) -> None:
    """Gives the run's metrics the training time, ten seconds a step, at every second step."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**line, "seconds": 10.0 * line["step"]} for line in lines if line["step"] % 2 == 0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 14, "sec')


def test_every_checkpoint_is_scored_once_and_drawn(
    run: Path, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["models=run", "checkpoints=true", *FEW]
    without_seconds(run)
    evaluate.main(options)
    assert generated == [8, 8, 8]
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == [f"run, step {step}" for step in (5, 10, 12)]
    assert [line.split()[1] for line in printed.splitlines()[4:7]] == ["5", "10", "12"]
    assert "No panel by minutes of training" in printed and "8 images of 32x32 (0..1 in turn), DDIM 2 steps" in printed
    assert files(run / "scores") == ["score_over_steps.png", "step-0000005", "step-0000010", "step-0000012"]
    two_panels = Image.open(run / "scores" / "score_over_steps.png").width
    records = load_scores(run / "scores")
    assert [(each.step, each.images_seen, each.training_seconds) for each in records] == [
        (5, 20, None),
        (10, 40, None),
        (12, 48, None),
    ]
    values = [each.score.values for each in records]
    assert all(
        list(each) == ["class_agreement", "frechet_distance", "kernel_distance", "precision", "recall"]
        for each in values
    )
    assert {each["class_agreement"] for each in values} == {None}, "the extractor knows no cats and dogs"
    assert len({each["frechet_distance"] for each in values}) == 3
    protocol = records[0].score.protocol
    assert (protocol.weights, protocol.resolution, protocol.num_reference_images) == ("ema", 32, 10_000)

    with_seconds(run)
    before = {path: path.read_bytes() for path in (run / "scores").glob("*.json")}
    evaluate.main(options)
    assert generated == [8, 8, 8], "scores that are there are not measured again"
    assert before == {path: path.read_bytes() for path in (run / "scores").glob("*.json")}
    shutil.rmtree(run / "scores")
    evaluate.main(options)
    assert [each.training_seconds for each in load_scores(run / "scores")] == [50.0, 100.0, 120.0]
    assert Image.open(run / "scores" / "score_over_steps.png").width > two_panels


def test_a_checkpoint_is_the_pipeline_it_would_have_become(run: Path) -> None:
    base = load_pipeline(str(run))
    exported = tensors_sha256(base.transformer.state_dict())
    put_weights(base, run / "checkpoint-5", "ema")
    assert tensors_sha256(base.transformer.state_dict()) != exported
    put_weights(base, run / "checkpoint-12", "ema")
    assert tensors_sha256(base.transformer.state_dict()) == exported
    put_weights(base, run / "checkpoint-12", "model")
    table = base.transformer.state_dict()["transformer_blocks.0.norm1.linear.weight"]
    stored = load_file(run / "checkpoint-12" / "model.safetensors")
    assert torch.equal(table, stored["transformer.transformer_blocks.0.norm1.linear.weight"])


def test_a_run_that_is_still_training_is_scored_from_its_configuration(run: Path) -> None:
    evaluate.main(["models=run", "checkpoints=true", "output_dir=whole", *QUICK])
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(run / "checkpoint-12")
    evaluate.main(["models=run", "checkpoints=true", "output_dir=part", *QUICK])
    whole, part = load_scores(Path("whole/run")), load_scores(Path("part/run"))
    assert [each.score for each in part] == [each.score for each in whole[:2]]
    with pytest.raises(InputError, match=r"the run has no pipeline with weights=ema; checkpoints=true scores"):
        evaluate.main(["models=run", *QUICK])


def test_an_interrupted_evaluation_goes_on_and_damage_is_measured_anew(run: Path, generated: list[int]) -> None:
    options = ["models=run", "checkpoints=true", *QUICK]
    evaluate.main(options)
    paths = sorted((run / "scores").glob("*.json"))
    kept = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[2].write_text("{")
    generated.clear()
    evaluate.main(options)
    assert generated == [8, 8]
    assert [load["frechet_distance"] for load in map(json.loads, kept)] == [
        json.loads(path.read_text())["frechet_distance"] for path in paths
    ]
    # Another run in the same folder is another score.
    model = load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: value * 1.1 for name, value in model.items()},
        run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    generated.clear()
    evaluate.main(["models=run", *QUICK])
    assert generated == [8]


def test_scores_go_with_the_run_that_is_overwritten(
    trained: Path, tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    shutil.copytree(trained, tmp_path / "old")
    evaluate.main([f"models={tmp_path / 'old'}", *QUICK])
    assert load_scores(tmp_path / "old" / "scores")
    fresh_accelerate()
    short = ["max_train_steps=1", "lr_warmup_steps=0", "overwrite_output_dir=true", f"output_dir={tmp_path / 'old'}"]
    train_dit_speed.main([f"config={trained / 'config.yaml'}", *short])
    assert not (tmp_path / "old" / "scores").exists()


def test_metrics_can_be_added_later(run: Path, generated: list[int]) -> None:
    evaluate.main(["models=run", "metrics=frechet_distance", *FEW])
    evaluate.main(["models=run", "metrics=precision_recall", *FEW])
    (record,) = load_scores(run / "scores")
    assert list(record.score.values) == ["frechet_distance", "precision", "recall"] and generated == [8, 8]
    evaluate.main(["models=run", "metrics=frechet_distance", *FEW])
    assert generated == [8, 8]


def test_runs_are_drawn_together_and_only_under_one_protocol(
    run: Path, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, "other")
    evaluate.main(["models=run,other", "checkpoints=true", "output_dir=compared", *QUICK])
    assert files(Path("compared")) == ["other", "run", "score_over_steps.png"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[7:13]] == ["run"] * 3 + ["other"] * 3
    assert not (run / "scores").exists()
    evaluate.main(["models=run,other", "checkpoints=true", *QUICK])
    assert files(Path("scores")) == ["score_over_steps.png"] and len(load_scores(Path("other/scores"))) == 3
    generated.clear()
    with pytest.raises(InputError, match=r"scores of run and embedded do not compare: labels: 0..1 in turn and 0..9"):
        evaluate.main(["models=run,embedded", "checkpoints=true", *QUICK])
    with pytest.raises(InputError, match=r"run and embedded do not compare: vae_sha256: \w+ and \w+\.$"):
        evaluate.main(["models=run,embedded", "class_labels=0,1", *QUICK])
    with pytest.raises(InputError, match="models=./run and run would share the scores in compared/run"):
        evaluate.main(["models=run,./run", "output_dir=compared", *QUICK])
    assert generated == []


def test_what_is_no_run_is_scored_into_the_working_folder(run: Path) -> None:
    evaluate.main(["models=embedded", *QUICK, "class_labels=Sneaker,Bag", "guidance_scale=1.5", "sampler=dpmsolver++"])
    (record,) = load_scores(Path("scores/embedded"))
    protocol = record.score.protocol
    assert (record.step, record.images_seen) == (3000, None)
    assert (protocol.labels, protocol.guidance_scale) == ("7..8 in turn", 1.5)
    assert (protocol.sampler, protocol.sampler_settings["solver_order"]) == ("DPMSolverMultistepScheduler", 2)


def test_a_reference_of_ones_own_with_and_without_features(run: Path, image_folder: Path) -> None:
    Path("own.py").write_text(
        "import torch\nmaker = lambda: torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())\n"
    )
    shutil.copytree(image_folder, "held out")
    Path("held out/dog/12.png").unlink()
    data = [f"train_data_dir={image_folder}", f"validation_data_dir={Path('held out').resolve()}", "vae=None"]
    for stored in ("true", "false"):
        options = ["feature_extractor=own.py:maker", f"store_features={stored}", f"output_dir={stored}"]
        make_reference_statistics.main([*data, *options])
    report = json.loads(Path("true/reference_features.json").read_text())
    assert report["held_out"] is True and report["training_images"]["recall"] == 1.0, "all are among them"
    assert str(run.resolve().parent) not in report["command"] and "'validation_data_dir=held out'" in report["command"]
    assert "precision" not in json.loads(Path("false/reference_features.json").read_text())["training_images"]
    for more in ([], ["label_column=None"]):
        make_reference_statistics.main([*data, *more, "output_dir=named"])
        report = json.loads(Path("named/reference_features.json").read_text())
        assert report["training_images"]["class_agreement"] is None, "it knows neither cats nor dogs"
    options = ["models=run", "feature_extractor=own.py:maker", *FEW]
    evaluate.main([*options, "reference=true/reference_features.safetensors"])
    (record,) = load_scores(run / "scores")
    assert record.score.protocol.extractor == "own.py:maker" and len(record.score.values) == 5
    evaluate.main([*options, "reference=false/reference_features.safetensors", "metrics=frechet_distance"])
    assert len(load_scores(run / "scores")) == 2, "another reference, another protocol"
    # These features tell no classes, so there is no curve to draw and nothing to complain of.
    metrics = ["metrics=class_agreement,precision_recall", "checkpoints=true", "output_dir=classless"]
    evaluate.main([*options, "reference=true/reference_features.safetensors", *metrics])
    assert len(load_scores(Path("classless/run"))) == 3 and not list(Path("classless").rglob("*.png"))


def test_training_images_are_not_called_held_out(
    run: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path("own.py").write_text("maker = lambda: lambda images: images.mean(dim=(2, 3))\n")
    shutil.copytree(image_folder, "copy")
    read: list[str] = []
    batches = make_reference_statistics.all_batches

    def counted(*args: Any, description: str) -> Iterator[Any]:
        read.append(description)
        return batches(*args, description=description)

    monkeypatch.setattr(make_reference_statistics, "all_batches", counted)
    data = [f"train_data_dir={image_folder}", "validation_data_dir=copy", "feature_extractor=own.py:maker"]
    make_reference_statistics.main([*data, "vae=None"])
    report = json.loads(Path("reference/reference_features.json").read_text())
    assert report["held_out"] is False and report["images"] == 26
    assert "training_images" not in report and read == ["reference"]
    assert "Nothing is held out: the validation images are the training images again." in caplog.text


def test_what_a_stop_left_is_scored_when_asked_for(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(run / "checkpoint-5", run / "checkpoint-7")
    state = json.loads((run / "checkpoint-5" / "state.json").read_text())
    (run / "checkpoint-7" / "state.json").write_text(json.dumps({**state, "step": 7}))
    options = ["models=run", "checkpoints=true", *FEW, "metrics=frechet_distance"]
    evaluate.main(options)
    assert [each.step for each in load_scores(run / "scores")] == [5, 10, 12]
    assert "leaving out what a stop left (stop_checkpoints=true scores it): checkpoint-7" in caplog.text
    evaluate.main([*options, "stop_checkpoints=true"])
    assert [each.step for each in load_scores(run / "scores")] == [5, 7, 10, 12]


def test_a_pipeline_is_scored_with_its_own_weights_after_checkpoints(run: Path) -> None:
    evaluate.main(["models=run", "output_dir=alone", *QUICK])
    (alone,) = load_scores(Path("alone/run"))
    shutil.rmtree(run / "checkpoint-12")
    evaluate.main(["models=run", "checkpoints=true", *QUICK])
    assert [each.step for each in load_scores(run / "scores")] == [5, 10, 12]
    assert load_scores(run / "scores")[-1].score == alone.score


def test_the_checkpoints_of_some_steps_are_scored(run: Path, generated: list[int]) -> None:
    evaluate.main(["models=run", "steps=12,5", *QUICK])
    assert [each.step for each in load_scores(run / "scores")] == [5, 12] and generated == [8, 8]
    with pytest.raises(InputError, match=r"steps=6: run has none with weights=ema; it has 5, 10, 12\."):
        evaluate.main(["models=run", "steps=5,6", *QUICK])
    with pytest.raises(InputError, match=r"steps=5: embedded is a pipeline, which has no checkpoints\."):
        evaluate.main(["models=embedded", "steps=5", *QUICK])


def test_guidance_and_weights_are_swept(
    run: Path, generated: list[int], capsys: pytest.CaptureFixture[str], train: Callable[..., Path]
) -> None:
    evaluate.main(["models=run", "guidance_scales=1,2", "weights=ema,model", "steps=5,12", *QUICK])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:8]] == [
        f"run, step {step}{guidance}{weights}"
        for weights in ("", ", model")
        for guidance in ("", ", guidance 2")
        for step in (5, 12)
    ]
    assert lines[8].split()[:4] == ["model", "step", "weights", "guidance"]
    assert [line.split()[1:4] for line in lines[9:17:2]] == [
        ["5", weights, scale] for weights in ("ema", "model") for scale in ("1", "2")
    ]
    (protocol,) = (line for line in lines if line.startswith("Protocol: "))
    assert "steps, seed 0;" in protocol  # neither a guidance nor weights: they differ
    records = load_scores(run / "scores")
    assert len(generated) == 8 and len({each.score.values["frechet_distance"] for each in records}) == 8
    assert Image.open(run / "scores" / "score_over_guidance.png").width > 500
    assert not (run / "scores" / "score_over_ema.png").exists()
    tracks = train(Path("tracks").resolve(), "ema_tracks=0.05,0.1", "checkpointing_steps=6")
    generated.clear()
    evaluate.main([f"models={tracks}", "weights=ema:0.06,ema:0.1,ema:0.12", *FEW, "metrics=frechet_distance"])
    assert len(generated) == 3 and (tracks / "scores" / "score_over_ema.png").stat().st_size > 5000
    with pytest.raises(
        InputError, match="weights=ema:0.2: the snapshots of .*tracks make an EMA that differs by 47% "
    ):
        evaluate.main([f"models={tracks}", "weights=ema:0.1,ema:0.2", *FEW])
    with pytest.raises(InputError, match="Unknown weights 'averaged'"):
        evaluate.main(["models=run", "weights=ema,averaged", *QUICK])
    assert len(generated) == 3
    with pytest.raises(InputError, match=r"guidance_scales=0.5: must lie in \[1, 1000\]"):
        evaluate.main(["models=run", "guidance_scales=1,0.5", *QUICK])


@pytest.mark.parametrize("kind", ["png", "npz", "parquet"])
def test_images_on_the_disk_are_scored_as_what_made_them(
    run: Path,
    generated: list[int],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    fresh_accelerate: Callable[[], None],
) -> None:
    made = ["num_images=60", "num_inference_steps=2", "guidance_scale=1.5", "class_labels=Sneaker,Bag"]
    generate_samples.main([*made, "images_per_pass=20", "model=embedded", "output_dir=images", f"format={kind}"])
    metrics = "metrics=frechet_distance,kernel_distance,class_agreement"
    evaluate.main(["models=images", metrics, "batch_size=25"])
    (stored,) = load_scores(Path("scores/images"))
    assert generated == [] and "60 8-bit images of 32x32 (7..8 in turn), DDIM 2 steps, guidance 1.5" in (
        capsys.readouterr().out
    )
    evaluate.main(["models=embedded", metrics, *made, "batch_size=20"])
    (direct,) = load_scores(Path("scores/embedded"))
    for name, value in direct.score.values.items():
        assert stored.score.values[name] == pytest.approx(value, rel=0.01), name
    assert stored.score.weights_sha256 == direct.score.weights_sha256
    one, other = stored.score.protocol, direct.score.protocol
    assert protocol_differences(one, other) == ["pixels: 8 bit and float"]
    with pytest.raises(InputError, match=r"embedded and images do not compare: pixels: float and 8 bit\."):
        evaluate.main(["models=embedded,images", metrics, *made])
    (file,) = Path("scores/images").glob("*.json")
    before = file.stat().st_mtime_ns
    evaluate.main(["models=images", metrics])
    assert file.stat().st_mtime_ns == before, "not measured again"


def test_images_that_are_not_all_there_are_not_scored(run: Path, fresh_accelerate: Callable[[], None]) -> None:
    options = ["images_per_pass=4", "num_inference_steps=1", "model=embedded", "output_dir=images"]
    generate_samples.main([*options, "num_images=8"])
    (Path("images") / "0000005.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"images/0000005.png is missing or damaged .*generate_samples.py makes it"):
        evaluate.main(["models=images", *QUICK])
    manifest = Manifest.load(Path("images"))
    replace(manifest, complete=False).save(Path("images"))
    with pytest.raises(InputError, match=r"images of embedded are not complete \(8 are wanted\): resume"):
        evaluate.main(["models=images", *QUICK])
    generate_samples.main([*options, "num_images=3", "overwrite_output_dir=true"])
    with pytest.raises(InputError, match="num_images=3: precision_recall needs at least 4"):
        evaluate.main(["models=images", *QUICK])
    evaluate.main(["models=images", "num_images=3", "metrics=frechet_distance", "num_bootstrap=0"])
    (Path("images") / "generated.json").write_text("{}")
    with pytest.raises(InputError, match=r"generated.json is no manifest of this version"):
        evaluate.main(["models=images", *QUICK])


def test_sets_of_images_stand_apart_and_compare_only_where_their_protocols_agree(
    run: Path, generated: list[int], fresh_accelerate: Callable[[], None]
) -> None:
    made = ["images_per_pass=10", "num_inference_steps=1", "model=embedded", "num_images=10"]
    for folder, *options in (("a/x",), ("b", "seed=1")):
        generate_samples.main([*made, f"output_dir={folder}", *options])
    shutil.copytree("a/x", "a_x")
    with pytest.raises(InputError, match="models=a_x and a/x would share the scores in scores/a_x"):
        evaluate.main(["models=a/x,a_x", *QUICK])
    with pytest.raises(InputError, match="The scores of a_x and b do not compare: seed: 0 and 1"):
        evaluate.main(["models=a_x,b", "guidance_scales=1,2", *QUICK])
    with pytest.raises(InputError, match="The scores of run and a_x do not compare: .*pixels: float and 8 bit"):
        evaluate.main(["models=run,a_x", "guidance_scales=1,2", *QUICK])
    # Of sets alone all images are measured, whatever num_images is.
    evaluate.main(["models=a_x", "num_images=3", "metrics=precision_recall"])
    (record,) = load_scores(Path("scores/a_x"))
    assert generated == [] and record.score.protocol.num_images == 10


def test_scores_without_the_later_parts_of_a_protocol_are_read(run: Path, generated: list[int]) -> None:
    evaluate.main(["models=run", *QUICK])
    (path,) = (run / "scores").glob("*.json")
    document = json.loads(path.read_text())
    for name in ("dtype", "pixels"):
        del document["protocol"][name]
    path.write_text(json.dumps(document))
    evaluate.main(["models=run", *QUICK])
    assert generated == [8], "found under its old name, and not measured again"


def test_a_pipeline_that_does_not_tell_its_step_is_scored_without(run: Path) -> None:
    (run / "pipeline" / "speed_training.json").write_text("{}")
    (run / "checkpoint-12" / "state.json").write_text("{")
    evaluate.main(["models=run", *QUICK])
    (record,) = load_scores(run / "scores")
    assert (record.step, record.images_seen) == (None, None)


def test_checkpoints_can_be_scored_with_the_weights_as_trained(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = run / "checkpoint-10" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    evaluate.main(["models=run", "checkpoints=true", "weights=model", *QUICK])
    assert "Passing over a damaged checkpoint" in caplog.text and "checkpoint-10" in caplog.text
    records = load_scores(run / "scores")
    assert [(each.step, each.score.protocol.weights) for each in records] == [(5, "model"), (12, "model")]
    with pytest.raises(InputError, match="weights=model: embedded is a pipeline, which holds EMA weights"):
        evaluate.main(["models=embedded", "weights=model", *QUICK])
    with pytest.raises(InputError, match="no pipeline with weights=model; checkpoints=true scores"):
        evaluate.main(["models=run", "weights=model", *QUICK])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["models=[]"], "models is empty"),
        (["models=nowhere"], "Could not load .*'nowhere'"),
        (["num_images=3"], "num_images=3: precision_recall needs at least 4"),
        (["num_images=1", "metrics=frechet_distance"], "num_images=1: must lie in"),
        (["batch_size=0"], "batch_size=0: must lie in"),
        (["num_inference_steps=1001"], "num_inference_steps=1001: the model has 1000 timesteps"),
        (["guidance_scale=0.5"], "guidance_scale=0.5: must lie in"),
        (["guidance_interval=0.5"], r"guidance_interval=\[0.5\]: must be two numbers"),
        (["sampler=dimm"], "Unknown sampler 'dimm'. Did you mean 'ddim'"),
        (["metrics=kernel"], "Unknown metrics 'kernel'. Did you mean 'kernel_distance'"),
        (["weights=averaged"], "Unknown weights 'averaged'.*Allowed: ema, ema:0.05, model"),
        (["class_labels=horse"], "Unknown class label 'horse'"),
        (["reference=nowhere.safetensors"], "No reference statistics at 'nowhere.safetensors'"),
        (["reference=large.safetensors"], "is of 64x64 images, the pipeline makes 32x32"),
        (["reference=plain.safetensors"], "metrics=kernel_distance: the reference 'plain.safetensors' holds mean and"),
        (["reference=few.safetensors"], "images of the reference=3: precision_recall needs at least 4"),
        (["feature_extractor=own.py:means"], "reference=embedded: none is in features of own.py:means; make one"),
        (["feature_extractor=own.py:means", "reference=plain.safetensors"], "another feature extractor than 'own.py"),
        (["metrics=fid"], "feature_extractor=inception: torch_fidelity is not installed; run: pip install"),
        (["num_bootstrap=2", "num_images=7"], "num_images=7: precision_recall with num_bootstrap needs at least 8"),
        (["num_bootstrap=1"], "num_bootstrap=1: must be 0 or at least 2"),
        (["metrics=fidd"], "Unknown metrics 'fidd'. Did you mean 'fid'"),
        (["reference=nowhere.npz"], "reference=nowhere.npz: there is no such file"),
        (["reference=cut.npz"], "reference=cut.npz: cannot be read as npz"),
        (
            ["reference=flat.npz"],
            r"reference=flat.npz: arr_0 is \(4, 32, 32\) of uint8; expected \(N, H, H, 3\) of uint8",
        ),
        (["reference=narrow.npz"], r"reference=narrow.npz: mu is \(64,\); expected \(2048,\)"),
        (["reference=cut.safetensors"], "'cut.safetensors' holds no reference statistics"),
        (["feature_extractor=cut_classifier.safetensors"], "'cut_classifier.safetensors' holds no classifier"),
        (["feature_extractor=own.py:means", "reference=nameless.safetensors"], "makes 3 features, .* has 64"),
        (["output_dir=own.py"], "output_dir=own.py/run: .*own.py is a file"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_generated(
    options: list[str], message: str, run: Path, generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load_reference()
    statistics, features = shipped.statistics, shipped.features
    assert features is not None
    save_statistics(statistics, "large.safetensors", features=features, resolution=64)
    save_statistics(statistics, "plain.safetensors", resolution=32)
    save_statistics(replace(statistics, count=3), "few.safetensors", features=features[:3], resolution=32)
    save_statistics(replace(statistics, extractor_sha256=""), "nameless.safetensors", features=features)
    Path("own.py").write_text("means = lambda: lambda images: images.mean(dim=(2, 3))\n")
    np.savez("whole.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    for whole, cut in (
        (Path("whole.npz"), "cut.npz"),
        (Path("large.safetensors"), "cut.safetensors"),
        (EMBEDDED_CLASSIFIER, "cut_classifier.safetensors"),
    ):
        Path(cut).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    np.savez("flat.npz", arr_0=np.zeros((4, 32, 32), np.uint8))
    np.savez("narrow.npz", mu=np.zeros(64), sigma=np.eye(64))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of own.py
    before = sorted(Path().rglob("*"))
    chosen = {option.split("=")[0] for option in options}
    rest = [option for option in ["models=run", *FEW] if option.split("=")[0] not in chosen]
    with pytest.raises(InputError, match=message) as error:
        evaluate.main([*options, *rest])
    assert "\n" not in str(error.value)
    assert generated == [] and sorted(Path().rglob("*")) == before


def test_intervals_are_measured_once_and_shown(
    run: Path, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["models=run", *FEW, "metrics=frechet_distance,class_agreement"]
    evaluate.main(options)
    without = capsys.readouterr().out
    for _ in range(2):
        evaluate.main([*options, "num_bootstrap=3"])
    assert generated == [8, 8], "once without intervals, once with them"
    (record,) = load_scores(run / "scores")
    low, high = record.score.intervals["frechet_distance"]
    assert low < record.score.values["frechet_distance"] < high and list(record.score.intervals) == [
        "frechet_distance"
    ]
    shown = capsys.readouterr().out
    assert f"[{low:.4g}, {high:.4g}]" in shown and "[" not in without.splitlines()[1]
    evaluate.main([*options, "num_bootstrap=2"])
    assert load_scores(run / "scores") == [record] and generated == [8, 8], "more draws are as good"
    evaluate.main([*options, "num_bootstrap=20"])
    (again,) = load_scores(run / "scores")
    assert generated == [8, 8, 8] and again.score.interval_draws == {"frechet_distance": 20}
    assert again.score.intervals != record.score.intervals and again.score.values == record.score.values


def test_two_evaluations_at_once_lose_no_number(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is whole while the first one measures."""
    measure = evaluate.score_in_each

    def slowly(*args: Any, **options: Any) -> Any:
        scores = measure(*args, **options)
        monkeypatch.setattr(evaluate, "score_in_each", measure)
        evaluate.main(["models=run", *FEW, "metrics=kernel_distance"])
        return scores

    monkeypatch.setattr(evaluate, "score_in_each", slowly)
    evaluate.main(["models=run", *FEW, "metrics=frechet_distance"])
    (record,) = load_scores(run / "scores")
    assert set(record.score.values) == {"frechet_distance", "kernel_distance"}


def test_a_users_classifier_names_its_classes_and_needs_no_reference(run: Path) -> None:
    weights = Path("mine.safetensors")
    shutil.copyfile(EMBEDDED_CLASSIFIER, weights)
    options = ["models=embedded", *FEW, "metrics=class_agreement", f"feature_extractor={weights}"]

    def agreement(*more: str) -> float | None:
        evaluate.main([*options, *more])
        (record,) = load_scores(Path("scores/embedded"))
        shutil.rmtree("scores")
        return record.score.class_agreement

    unnamed = agreement()
    assert unnamed is not None and unnamed > 0.5, "by number"
    known = json.loads(EMBEDDED_CLASSIFIER.with_suffix(".json").read_text())
    weights.with_suffix(".json").write_text(json.dumps(known | {"classes": known["classes"][::-1]}))
    swapped = agreement()
    assert swapped is not None and swapped < 0.3, "by name"
    weights.with_suffix(".json").write_text(json.dumps(known | {"classes": known["classes"][::-1], "sha256": "0"}))
    assert agreement() == unnamed, "of other weights"
    weights.with_suffix(".json").write_text(json.dumps(known | {"classes": 3}))
    with pytest.raises(InputError, match=r"mine.json: classes is 3, but must be"):
        agreement()


def test_each_extractor_takes_the_npz_file_that_fits_it(run: Path) -> None:
    Path("own.py").write_text("maker = lambda: lambda images: images.mean(dim=(2, 3))\n")
    np.savez("statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez("images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    for references in ("statistics.npz,images.npz", "images.npz,statistics.npz"):
        evaluate.main(["models=run", *QUICK, "feature_extractor=own.py:maker", f"reference={references}"])
    (record,) = load_scores(run / "scores")
    assert record.score.protocol.reference == "images.npz"


def test_images_of_an_npz_file_are_a_reference_for_any_extractor(run: Path) -> None:
    Path("own.py").write_text(
        "import torch\nmaker = lambda: torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez("batch.npz", arr_0=pixels)
    evaluate.main(["models=run", *FEW, "feature_extractor=own.py:maker", "reference=embedded,batch.npz"])
    (record,) = load_scores(run / "scores")
    protocol = record.score.protocol
    assert (protocol.reference, protocol.num_reference_images, protocol.measures) == ("batch.npz", 20, {})
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    features = torch.nn.functional.avg_pool2d(images, 16).flatten(1)
    own = load_npz_reference("batch.npz", load_extractor("own.py:maker"), needs_features=True)
    assert own.features is not None and torch.equal(own.features, features) and own.resolution == 32
    with pytest.raises(InputError, match="is of 32x32 images, the pipeline makes 64x64"):
        check_measurable(ScoreSettings(extractor=load_extractor("own.py:maker"), reference=own), 64)
