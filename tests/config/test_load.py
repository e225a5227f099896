"""Settings from YAML files and the command line."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_diffusers.config.load import config_dict, load_config, save_config
from speed_diffusers.config.schema import help_text
from speed_diffusers.errors import InputError


@dataclass(frozen=True)
class Settings:
    """One field of every type that a setting can have."""

    train_batch_size: int = field(default=8, metadata={"help": "Images per device and micro-step."})
    max_train_steps: int | None = None
    learning_rate: float = 1e-4
    guidance_scale: float | None = None
    use_ema: bool = False
    push_to_hub: bool | None = None
    output_dir: str = "runs/tiny"
    mixed_precision: str = "no"
    model: str | None = None
    class_ids: list[int] = field(default_factory=list)
    class_labels: list[str] = field(default_factory=lambda: ["cat", "dog"])
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    crops: list[int] | None = None
    sampling: str = field(
        default="paper", metadata={"help": "How steps are drawn.", "choices": ("paper", "uniform", "none")}
    )
    patch_size: int = field(default=2, metadata={"choices": lambda: [2, 4, 8]})
    trackers: list[str] = field(default_factory=list, metadata={"choices": ("tensorboard", "wandb")})

    def __post_init__(self) -> None:
        if self.train_batch_size < 1:
            raise InputError(f"train_batch_size: {self.train_batch_size} is below 1")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A script's folder with configs, and the working folder, which is another."""
    texts = {
        "script/configs/base.yaml": "train_batch_size: 1\nlearning_rate: 1\noutput_dir: outer",
        "script/configs/tiny.yaml": "use_ema: true",
        "script/configs/imagenet/base.yaml": "learning_rate: 2\noutput_dir: inner",
        "script/configs/imagenet/dit_s2.yaml": "output_dir: file",
        "script/beside.yaml": "model: beside",
        "work/own.yaml": "model: own",
        "work/tiny.yaml": "model: working folder",
        "work/team/base.yaml": "guidance_scale: 3",
        "work/team/run.yaml": "model: team",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "work")
    return SimpleNamespace(script=tmp_path / "script", work=tmp_path / "work")


def load(*argv: str) -> Settings:
    """Settings from a command line alone."""
    return load_config(Settings, argv, Path("no folder"))


def load_yaml(text: str, folder: Path) -> Settings:
    """Settings from the text of a YAML file alone."""
    path = folder / "given.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Settings, [f"config={path}"], folder)


def message(*argv: str) -> str:
    """The one-line error that a command line gives."""
    with pytest.raises(InputError) as caught:
        load(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_message(text: str, folder: Path) -> str:
    """The one-line error that a YAML file gives, without the file's name, which must lead."""
    with pytest.raises(InputError) as caught:
        load_yaml(text, folder)
    where, _, rest = str(caught.value).partition(": ")
    assert where == str(folder / "given.yaml") and "\n" not in rest
    return rest


def test_without_any_source_the_dataclass_is_the_config():
    assert load() == Settings()


# Sources and their order


def test_every_base_file_down_to_the_config_applies_and_the_last_source_wins(folders):
    config = load_config(Settings, ["config=imagenet/dit_s2", "train_batch_size=9"], folders.script)
    assert (config.train_batch_size, config.learning_rate, config.output_dir) == (9, 2.0, "file")
    assert load_config(Settings, ["config=imagenet/dit_s2"], folders.script).train_batch_size == 1
    assert load_config(Settings, ["config=imagenet/base"], folders.script).output_dir == "inner"
    assert load_config(Settings, ["config=tiny"], folders.script).output_dir == "outer"


def test_a_file_outside_configs_takes_only_the_base_file_beside_it(folders):
    assert load_config(Settings, ["config=own"], folders.script) == Settings(model="own")
    assert load_config(Settings, ["config=team/run"], folders.script) == Settings(model="team", guidance_scale=3.0)


@pytest.mark.parametrize("spelling", [["config=tiny"], ["--config", "tiny"], ["--config=tiny.yaml"]])
def test_config_is_spelled_like_any_key(folders, spelling):
    assert load_config(Settings, spelling, folders.script).use_ema


def test_names_are_looked_up_in_configs_then_beside_the_script_then_in_the_working_folder(folders):
    assert load_config(Settings, ["config=tiny"], folders.script).model is None
    assert load_config(Settings, ["config=./tiny"], folders.script).model == "working folder"
    assert load_config(Settings, ["config=beside"], folders.script).model == "beside"
    assert load_config(Settings, ["config=configs/tiny.yaml"], folders.script).use_ema
    assert load_config(Settings, ["config=own"], folders.script).model == "own"
    assert load_config(Settings, [f"config={folders.work / 'own'}"], folders.script).model == "own"


def test_the_default_config_is_read_when_none_is_named(folders):
    assert load_config(Settings, [], folders.script, default="tiny").use_ema
    assert not load_config(Settings, ["config=imagenet/dit_s2"], folders.script, default="tiny").use_ema
    assert load_config(Settings, ["config=None"], folders.script, default="tiny") == Settings()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("imagenet/dit_s", "imagenet/dit_s2"),
        ("dit_s2", "imagenet/dit_s2"),
        ("imagnet/dit_s2.yaml", "imagenet/dit_s2"),
        ("besides", "beside"),
        ("team/runs", "team/run"),
        ("./tinny", "./tiny"),
    ],
)
def test_a_missing_config_names_the_nearest_and_where_it_looked(folders, name, nearest):
    with pytest.raises(InputError, match=re.escape(f"Config '{name}' not found. Did you mean '{nearest}'?")) as caught:
        load_config(Settings, [f"config={name}"], folders.script)
    assert str(folders.work) in str(caught.value)
    assert (str(folders.script / "configs") in str(caught.value)) != name.startswith("./")
    assert "\n" not in str(caught.value)


