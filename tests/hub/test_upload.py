"""Uploads with the real client: what arrives, what is sent again after trouble, and what is refused in one line."""

import logging
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from loopback_hub import PART_SIZE, Fault, LoopbackHub, StoredFile
from speed_diffusers.errors import InputError
from speed_diffusers.hub import Destination, check_destination, upload

CARD = "---\nlicense: mit\n---\n\n# A release\n"
WEIGHTS = {
    "transformer/diffusion_pytorch_model.safetensors": bytes(range(256)) * (PART_SIZE // 100),
    "vae/diffusion_pytorch_model.safetensors": b"weights of the autoencoder",
}
FILES = {
    "README.md": CARD.encode(),
    "model_index.json": b"{}",
    "samples.png": b"\x89PNG\0\0",
    "transformer/config.json": b"{}",
    **WEIGHTS,
}
HERE = Destination("alice/tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release of small files and one that is uploaded in parts, with other files beside them."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("not for others")
    (tmp_path / "transformer" / "optimizer.safetensors").write_bytes(b"not for others")
    (tmp_path / ".env").write_text("HF_TOKEN=hf_write")
    return tmp_path


def released(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    """What is on the Hub besides the file of its own first commit."""
    files = hub.repositories["alice/tiny"].files(revision)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_only_what_is_allowed_arrives_in_one_commit_and_comes_back(hub: LoopbackHub, folder: Path) -> None:
    assert check_destination(HERE) == HERE
    assert check_destination(Destination("tiny", revision="v1")) == Destination("alice/tiny", revision="v1")
    url = upload(folder, Destination("tiny", private=True), message="First")
    assert released(hub) == FILES
    repository = hub.repositories["alice/tiny"]
    assert repository.private and repository.messages == ["initial", "First"]
    assert url == f"{hub.url}/alice/tiny/commit/{repository.branches['main']}"
    assert hub.times_asked("PUT", "/storage/[0-9a-f]+/[0-9]+$") == 3, "the large file comes in parts"
    copy = Path(snapshot_download("alice/tiny"))
    assert {name: (copy / name).read_bytes() for name in FILES} == FILES


def test_xet_stores_large_files_where_it_is_installed(
    hub: LoopbackHub, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_folder = tmp_path_factory.mktemp("xet")
    for message in ("First", "Same again"):
        upload(folder, HERE, message=message)
    assert released(hub) == FILES and hub.repositories["alice/tiny"].messages == ["initial", "First"]
    assert hub.times_asked("GET", "xet-write-token") and not hub.times_asked("PUT", "/storage")


def test_a_second_release_replaces_the_first_and_spares_what_is_not_its_own(hub: LoopbackHub, folder: Path) -> None:
    repository = hub.create("alice/tiny")
    shard = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    old = {shard: StoredFile(b"old", True), "my_notes.md": StoredFile(b"mine", False)}
    repository.commit("main", {**repository.commits[repository.branches["main"]], **old}, "old")
    upload(folder, HERE, message="New")
    assert released(hub) == {**FILES, "my_notes.md": b"mine"}
    sent = hub.times_asked("PUT", "/storage")
    upload(folder, HERE, message="Same again")
    assert hub.times_asked("PUT", "/storage") == sent and repository.messages[-1] == "New"


def test_another_branch_is_made_and_the_first_left_alone(hub: LoopbackHub, folder: Path) -> None:
    for _ in range(2):
        upload(folder, Destination("alice/tiny", revision="v1/rc"), message="Candidate")
    assert released(hub, "v1/rc") == FILES and released(hub) == {}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/api/repos/create", times=2, status=503),
        Fault("POST", "/api/repos/create", when_done=True),
        Fault("POST", "/api/validate-yaml", status=502),
        Fault("POST", "/commit/", status=500),
        Fault("POST", "/commit/", status=429),
        Fault("POST", "/commit/", when_done=True),
    ],
    ids=lambda fault: f"{fault.path}{'-done' * fault.when_done}-{fault.status}",
)
def test_trouble_that_passes_costs_a_warning(
    fault: Fault, hub: LoopbackHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(fault)
    upload(folder, HERE, message="First")
    assert released(hub) == FILES and hub.faults == []
    assert hub.repositories["alice/tiny"].messages == ["initial", "First"], "once, though asked twice"
    (warning, *_) = [record.message for record in caplog.records if record.name == "speed_diffusers.hub.upload"]
    assert warning.startswith("hub_model_id=alice/tiny: the Hub ") and "Trying again in" in warning


def test_a_file_whose_connection_is_cut_is_sent_again_without_telling_its_signature(
    hub: LoopbackHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(Fault("PUT", "/storage/[0-9a-f]+/1$", after_bytes=PART_SIZE // 2))
    upload(folder, HERE, message="First")
    assert released(hub) == FILES
    assert [each.status for each in hub.asked if each.path.endswith("/1")] == [None, 200]
    assert "/storage/" in caplog.text and "Signature" not in caplog.text


def test_an_interrupted_upload_goes_on_where_it_stopped(hub: LoopbackHub, folder: Path) -> None:
    hub.faults.append(Fault("PUT", "/storage/[0-9a-f]+$", times=100, status=403, message="Request has expired"))
    with pytest.raises(InputError, match=r"^hub_model_id=alice/tiny: the token may not .*\(Request has expired\)\.$"):
        upload(folder, HERE, message="First")
    assert released(hub) == {}, "nothing half done can be seen"
    hub.faults.clear()
    parts = hub.times_asked("PUT", "/storage/[0-9a-f]+/")
    assert parts == 3
    upload(folder, HERE, message="First")
    assert released(hub) == FILES
    assert hub.times_asked("PUT", "/storage/[0-9a-f]+/") == parts, "what had arrived is not sent again"


REFUSED = {
    "no token": (
        {"HF_TOKEN": ""},
        HERE,
        "there is no token: set HF_TOKEN, or log in with `hf auth login`",
    ),
    "unknown": ({"HF_TOKEN": "hf_secret"}, HERE, "the Hub does not know the token: set HF_TOKEN"),
    "read-only": (
        {"HF_TOKEN": "hf_read"},
        HERE,
        "the token of alice is read-only: make one that may write",
    ),
    "no name": ({}, Destination("alice/tiny/2"), "'alice/tiny/2' is no name of the Hub, which are OWNER"),
    "not yours": ({"HF_TOKEN": "hf_other"}, HERE, r"the token may not do this to alice/tiny \(You don't"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_before_anything_is_sent(
    case: str, hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, destination, message = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^hub_model_id={destination.repo_id}: {message}") as error:
        check_destination(destination)
        upload(folder, destination, message="First")
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)
    assert hub.repositories == {} and hub.blobs == {}


def test_a_card_that_the_hub_refuses_is_one_line(hub: LoopbackHub, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace("mit", "mine"))
    with pytest.raises(
        InputError, match=r'the Hub answers 400 Bad Request \("license" must be one of \[apache'
    ) as error:
        upload(folder, HERE, message="First")
    assert "\n" not in str(error.value) and hub.repositories == {} and hub.blobs == {}


def test_trouble_that_does_not_pass_is_one_line(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(Fault("POST", "/api/repos/create", times=100, status=503, message="Over capacity"))
    with pytest.raises(ConnectionError, match=r"the Hub answers 503 Service Unavailable \(Over capacity\)\.$"):
        upload(folder, HERE, message="First")
    assert hub.times_asked("POST", "/api/repos/create") == 3
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match=rf"the Hub cannot be reached at http://127.0.0.1:{port} \(.*refused"):
        check_destination(HERE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        check_destination(HERE)
    assert "hf_write" not in caplog.text


def test_the_token_of_a_login_is_taken(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text("hf_write\n")
    with caplog.at_level(logging.DEBUG):
        check_destination(HERE)
        upload(folder, HERE, message="First")
    assert released(hub) == FILES
    assert "hf_write" not in caplog.text
    assert not any(b"hf_write" in content for content in hub.repositories["alice/tiny"].files().values())
