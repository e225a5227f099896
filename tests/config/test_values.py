"""Text to values: types, lists, none, references, from the command line and from YAML."""

import re

import pytest

from config_settings import Settings, load, load_yaml, message, yaml_message
from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train_batch_size=1_000", 1000),
        ("max_train_steps=None", None),
        ("max_train_steps=null", None),
        ("max_train_steps=7", 7),
        ("learning_rate=1e-4", 1e-4),
        ("learning_rate=3", 3.0),
        ("push_to_hub=None", None),
        *((f"use_ema={word}", True) for word in ("true", "True", "YES", "1")),
        *((f"use_ema={word}", False) for word in ("false", "False", "nO", "0")),
        ("mixed_precision=no", "no"),
        ("output_dir=1e3", "1e3"),
        ("output_dir=007", "007"),
        ("output_dir=none", "none"),
        ("output_dir={a: 1} # b", "{a: 1} # b"),
        ("output_dir=[a,b]", "[a,b]"),
        ("model=None", None),
        ("model=null", None),
        ("sampling=none", "none"),
        ("patch_size=4", 4),
        ("trackers=wandb", ["wandb"]),
    ],
)
def test_text_becomes_the_type_of_the_field(word, value):
    key = word.partition("=")[0]
    loaded = getattr(load(word), key)
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("class_ids=207", [207]),
        ("class_ids=207,360", [207, 360]),
        ("class_ids=[207, 360]", [207, 360]),
        ("class_ids=[]", []),
        ("class_ids=[ ]", []),
        ("class_ids=", []),
        ("class_ids=None", []),
        ("class_labels=null", []),
        ("class_labels=Sneaker,Dress", ["Sneaker", "Dress"]),
        ("class_labels=T-shirt/top, Ankle boot", ["T-shirt/top", "Ankle boot"]),
        ('class_labels=["tench, Tinca tinca",207]', ["tench, Tinca tinca", "207"]),
        ("class_labels=['a, b' , \"it's\", c]", ["a, b", "it's", "c"]),
        ('class_labels="a, b",c', ["a, b", "c"]),
        ("class_labels=jack-o'-lantern,'tis", ["jack-o'-lantern", "'tis"]),
        ("class_labels=None,no", ["None", "no"]),  # a list has no place for none: just a label
        ("betas=[0.9,1e-1]", [0.9, 0.1]),
        ("crops=None", None),
        ("crops=1", [1]),
    ],
)
def test_lists(word, value):
    key = word.partition("=")[0]
    assert getattr(load(word), key) == value


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("train_batch_size=lots", "train_batch_size: 'lots' is not a whole number"),
        ("train_batch_size=1.5", "train_batch_size: '1.5' is not a whole number"),
        ("train_batch_size=1e3", "train_batch_size: '1e3' is not a whole number"),
        ("train_batch_size=true", "train_batch_size: 'true' is not a whole number"),
        ("max_train_steps=none", "max_train_steps: 'none' is not a whole number or None"),
        ("learning_rate=fast", "learning_rate: 'fast' is not a finite number"),
        ("learning_rate=nan", "learning_rate: 'nan' is not a finite number"),
        ("learning_rate=-inf", "learning_rate: '-inf' is not a finite number"),
        ("guidance_scale=1e999", "guidance_scale: '1e999' is not a finite number or None"),
        ("use_ema=2", "use_ema: '2' is not true or false"),
        ("use_ema=on", "use_ema: 'on' is not true or false"),
        ("class_ids=[1,x]", "class_ids: 'x' is not a whole number"),
        ("class_ids=1,,2", "class_ids: one of its items is empty"),
        ("class_ids=1,", "class_ids: one of its items is empty"),
        ("class_labels=[a,b", "class_labels: '[a,b' lacks one of its brackets"),
        ("betas=0.9,inf", "betas: 'inf' is not a finite number"),
        ("patch_size=None", "patch_size: 'None' means no value, but patch_size must be a whole number"),
        ("output_dir=null", "output_dir: 'null' means no value, but output_dir must be text"),
        ("sampling=papr", "Unknown sampling 'papr'. Did you mean 'paper'? Allowed: none, paper, uniform."),
        ("patch_size=3", "Unknown patch_size '3'. Allowed: 2, 4, 8."),
        ("trackers=wandb,wandbb", "Unknown trackers 'wandbb'. Did you mean 'wandb'? Allowed: tensorboard, wandb."),
    ],
)  # fmt: skip
def test_errors_of_values(word, error):
    assert message(word) == error


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a/${output_dir}", "${", "???"])
@pytest.mark.parametrize("key", ["output_dir", "model", "class_labels"])
def test_references_to_other_values_are_refused(key, text, tmp_path):
    error = f"{key}: '{text}' refers to another value, which is not supported; write the value"
    assert message(f"{key}={text}") == error
    assert yaml_message(f"{key}: '{text}'", tmp_path) == error


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("~/x", "{home}/x"),
        ("~", None),
        ("~nobody-of-this-name/x", None),
        ("./~x", "./~x"),
        ("a/~/x", "a/~/x"),
        ("x~", "x~"),
    ],
)
def test_a_path_may_begin_with_the_home_folder(text, value, tmp_path, monkeypatch):
    home = tmp_path / "someone"
    monkeypatch.setenv("HOME", str(home))
    for read in (load, lambda word: load_yaml(word.replace("=", ": ", 1), tmp_path)):
        for word, key in ((f"cache_dir={text}", "cache_dir"), (f"runs=[{text},plain]", "runs")):
            if value is None:
                with pytest.raises(InputError, match=rf"{key}: .*home"):
                    read(word)
            else:
                path = value.format(home=home)
                assert getattr(read(word), key) == (path if key == "cache_dir" else [path, "plain"])
    # Text that is no path stays as it is.
    assert load(f"output_dir={text}").output_dir == text