def test_a_missing_absolute_path_is_looked_for_in_its_folder_only(folders):
    name = folders.work / "won.yaml"
    with pytest.raises(InputError) as caught:
        load_config(Settings, [f"config={name}"], folders.script)
    nearest = folders.work / "own"
    assert str(caught.value) == f"Config '{name}' not found. Did you mean '{nearest}'? Looked in {folders.work}."


def test_a_missing_config_where_there_is_none_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message("config=tiny").startswith("Config 'tiny' not found. Looked in ")


def test_a_folder_is_not_a_config(folders):
    with pytest.raises(InputError, match="Config 'imagenet' not found"):
        load_config(Settings, ["config=imagenet"], folders.script)


# The command line


@pytest.mark.parametrize(
    "argv",
    [
        ["train_batch_size=4", "use_ema=true"],
        ["--train_batch_size", "4", "--use_ema"],
        ["--train-batch-size=4", "--use-ema"],
        ["--use-ema", "train-batch-size=4"],
        ["--use_ema", "YES", "--train-batch-size", "4"],
        ["--use_ema", "--train_batch_size=4"],
    ],
)
def test_all_spellings_of_the_command_line_mean_the_same(argv):
    assert load(*argv) == Settings(train_batch_size=4, use_ema=True)


def test_values_may_hold_equals_signs_hyphens_and_a_sign():
    assert load("model=b=c").model == "b=c"
    assert load("--model", "b=c").model == "b=c"
    assert load("--model=--b").model == "--b"
    assert load("--guidance_scale", "-1").guidance_scale == -1.0
    assert load("guidance_scale=-.5").guidance_scale == -0.5
    assert load("--class_ids", "-1,2").class_ids == [-1, 2]
    assert load("--output_dir", "-").output_dir == "-"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--output_dir"], "output_dir: a value is missing; write output_dir=VALUE"),
        (["--output_dir", "--use_ema"], "output_dir: a value is missing; write output_dir=VALUE"),
        (["--output-dir", "train-batch-size=3"], "output_dir: a value is missing; write output_dir=VALUE"),
        (["output_dir="], "output_dir: a value is missing; write output_dir=VALUE"),
        (["config="], "config: a value is missing; write config=VALUE"),
        (["--train_batch_size"], "train_batch_size: a value is missing; write train_batch_size=VALUE"),
        (["--use_ema", "maybe"], "use_ema: 'maybe' is not true or false"),
        (["use_ema=1", "use_ema=0"], "use_ema: given twice, as '1' and as '0'"),
        (["--use-ema", "use_ema=false"], "use_ema: given twice, as 'true' and as 'false'"),
        (["config=a", "--config", "b"], "config: given twice, as 'a' and as 'b'"),
        (["stray"], "'stray' is not a setting: write key=value (no spaces around =) or --key value"),
        (["use_ema=1", "="], "'=' is not a setting: write key=value (no spaces around =) or --key value"),
        (["-1"], "'-1' is not a setting: write key=value (no spaces around =) or --key value"),
        (["--"], "'--' is not a setting: write key=value (no spaces around =) or --key value"),
        (["train_batch_size=0"], "train_batch_size: 0 is below 1"),
    ],
)
def test_errors_of_the_command_line(argv, error):
    assert message(*argv) == error


