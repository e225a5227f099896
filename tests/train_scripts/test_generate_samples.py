"""Many images: the same bytes however they are made, in files that others read, and no harm from a stop or damage."""

import csv
import errno
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from diffusers import DDIMScheduler
from filelock import FileLock
from PIL import Image

from forked import Forker
from pipeline_parts import pipeline_of, transformer
from speed_diffusers.errors import InputError
from speed_diffusers.generation import generate
from speed_diffusers.generation.image_files import png_name, read_images
from speed_diffusers.generation.image_set import Manifest
from speed_diffusers.generation.samplers import SAMPLERS
from speed_diffusers.locks import LOCK_FILE
from speed_diffusers.train_scripts import generate_samples
from tiny_run import file_size_limit

# Eleven images in passes of four: three passes, of which the last one computes an image that nobody asked for.
FEW = ["num_images=11", "images_per_pass=4", "num_inference_steps=3"]


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerate: Callable[[], None]) -> None:
    """Each test sets accelerate up for itself."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with random weights that generates 4x4 images, of classes 0 to 9."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    names = {row: f"class {row}" for row in range(10)}
    pipeline_of(transformer(rows=10), DDIMScheduler(clip_sample=False), id2label=names).save_pretrained(folder)
    return folder


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Generates into a folder, which it returns: `make(name, *options)`; options replace the usual ones."""

    def made(name: str, *options: str) -> Path:
        given = {option.split("=")[0] for option in options}
        usual = [option for option in [f"model={model}", *FEW] if option.split("=")[0] not in given]
        generate_samples.main([*usual, *options, f"output_dir={tmp_path / name}"])
        return tmp_path / name

    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of all files of a folder but its manifest, which tells how it was made."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "generated.json"}


def pixels(folder: Path) -> np.ndarray:
    """The PNG images of a folder."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First images of the passes that are computed."""
    firsts: list[int] = []

    def counting(pipeline: Any, rows: Any, settings: Any, *, first_image: int) -> Iterator[Any]:
        firsts.append(first_image)
        return generate(pipeline, rows, settings, first_image=first_image)

    monkeypatch.setattr(generate_samples, "generate", counting)
    return firsts


@pytest.mark.parametrize("sampler", [None, "ddpm", "euler_ancestral"])
def test_any_batch_size_gives_the_same_bytes(make: Callable[..., Path], sampler: str | None) -> None:
    options = ["guidance_scale=2", f"sampler={sampler}"]
    first = contents(make("7", "batch_size=7", *options))
    assert sorted(first) == [*(png_name(number) for number in range(11)), "metadata.csv"]
    assert contents(make("32", "batch_size=32", *options)) == first
    assert contents(make("1", "batch_size=1", *options)) == first
    assert len(set(first.values())) == 12, "all images differ"


