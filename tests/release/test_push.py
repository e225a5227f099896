"""From a training to the Hub and back: released, generated from, fine-tuned from, and what goes wrong in one line."""

import logging
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_api

from loopback_hub import Fault, LoopbackHub, StoredFile
from speed_diffusers.assets import EMBEDDED_PIPELINE
from speed_diffusers.errors import InputError
from speed_diffusers.generation.pretrained import load_pipeline, load_transformer, load_vae, training_config_of
from speed_diffusers.train_scripts import push_to_hub, sample

PUSHED = ["push_to_hub=true", "hub_model_id=alice/tiny"]
FEW = ["num_inference_steps=2", "num_images_per_class=1"]


def everything_kept(hub: LoopbackHub, folder: Path, text: str) -> bytes:
    """All that a secret could have got into: files here, files there, what was printed."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return (
        b"".join([*files, *(content for each in hub.repositories.values() for content in each.files().values())])
        + text.encode()
    )


def test_a_training_releases_its_result_which_is_loaded_and_fine_tuned(
    hub: LoopbackHub,
    train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level(logging.DEBUG):
        run = train(tmp_path / "run", *PUSHED, "hub_private_repo=true", "hub_revision=v1", "hub_license=mit")
    repository = hub.repositories["alice/tiny"]
    assert repository.private and f"/commit/{repository.branches['v1']}" in capsys.readouterr().out
    assert not list(run.glob(".tmp-*")) and (run / "pipeline").is_dir()
    card = ModelCard(repository.files("v1")["README.md"].decode())
    assert card.data.license == "mit" and "| images | images of one's own, 26 images, 2 classes" in card.text
    assert "train_data_dir=path/to/images" in card.text
    assert b"hf_write" not in everything_kept(hub, run, caplog.text)

    options = ["model=alice/tiny", "revision=v1", *FEW]
    sample.main([*options, f"output={tmp_path / 'hub.png'}"])
    sample.main([f"model={run}", *FEW, f"output={tmp_path / 'here.png'}"])
    assert training_config_of("alice/tiny", revision="v1")["max_train_steps"] == 12
    loaded, trained = (load_transformer(name, revision="v1").state_dict() for name in ("alice/tiny", str(run)))
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)

    base = ["pretrained_model_name_or_path=alice/tiny", "revision=v1"]
    tuned = train(tmp_path / "tuned", *base, "max_train_steps=1", *PUSHED[:1], "hub_model_id=tuned")
    card = ModelCard(hub.repositories["alice/tuned"].files()["README.md"].decode())
    assert card.data.base_model == "alice/tiny" and "from [alice/tiny]" in card.text
    assert "revision=v1" in card.text and (tuned / "pipeline").is_dir()

    with monkeypatch.context() as without_network:
        without_network.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load_pipeline("alice/tiny", revision="v1").transformer.config.num_layers == 6


def test_no_failure_of_a_release_ends_a_training(
    hub: LoopbackHub, train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults += [
        Fault("GET", "/api/whoami-v2", times=3, status=503),
        Fault("POST", "/api/repos/create", times=3, status=502),
    ]
    run = train(tmp_path / "my run", *PUSHED, "max_train_steps=2", "hub_license=mit")
    ours = [record.message for record in caplog.records if record.name.startswith("speed_diffusers")]
    lines = [message for message in ours if "Trying again" not in message]
    assert "the Hub answers 503" in lines[0] and "tried again at the end" in lines[0]
    assert lines[1].startswith("Not pushed to the Hub: hub_model_id=alice/tiny: the Hub answers 502 Bad Gateway")
    assert (run / "pipeline" / "model_index.json").is_file() and not list(run.glob(".tmp-*"))
    assert hub.faults == [] and hub.repositories == {}
    python, script, *options = shlex.split(lines[1].partition("Once that is mended: ")[2])
    assert (python, script) == ("python", "train_scripts/push_to_hub.py")
    push_to_hub.main(options)
    assert "license: mit" in hub.repositories["alice/tiny"].files()["README.md"].decode()


@pytest.mark.parametrize(
    ("token", "options", "message"),
    [
        ("", PUSHED, "hub_model_id=alice/tiny: there is no token: set HF_TOKEN"),
        ("hf_read", PUSHED, "hub_model_id=alice/tiny: the token of alice is read-only"),
        ("hf_write", ["push_to_hub=true"], "push_to_hub=true needs hub_model_id=OWNER/NAME"),
        ("hf_write", ["push_to_hub=true", "hub_model_id=a b"], "'a b' is no name of the Hub"),
    ],
)
def test_what_cannot_be_released_is_said_before_the_training(
    token: str,
    options: list[str],
    message: str,
    hub: LoopbackHub,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=re.escape(message)):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def models(hub: LoopbackHub) -> LoopbackHub:
    """The embedded model under three names: for all, for its owner, and for who has accepted its terms."""
    files = {
        path.relative_to(EMBEDDED_PIPELINE).as_posix(): StoredFile(path.read_bytes(), path.suffix == ".safetensors")
        for path in EMBEDDED_PIPELINE.rglob("*")
        if path.is_file()
    }
    for name in ("public", "private", "gated"):
        hub.create(f"alice/{name}", private=name == "private", gated=name == "gated").commit("main", files, "files")
    return hub


WRONG_NAMES = {
    "missing": (
        "hf_write",
        "model=alice/missing",
        "the Hub has no model alice/missing, or it is private and the",
    ),
    "missing, no token": ("", "model=alice/missing", r"or it is private and there is no token \(set HF_TOKEN, or log"),
    "private": (
        "hf_other",
        "model=alice/private",
        "the Hub has no model alice/private, or it is private and the",
    ),
    "gated": ("hf_other", "model=alice/gated", r"alice/gated is gated: accept its terms at http.*/alice/gated\.$"),
    "gated, no token": ("", "model=alice/gated", "alice/gated is gated: accept its terms at .*, and set HF_TOKEN, or"),
    "unknown token": ("hf_secret", "model=alice/public", "the Hub does not know the token: set HF_TOKEN, or log in"),
    "revision": ("hf_write", "model=alice/public revision=mian", "Unknown revision of .* 'mian'. Did you mean 'main'"),
    "no name": ("hf_write", "model=runs/quickstart/typo", "'runs/quickstart/typo' is no name of the Hub, which are"),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_a_model_that_cannot_be_had_is_one_line(
    case: str, models: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, options, message = WRONG_NAMES[case]
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message) as error:
        sample.main([*options.split(), *FEW, f"output={tmp_path / 'samples.png'}"])
    assert str(error.value).startswith("Could not load the pipeline") and "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value) and not (tmp_path / "samples.png").exists()
    with pytest.raises(InputError, match=message):
        load_vae(options.split()[0].removeprefix("model="), revision="mian" if case == "revision" else None)


def test_trouble_in_loading_is_one_line_and_a_model_that_is_there_needs_no_network(
    models: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.faults.append(Fault("GET", "/", times=1000, status=503, message="Over capacity"))
    models.faults.append(Fault("HEAD", "/", times=1000, status=503))
    with pytest.raises(
        InputError, match=r"it is not in the cache, and the Hub answers 503 Service Unavailable \(Over capacity\)"
    ):
        load_pipeline("alice/public")
    models.faults.clear()
    images = load_pipeline("alice/public")("Sneaker", num_inference_steps=1, output_type="np").images
    assert np.isfinite(images).all()
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    template = f"{closed}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", closed)
    assert load_pipeline("alice/public").labels["Sneaker"] == 7
    with pytest.raises(
        InputError, match=rf"it is not in the cache, and the Hub cannot be reached at {closed} \(.*refused\)\.$"
    ):
        load_pipeline("alice/private")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the Hub must not be asked \(HF_HUB_OFFLINE is set\)"):
        load_pipeline("alice/private")