@pytest.mark.parametrize("word", ["lerning_rate=1", "--lerning-rate=1", "--lerning_rate", "-lerning-rate=1"])
def test_an_unknown_key_names_the_nearest(word):
    error = message(word)
    assert re.match(r"Unknown config key '_?lerning_rate'. Did you mean 'learning_rate'\? Allowed: betas, ", error)


def test_a_misspelled_config_names_config():
    assert "Did you mean 'config'?" in message("--confg", "tiny")


def test_a_bare_flag_does_not_swallow_a_misspelled_setting():
    assert message("--use_ema", "lerning_rate=1").startswith("Unknown config key 'lerning_rate'")


# Types


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
        ("class_ids=None", "class_ids: 'None' means no value, but class_ids must be a list of whole numbers"),
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


def test_a_broken_base_file_is_named(folders):
    (folders.script / "configs" / "base.yaml").write_text("learning_rate: slow")
    with pytest.raises(InputError) as caught:
        load_config(Settings, ["config=tiny"], folders.script)
    base = folders.script.resolve() / "configs" / "base.yaml"
    assert str(caught.value) == f"{base}: learning_rate: 'slow' is not a finite number"


# Saving


def test_a_saved_config_loads_to_an_equal_one(tmp_path):
    config = load(
        'class_labels=["tench, Tinca tinca",no,None,1e3,[x],été]',
        *("mixed_precision=no", "output_dir=1e3", "learning_rate=1e-05", "guidance_scale=-0.0", "crops=[]"),
        *("push_to_hub=no", "max_train_steps=None", "--use_ema", "trackers=wandb"),
    )
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    save_config(config, path)
    assert load_config(Settings, [f"config={path}"], tmp_path) == config
    assert list(yaml.safe_load(path.read_text("utf-8"))) == list(config_dict(config)) == list(asdict(Settings()))
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


# Any text but what is refused on the way in; undecodable bytes of a command line arrive as surrogates.
texts = st.text(st.characters(codec=None, exclude_categories=[])).filter(lambda s: "${" not in s and s != "???")
finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(
    st.builds(
        Settings,
        train_batch_size=st.integers(min_value=1),
        max_train_steps=st.none() | st.integers(),
        learning_rate=finite,
        guidance_scale=st.none() | finite,
        use_ema=st.booleans(),
        push_to_hub=st.none() | st.booleans(),
        output_dir=texts
        | st.sampled_from(["None", "null", "", "~", "no", "- a", "a: b", "[a", " a ", "a\nb", "\x85", "\u2028\ufeff"]),
        model=st.none() | texts | st.sampled_from(["None", "null", ""]),
        class_ids=st.lists(st.integers()),
        class_labels=st.lists(texts | st.sampled_from(["None", "null", "", "a, b"])),
        betas=st.lists(finite),
        crops=st.none() | st.lists(st.integers()),
    )
)
def test_any_config_survives_saving_and_loading(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_config(config, path)
    assert load_config(Settings, [f"config={path}"], path.parent) == config


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    path = tmp_path / "config.yaml"
    path.mkdir()
    with pytest.raises(OSError, match="config.yaml"):
        save_config(Settings(), path)
    assert list(tmp_path.iterdir()) == [path]


# Help and schemas


def test_help_lists_every_setting_with_type_default_and_meaning():
    text = help_text(Settings, "Trains.\n\n    python train.py\n")
    assert text.startswith("Trains.\n\n    python train.py\n\nSettings: key=value")
    assert "  config: a YAML file" in text
    for key in asdict(Settings()):
        assert f"\n  {key}: " in text
    assert "train_batch_size: a whole number, default 8\n      Images per device and micro-step.\n" in text
    assert "class_ids: a list of whole numbers, default []" in text
    assert "crops: a list of whole numbers or None, default None" in text
    assert "sampling: text, default paper\n      How steps are drawn. One of paper, uniform, none.\n" in text
    assert "patch_size: a whole number, default 2\n      One of 2, 4, 8." in text
    assert help_text(Settings, None).startswith("Settings: ")


def test_a_default_shown_in_help_can_be_typed():
    lines = re.findall(r"^  (\w+): .*, default (.*)$", help_text(Settings, None), flags=re.M)
    assert load(*(f"{key}={value}" for key, value in lines)) == Settings()


def test_a_schema_that_cannot_be_settings_is_a_programming_error():
    @dataclass
    class Nested:
        optimizer: dict[str, float] = field(default_factory=dict)

    @dataclass
    class Reserved:
        config: str = "a"

    for schema in (Nested, Reserved):
        with pytest.raises(TypeError, match="cannot be a setting"):
            load_config(schema, [], Path())
