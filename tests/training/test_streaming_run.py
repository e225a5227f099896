"""Training from a stream of parquet shards: stopped, resumed, on one process and on two."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

from forked import Forker, run_options
from run_outputs import assert_same_run, final_tensors, metrics
from small_images import image_rows
from speed_diffusers.errors import InputError
from speed_diffusers.training.checkpoints import read_state


@pytest.fixture
def stream_options(tmp_path: Path) -> list[str]:
    """Options for 27 images in four files, of which one cannot be read."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    images = image_rows(27, size=32)
    images[20]["bytes"] = b"no image"
    (tmp_path / "shards").mkdir()
    for number in range(4):
        rows = range(number * 7, min(number * 7 + 7, 27))
        columns = {"image": [images[row] for row in rows], "label": [row % 2 for row in rows]}
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(tmp_path / "shards" / f"train-{number}.parquet", batch_size=3)
    options = [f"train_data_dir={tmp_path / 'shards'}", "streaming=true", "cache_latents=false"]
    return [*options, "shuffle_buffer_size=8", "max_bad_images=0.1", "random_flip=true"]


def bad_images(folder: Path) -> list[int]:
    return [json.loads(line)["row"] for line in (folder / "bad_images.jsonl").read_text().splitlines()]


def test_a_streamed_run_resumes_exactly_whatever_decodes(
    train: Callable[..., Path], stream_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole", *stream_options)
    assert "27 images, 2 classes (0 'cat' to 1 'dog'), streamed from 4 parquet files" in capsys.readouterr().out
    assert not list((tmp_path / "whole").glob("**/*.arrow"))
    broken = shutil.copytree(whole, tmp_path / "broken")
    for name in ("checkpoint-10", "checkpoint-12", "pipeline"):
        shutil.rmtree(broken / name)
    train(broken, *stream_options, "resume_from_checkpoint=latest", "dataloader_num_workers=1")
    assert_same_run(whole, broken, 12)
    assert bad_images(whole) == bad_images(broken) == [20]
    assert read_state(whole / "checkpoint-12")["data_signature"].startswith("stream 1:")

    # A file that was replaced by another is noticed.
    file = tmp_path / "shards" / "train-1.parquet"
    file.write_bytes((tmp_path / "shards" / "train-2.parquet").read_bytes())
    shutil.rmtree(broken / "checkpoint-12")
    with pytest.raises(InputError, match="data signature"):
        train(broken, *stream_options, "resume_from_checkpoint=latest")


def test_two_processes_stream_as_one_does_and_one_resumes_them(
    forker: Forker, train: Callable[..., Path], tiny_options: list[str], stream_options: list[str], tmp_path: Path
) -> None:
    one = train(tmp_path / "one", *stream_options)
    command = run_options(tiny_options, tmp_path / "two", *stream_options, "train_batch_size=2")
    assert "2 per device x 2 process(es) x 1 accumulated" in forker.run(tmp_path / "output", command, size=2)
    assert bad_images(tmp_path / "two") == [20]
    for name in ("checkpoint-10", "checkpoint-12", "pipeline"):
        shutil.rmtree(tmp_path / "two" / name)
    train(tmp_path / "two", *stream_options, "train_batch_size=1", "resume_from_checkpoint=latest")
    assert read_state(tmp_path / "two" / "checkpoint-12")["global_batch"] == 4
    first, second = (final_tensors(folder, 12) for folder in (one, tmp_path / "two"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)
    assert [line["step"] for line in metrics(one)] == [line["step"] for line in metrics(tmp_path / "two")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["streaming=true"], r"^streaming=true encodes images as they come: it needs cache_latents=false\.$"),
        (["shuffle_buffer_size=7"], r"^shuffle_buffer_size=7: only streaming=true knows it\.$"),
        (["streaming=true", "cache_latents=false"], "Folders of images are read in place.*leave streaming out"),
        (["streaming=true", "cache_latents=false", "shuffle_buffer_size=0"], "shuffle_buffer_size.*1"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    train: Callable[..., Path], tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
