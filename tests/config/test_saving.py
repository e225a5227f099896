"""What is saved loads to an equal instance, whatever it holds."""

from dataclasses import asdict

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config_settings import Settings, load
from speed_diffusers.config.load import config_dict, load_config, save_config


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
texts = st.text(st.characters(codec=None, exclude_categories=[])).filter(
    lambda s: "${" not in s and s != "???" and "\0" not in s
)
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
