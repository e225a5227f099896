"""Files: whole or not at all, with everybody's usual rights, hashed whatever their order, and refused before work."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from speed_diffusers.errors import InputError
from speed_diffusers.files import (
    check_output_file,
    check_writable,
    file_sha256,
    give_usual_mode,
    naming_disk_errors,
    remove_unfinished,
    save_tensors,
    sync,
    tensors_sha256,
    write_text,
    written_whole,
)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of this process, as the test's parameter says."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "inside.txt").write_text(text)


def content(path: Path) -> str:
    return (path / "inside.txt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_what_is_written_appears_when_it_is_complete(tmp_path: Path, make: object) -> None:
    path = tmp_path / "result"
    for text in ("old", "new"):
        with written_whole(path) as temporary:
            make(temporary, text)  # type: ignore[operator]
            assert temporary.parent == tmp_path and not path.exists() if text == "old" else content(path) == "old"
        assert content(path) == text
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_exception_leaves_nothing_behind_and_nothing_changed(
    tmp_path: Path, make: object, before: str | None
) -> None:
    path = tmp_path / "result"
    if before is not None:
        make(path, before)  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        make(temporary, "half")  # type: ignore[operator]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == ([] if before is None else [path])
    assert before is None or content(path) == before


def test_an_exception_before_anything_was_written_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "result"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(tmp_path: Path, make: object) -> None:
    target, path = tmp_path / "target", tmp_path / "result"
    make(target, "somebody else's")  # type: ignore[operator]
    path.symlink_to(target)
    with written_whole(path) as temporary:
        make(temporary, "mine")  # type: ignore[operator]
    assert not path.is_symlink() and content(path) == "mine" and content(target) == "somebody else's"


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "result", "old")
    with pytest.raises(IsADirectoryError, match="result"):
        write_text(tmp_path / "result", "new")
    assert content(tmp_path / "result") == "old" and len(list(tmp_path.iterdir())) == 1


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "été\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9t\xc3\xa9\n"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], indirect=True)
def test_tensors_are_readable_by_whom_other_new_files_are(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "tensors.safetensors"
    save_tensors({"a": torch.arange(6).reshape(2, 3).T}, path, {"made": "here"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert torch.equal(load_file(path)["a"], torch.arange(6).reshape(2, 3).T)
    (tmp_path / "deep").mkdir()
    deep = tmp_path / "deep" / "model.safetensors"
    deep.write_bytes(path.read_bytes())
    deep.chmod(0o600)
    give_usual_mode(tmp_path)
    assert stat.S_IMODE(deep.stat().st_mode) == 0o666 & ~umask
    assert sorted(tmp_path.iterdir()) == [tmp_path / "deep", path]


def test_the_hash_of_tensors_knows_no_order_but_everything_else() -> None:
    a, b = torch.arange(6.0), torch.ones(2, 3)
    digest = tensors_sha256({"a": a, "b": b})
    assert digest == tensors_sha256({"b": b, "a": a}) == tensors_sha256({"a": a.clone(), "b": b.T.contiguous().T})
    others = [
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {"a": a, "b": b.reshape(3, 2)},
        {"a": a, "b": b.double()},
        {"a": a.bfloat16(), "b": b},
        {"a": a.flip(0), "b": b},
    ]
    digests = {digest, tensors_sha256({"a": a, "b": b}, b"header"), *map(tensors_sha256, others)}
    assert len(digests) == 2 + len(others)


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == file_sha256(str(tmp_path / "file")) == hashlib.sha256(b"abc").hexdigest()


def test_an_output_file_is_checked_and_not_made(tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "folder" / "picture.png"
    assert check_output_file("output", str(wanted), ".png") == wanted
    assert check_output_file("trace", tmp_path / "a.json.gz", ".json", ".json.gz") == tmp_path / "a.json.gz"
    assert list(tmp_path.iterdir()) == []


def test_an_output_file_that_cannot_be_one_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for path, suffixes, message in (
        (tmp_path / "a.jpg", (".png",), f"output={tmp_path}/a.jpg: must be a file that ends in .png."),
        (
            tmp_path / "a",
            (".json", ".json.gz"),
            f"output={tmp_path}/a: must be a file that ends in .json or .json.gz.",
        ),
        (tmp_path / "folder.png", (".png",), f"output={tmp_path}/folder.png: must be a file that ends in .png."),
        (tmp_path / "file" / "a.png", (".png",), f"output={tmp_path}/file: {tmp_path}/file is a file."),
        (Path("/proc/none/a.png"), (".png",), "output=/proc/none: /proc is not writable (No such file or directory)."),
    ):
        with pytest.raises(InputError) as caught:
            check_output_file("output", path, *suffixes)
        assert str(caught.value) == message
    with pytest.raises(InputError, match=r"^output_dir=/proc/none: /proc is not writable \("):
        check_writable("output_dir", Path("/proc/none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_knows_no_sync_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, "not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    check_writable("output_dir", tmp_path)
    sync(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_disk_that_refuses_a_part_of_a_save_is_found_before_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match=rf"^output_dir={tmp_path}: {tmp_path} is not writable \(Input/output error"):
        check_writable("output_dir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["Python's", "that of safetensors"],
)
def test_a_full_disk_names_the_path_and_the_bytes(tmp_path: Path, error: Exception) -> None:
    message = rf"Could not write {tmp_path}/a/file: No space left on device \(1,234 bytes needed, [\d,]+ free\)$"
    with pytest.raises(OSError, match=message) as caught, naming_disk_errors(tmp_path / "a" / "file", 1234):
        raise error
    assert caught.value.errno == errno.ENOSPC
    for other in (OSError(errno.ECONNREFUSED, "a tracker's server"), SafetensorError("invalid header")):
        with pytest.raises(type(other)) as passed, naming_disk_errors(tmp_path / "file"):
            raise other
        assert passed.value is other


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    leftovers = [".tmp-pipeline-123", ".tmp-samples.png-9"]
    others = [".tmp-pipeline-mine", ".tmp-other-123", "pipeline-123"]
    for name in leftovers + others:
        make_folder(tmp_path / name, "half")
    remove_unfinished(tmp_path, "pipeline", "*.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    # In a container the next process has the number of the killed one.
    make_folder(tmp_path / f".tmp-pipeline-{os.getpid()}", "half")
    with written_whole(tmp_path / "pipeline") as temporary:
        make_folder(temporary, "new")
    assert [path.name for path in (tmp_path / "pipeline").iterdir()] == ["inside.txt"]
    assert content(tmp_path / "pipeline") == "new"
