"""Configs of a pipeline or run whose values are of wrong types, cut short or no JSON: one line with file and key."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from speed_diffusers.assets import EMBEDDED_PIPELINE
from speed_diffusers.errors import InputError
from speed_diffusers.generation.pretrained import (
    load_pipeline,
    load_transformer,
    load_vae,
    prediction_type_of,
    training_config_of,
)
from speed_diffusers.json_files import check_values
from speed_diffusers.train_scripts.plan import PlanConfig, open_scheduler, training_cost
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import make_model
from speed_diffusers.training.run_folder import LABEL_NAMES_FILE, load_label_names, load_run_config

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
TRANSFORMER, VAE, SIDECAR = "transformer/config.json", "vae/config.json", "speed_training.json"
READERS: dict[str, list[Callable[[str], object]]] = {
    INDEX: [load_pipeline],
    SCHEDULER: [load_pipeline, prediction_type_of, open_scheduler],
    TRANSFORMER: [load_transformer],
    VAE: [load_vae, lambda name: training_cost(PlanConfig(pretrained_vae_model_name_or_path=name))],
    SIDECAR: [training_config_of],
}
NO_OBJECT = ["", '{"a": 1', "[]", "3", "null", "\xff\xfe", "[" * 100_000]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The embedded pipeline with configs of its own."""
    folder = tmp_path / "pipeline"
    for path in EMBEDDED_PIPELINE.rglob("*"):
        copy = folder / path.relative_to(EMBEDDED_PIPELINE)
        if path.suffix == ".json":
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for path in EMBEDDED_PIPELINE.rglob("*.safetensors"):
        (folder / path.relative_to(EMBEDDED_PIPELINE)).symlink_to(path)
    return folder


def refusals(file: Path, text: str, readers: list[Callable[[str], object]], folder: Path) -> Iterator[str]:
    """What the readers say of a file with this text; each must refuse it in one line that names the file."""
    before = file.read_bytes()
    file.write_text(text, encoding="latin-1")
    for read in readers:
        with pytest.raises(InputError) as caught:
            read(str(folder))
        assert "\n" not in str(caught.value) and str(file) in str(caught.value), text[:80]
        assert len(str(caught.value)) < 1000
        yield str(caught.value)
    file.write_bytes(before)


@pytest.mark.parametrize("name", READERS)
def test_a_config_that_is_no_object(name: str, pipeline: Path) -> None:
    whole = (pipeline / name).read_text()
    for text in (*NO_OBJECT, whole[: len(whole) // 2]):
        assert list(refusals(pipeline / name, text, READERS[name], pipeline))


@pytest.mark.parametrize("name", [SCHEDULER, TRANSFORMER, VAE])
def test_a_value_of_another_type_names_file_and_key(name: str, pipeline: Path) -> None:
    values = json.loads((pipeline / name).read_text())
    for key, value in values.items():
        if key == "_diffusers_version" or (key.startswith("_") and name != SCHEDULER):
            continue
        for wrong in (
            {"a": 1},
            [[]] if not isinstance(value, list) else "text",
            "4" if not isinstance(value, str) else 4,
        ):
            text = json.dumps({**values, key: wrong})
            readers = READERS[name] if key in ("latent_channels", "block_out_channels") else READERS[name][:1]
            assert all(f": {key} is " in line for line in refusals(pipeline / name, text, readers, pipeline))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (INDEX, {"id2label": ["a"]}, 'id2label is ["a"], but must be an object or null'),
        (INDEX, {"id2label": {"0": 7}}, 'id2label is {"0": 7}, but must be an object or null'),
        (INDEX, {"id2label": {"zero": "a"}}, "id2label has 'zero', but its keys must be rows of the label table"),
        (INDEX, {"null_class_id": "10"}, 'null_class_id is "10", but must be a whole number or null'),
        (INDEX, {"scheduler": None}, "scheduler is null, but must be a list"),
        (INDEX, {"vae": "AutoencoderKL"}, 'vae is "AutoencoderKL", but must be a list'),
        (TRANSFORMER, {"num_attention_heads": None}, "num_attention_heads is null, but must be a whole number"),
        (VAE, {"block_out_channels": None}, "block_out_channels is null, but must be a list"),
        (SIDECAR, {"training_config": "x"}, 'training_config is "x", but must be an object'),
        (SIDECAR, {"training_config": {"max_train_steps": "9"}}, 'max_train_steps is "9", but must be a whole number'),
        (SIDECAR, {"training_config": {"class_dropout_prob": []}}, "class_dropout_prob is [], but must be a number"),
    ],
)
def test_what_is_wrong_with_one_key(name: str, change: dict[str, Any], message: str, pipeline: Path) -> None:
    text = json.dumps({**json.loads((pipeline / name).read_text()), **change})
    assert all(message in line for line in refusals(pipeline / name, text, READERS[name][:1], pipeline))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (INDEX, {"scheduler": ["diffusers", "NoSuchScheduler"]}),
        (SCHEDULER, {"num_train_timesteps": -5}),
        (TRANSFORMER, {"num_attention_heads": 0}),
        (TRANSFORMER, {"norm_type": "no_norm"}),
        (VAE, {"block_out_channels": []}),
        (VAE, {"down_block_types": ["NoBlock"]}),
    ],
)
def test_values_that_fit_nothing_are_one_line(name: str, change: dict[str, Any], pipeline: Path) -> None:
    (pipeline / name).write_text(json.dumps({**json.loads((pipeline / name).read_text()), **change}))
    for read in READERS[name] if "block_out_channels" in change else READERS[name][:1]:
        with pytest.raises(InputError) as caught:
            read(str(pipeline))
        assert "\n" not in str(caught.value)


def test_null_where_the_class_allows_it_or_has_a_default_of_it_is_no_damage(pipeline: Path) -> None:
    path = pipeline / VAE
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift_factor": None}))
    load_vae(str(pipeline))


def test_a_transformer_without_out_channels_has_those_that_come_in(pipeline: Path) -> None:
    path = pipeline / TRANSFORMER
    path.write_text(json.dumps({**json.loads(path.read_text()), "out_channels": None}))
    assert load_transformer(str(pipeline)).config["out_channels"] == 4
    options = {"resolution": 32, "prediction_type": "v_prediction", "pretrained_model_name_or_path": str(pipeline)}
    core = make_model(TrainConfig(**options), 10, load_vae("embedded"))  # type: ignore[arg-type]
    assert core.transformer.config["out_channels"] == 4


def test_the_files_of_a_run(tmp_path: Path) -> None:
    config, labels = tmp_path / "config.yaml", tmp_path / LABEL_NAMES_FILE
    for path in (config, labels):
        path.write_text("{}")
    for text in ("a: b: c", "- a", "seed: [1]", "seed: {a: 1}", "seed: many", "speed_k: .nan", "[" * 600):
        list(refusals(config, text, [lambda name: load_run_config(Path(name))], tmp_path))
    for text in ("", '["a"', "{}", "[1]", '"cat"', "[" * 100_000, "\xff"):
        list(refusals(labels, text, [lambda name: load_label_names(Path(name))], tmp_path))
    labels.write_text('["cat"]')
    assert load_label_names(tmp_path) == ["cat"]


def test_a_long_value_is_cut() -> None:
    with pytest.raises(InputError) as caught:
        check_values(Path("x.json"), {"shift": ["a"] * 500}, {"shift": float})
    assert len(str(caught.value)) < 150 and str(caught.value).endswith("..., but must be a number.")