@pytest.mark.parametrize("key", ["output_dir", "cache_dir", "class_labels"])
def test_a_nul_is_refused_before_anything_is_opened(key, tmp_path):
    error = f"{key}: 'a\\x00b' holds a NUL, which no path, name or label can"
    assert message(f"{key}=a\0b") == error
    assert yaml_message(f'{key}: "a\\0b"', tmp_path) == error


# YAML


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("output_dir: 1e3", {"output_dir": "1e3"}),
        ("output_dir: 2026-01-01", {"output_dir": "2026-01-01"}),
        ("learning-rate: 1e-3  # hyphens too", {"learning_rate": 1e-3}),
        ("output_dir: ~", {"output_dir": "~"}),
        ("model:", {}),
        ("model: None", {}),
        ("model: null", {}),
        ('model: "null"', {"model": "null"}),
        ('model: ""', {"model": ""}),
        ("use_ema: Yes", {"use_ema": True}),
        ("class_ids: [1, 2]", {"class_ids": [1, 2]}),
        ("class_ids:\n- 1\n- 2", {"class_ids": [1, 2]}),
        ("class_ids: 1,2", {"class_ids": [1, 2]}),
        ("class_ids: 1", {"class_ids": [1]}),
        ("class_ids: []", {"class_ids": []}),
        ("class_ids:", {}),
        ('class_labels: ["tench, Tinca tinca", no]', {"class_labels": ["tench, Tinca tinca", "no"]}),
        ('class_labels: [null, "", 1e3]', {"class_labels": ["null", "", "1e3"]}),
        ('class_labels: "tench, Tinca tinca"', {"class_labels": ["tench, Tinca tinca"]}),
        ("class_labels:\n- été\n- a # b", {"class_labels": ["été", "a"]}),
    ],
)  # fmt: skip
def test_yaml_scalars_stay_text_until_the_field_says_what_they_are(text, changes, tmp_path):
    assert load_yaml(text, tmp_path) == Settings(**changes)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("use_ema: 1\n\nuse_ema: 1", "use_ema is given twice, the second time on line 3"),
        ("use_ema: 1\nuse-ema: 1", "use_ema is given twice, the second time on line 2"),
        ("train_batch_size: many", "train_batch_size: 'many' is not a whole number"),
        ("train_batch_size: [1]", "train_batch_size: takes one value, not a list; it must be a whole number"),
        ("train_batch_size:", "train_batch_size: '' means no value, but train_batch_size must be a whole number"),
        ("class_ids: [1, [2]]", "class_ids on line 1 must be one value or a flat list"),
        ("optimizer:\n  learning_rate: 1", "optimizer on line 1 must be one value or a flat list"),
        ("class_ids: [1, '']", "class_ids: '' is not a whole number"),
        ("class_labels:\n-\n- a", "class_labels: one of its items is empty"),
        ("learning_rate=1", "must hold lines of the form 'key: value'"),
        ("- a", "must hold lines of the form 'key: value'"),
        ("sampling: unifrom", "Unknown sampling 'unifrom'. Did you mean 'uniform'? Allowed: none, paper, uniform."),
    ],
)
def test_errors_of_a_yaml_file_name_it(text, error, tmp_path):
    assert yaml_message(text, tmp_path) == error


def test_an_unknown_key_in_yaml_names_the_nearest(tmp_path):
    for key in ("lerning_rate", "lerning-rate"):
        error = yaml_message(f"{key}: 1", tmp_path)
        assert error.startswith("Unknown config key 'lerning_rate'. Did you mean 'learning_rate'? Allowed: betas, ")
    assert yaml_message("config: tiny", tmp_path).startswith("Unknown config key 'config'.")


@pytest.mark.parametrize("content", [b"a: [1", b"a: b: c", b"\xff\xfe\xfa", b"a: 1\n---\nb: 2", b"a: *x", b"\ta: 1"])
def test_broken_yaml_is_one_line_with_the_file(content, tmp_path):
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(tmp_path / 'broken.yaml'))}: cannot be read: .+"
    ) as caught:
        load_config(Settings, [f"config={tmp_path / 'broken'}"], tmp_path)
    assert "\n" not in str(caught.value)


def test_yaml_tags_build_no_objects(tmp_path):
    assert load_yaml("output_dir: !!python/name:os.system x", tmp_path).output_dir == "x"
