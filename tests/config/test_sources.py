"""Where settings come from: config files, base files, the command line, and which of them wins."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from config_settings import Settings, load, message
from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError


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


def test_without_any_source_the_dataclass_is_the_config():
    assert load() == Settings()


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


def test_a_broken_base_file_is_named(folders):
    (folders.script / "configs" / "base.yaml").write_text("learning_rate: slow")
    with pytest.raises(InputError) as caught:
        load_config(Settings, ["config=tiny"], folders.script)
    base = folders.script.resolve() / "configs" / "base.yaml"
    assert str(caught.value) == f"{base}: learning_rate: 'slow' is not a finite number"


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


def test_of_two_options_that_say_the_same_the_last_source_wins(tmp_path: Path) -> None:
    def lengths(*argv: str) -> tuple[int | None, int | None]:
        settings = load_config(Settings, argv, tmp_path)
        return settings.max_train_steps, settings.num_train_epochs

    (tmp_path / "steps.yaml").write_text("max_train_steps: 5")
    (tmp_path / "epochs.yaml").write_text("num_train_epochs: 3")
    steps, epochs = f"config={tmp_path / 'steps.yaml'}", f"config={tmp_path / 'epochs.yaml'}"
    assert lengths(steps, "num_train_epochs=2") == (5, 2), "the one that is looked at first"
    assert lengths(epochs, "max_train_steps=7") == (7, None)
    assert lengths(epochs, "max_train_steps=None") == (None, 3)
    assert lengths(epochs, "num_train_epochs=None", "max_train_steps=7") == (7, None)
    said = message("num_train_epochs=2", "max_train_steps=7")
    assert said == "num_train_epochs=2 and max_train_steps=7 say the same in two ways: give one of them."
    (tmp_path / "both.yaml").write_text("max_train_steps: 5\nnum_train_epochs: 3")
    with pytest.raises(InputError, match=r"both\.yaml: num_train_epochs=3 and max_train_steps=5 say the same"):
        lengths(f"config={tmp_path / 'both.yaml'}")