def test_two_processes_that_are_killed_at_half_and_one_that_goes_on_give_the_same_bytes(
    forker: Forker, make: Callable[..., Path], model: Path, tmp_path: Path, passes: list[int]
) -> None:
    many = ["num_images=160", "images_per_pass=4", "num_inference_steps=10", "guidance_scale=1.5"]
    whole = contents(make("whole", *many, "batch_size=7"))
    options = [f"model={model}", *many, "batch_size=32", f"output_dir={tmp_path / 'killed'}"]
    processes = forker.start_ranks(tmp_path / "output", options, script="generate_samples")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("0*.png"))) < 40 and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in processes:
        process.send(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    there = {int(path.stem) for path in (tmp_path / "killed").glob("0*.png")}
    assert 40 <= len(there) < 160
    passes.clear()
    assert contents(make("killed", *many, "batch_size=5")) == whole
    assert passes == sorted({number // 4 * 4 for number in range(160) if number not in there})


def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(
    make: Callable[..., Path], passes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make("set")
    before = contents(folder)
    make("set")
    assert passes == [0, 4, 8]
    (folder / png_name(0)).unlink()
    whole = (folder / png_name(9)).read_bytes()
    for damage in (whole[:-20], b"", whole[:60] + b"\0" + whole[61:], before[png_name(0)][:40]):
        (folder / png_name(9)).write_bytes(damage)
        (folder / f".tmp-{png_name(3)}-77").write_bytes(b"left by a process that was killed")
        passes.clear()
        make("set")
        assert passes in ([0, 8], [8]) and contents(folder) == before
    Image.new("L", (4, 4)).save(folder / png_name(5))
    make("set")
    assert contents(folder) == before
    assert "Looking at what is there" in capfd.readouterr().err


def test_a_set_grows_and_its_first_images_stay(make: Callable[..., Path], passes: list[int]) -> None:
    small = contents(make("set", "num_images=6"))
    passes.clear()
    folder = make("set", "num_images=11")
    assert passes == [4, 8], "two images of the second pass were not asked for before"
    assert contents(folder) == contents(make("whole"))
    assert {name: data for name, data in contents(folder).items() if name in small and name != "metadata.csv"} == {
        name: data for name, data in small.items() if name != "metadata.csv"
    }


def test_labels_are_recorded_balanced_or_random(make: Callable[..., Path]) -> None:
    def labels(folder: Path) -> list[tuple[str, str]]:
        with (folder / "metadata.csv").open(newline="") as file:
            return [(row["label"], row["class_name"]) for row in csv.DictReader(file)]

    assert labels(make("turns", "class_labels=class 3,7")) == [("3", "class 3"), ("7", "class 7")] * 5 + [
        ("3", "class 3")
    ]
    random = labels(make("random", "labels=random", "num_images=40"))
    assert labels(make("fewer", "labels=random")) == random[:11], (
        "an image's class does not depend on how many there are"
    )
    assert 5 <= len(set(random)) <= 10 and random != sorted(random)
    assert labels(make("other", "labels=random", "seed=1")) != random[:11]


def test_the_three_formats_hold_the_same_images(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speed_diffusers.generation.image_files.IMAGES_PER_PARQUET", 8)
    monkeypatch.setattr("speed_diffusers.generation.image_files.IMAGES_PER_ROW_GROUP", 3)
    png = make("png")
    expected, labels = pixels(png), [number % 10 for number in range(11)]
    npz = make("npz", "format=npz")
    assert sorted(path.name for path in npz.iterdir()) == ["generated.json", "images.npz"]
    with np.load(npz / "images.npz") as arrays:  # as ADM's evaluator reads it
        assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"], expected)
        assert arrays["arr_1"].tolist() == labels
    parquet = make("parquet", "format=parquet")
    assert sorted(contents(parquet)) == ["images-00000-of-00002.parquet", "images-00001-of-00002.parquet"]
    read = datasets.load_dataset("parquet", data_files=str(parquet / "*.parquet"), split="train")
    assert read["label"] == labels and read.features["label"].names[3] == "class 3"
    assert np.array_equal(np.stack([np.asarray(image) for image in read["image"]]), expected)
    for folder in (png, npz, parquet):
        assert np.array_equal(np.concatenate(list(read_images(folder, Manifest.load(folder), 4))), expected)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_a_packed_set_is_packed_once_and_anew_where_it_is_damaged(
    make: Callable[..., Path], passes: list[int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate_samples, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            make("set", f"format={kind}")
    folder = make("set", f"format={kind}")
    assert passes == [0, 4, 8], "packing goes on from the images that are there"
    before = contents(folder)
    (folder / png_name(2)).write_bytes(b"left by a process that was killed while it tidied up")
    make("set", f"format={kind}")
    assert passes == [0, 4, 8] and contents(folder) == before
    (file,) = (path for path in folder.iterdir() if path.suffix == f".{kind}")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"missing or damaged .*; generate_samples.py makes it anew"):
        list(read_images(folder, Manifest.load(folder), 4))
    assert contents(make("set", f"format={kind}")) == before


@pytest.mark.usefixtures("capsys")  # whose files must not meet the limit
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(make: Callable[..., Path], tmp_path: Path) -> None:
    many = ["format=npz", "num_images=80"]
    whole = contents(make("whole", *many))
    # The images fit, the packed file does not.
    with (
        file_size_limit(3500),
        pytest.raises(OSError, match=r"Could not write .*images.npz: File too large \([\d,]+ bytes"),
    ):
        make("full", *many)
    names = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert names == [*(png_name(number) for number in range(80)), "generated.json"], "nothing is half-written"
    assert not Manifest.load(tmp_path / "full").complete
    assert contents(make("full", *many)) == whole


def test_a_folder_of_other_images_is_left_alone(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("set")
    before = contents(folder)
    for option, words in {
        "seed=1": "seed: 0 and 1",
        "guidance_scale=2": "guidance_scale: 1.0 and 2.0",
        "num_inference_steps=4": "num_inference_steps: 3 and 4",
        "sampler=ddpm": "scheduler: ",
        "labels=random": 'labels: "balanced" and "random"',
        "class_labels=1,2": r"class_rows: \[0, 1, 2",
        "images_per_pass=8": "images_per_pass: 4 and 8",
        "format=npz": "format: png and npz",
        "num_images=10": "num_images: 11 and 10",
        "model=embedded": "weights_sha256: ",
    }.items():
        with pytest.raises(InputError, match=f"set holds other images .*{words}") as error:
            make("set", option)
        assert "\n" not in str(error.value) and contents(folder) == before
    (folder / "mine.txt").write_text("kept")
    assert contents(make("set", "seed=1", "overwrite_output_dir=true")) != before
    assert (folder / "mine.txt").read_text() == "kept"
    other = tmp_path / "other"
    other.mkdir()
    (other / "0000001.png").write_bytes(b"mine")
    for option in ("seed=0", "overwrite_output_dir=true"):
        with pytest.raises(InputError, match="the folder holds other files; take an empty one"):
            make("other", option)
    assert contents(other) == {"0000001.png": b"mine"}
    (other / "0000001.png").rename(other / ".tmp-generated.json-7")
    assert contents(make("other")) == contents(make("another")), "a launch was killed before it wrote its manifest"
    (folder / "generated.json").write_text('{"format_version": 1}')
    with pytest.raises(InputError, match=r"generated.json is no manifest of this version .*overwrite_output_dir=true"):
        make("set")


def test_one_folder_is_one_launch_s(make: Callable[..., Path]) -> None:
    folder = make("set")
    with FileLock(folder / LOCK_FILE), pytest.raises(InputError, match="written by another process"):
        make("set", "num_images=20")
    make("set")
    assert not (folder / LOCK_FILE).exists()


def test_where_no_locks_are_images_are_made_with_a_warning(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = contents(make("locked"))

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert contents(make("unlocked")) == first
    assert "unlocked: no locks there" in caplog.text


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS])
def test_every_sampler_generates(make: Callable[..., Path], sampler: str) -> None:
    folder = make(sampler.replace("+", "p"), f"sampler={sampler}", "num_images=2", "images_per_pass=2")
    assert pixels(folder).shape == (2, 4, 4, 3)
    scheduler = json.loads((folder / "generated.json").read_text())["image_set"]["scheduler"]
    assert scheduler["_class_name"].lower().startswith(sampler.split("_")[0].replace("dpmsolver++", "dpmsolver"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model=nowhere", "Could not load .*'nowhere'"),
        ("num_images=0", "num_images=0: must lie in"),
        ("class_labels=class 11", "Unknown class label 'class 11'. Did you mean 'class 1'"),
        ("class_labels=12", "class_labels=12: the model has rows 0 to 10"),
        ("labels=drawn", "Unknown labels 'drawn'"),
        ("format=jpg", "Unknown format 'jpg'. Did you mean 'png'"),
        ("dtype=float8", "Unknown dtype 'float8'. Did you mean 'float32'"),
        ("sampler=dimm", "Unknown sampler 'dimm'. Did you mean 'ddim'"),
        ("num_inference_steps=1001", "num_inference_steps=1001: the model has 1000 timesteps"),
        ("guidance_channels=5", r"guidance_channels=5: must lie in \[1, 4\]"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    make: Callable[..., Path], wrong: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        make("set", wrong)
    assert "\n" not in str(error.value) and not (tmp_path / "set").exists()


def test_half_precision_is_for_the_network_alone_and_recorded(make: Callable[..., Path]) -> None:
    full, half = make("full"), make("half", "dtype=bfloat16")
    difference = np.abs(pixels(full).astype(int) - pixels(half))
    assert difference.max() > 0 and difference.mean() < 3
    assert Manifest.load(half).image_set.dtype == "bfloat16"
    assert Manifest.load(full).image_set.weights_sha256 == Manifest.load(half).image_set.weights_sha256
