"""Folders as people have them: nothing is left out, misnumbered or misread without a word."""

import os
from pathlib import Path

import numpy as np
import pytest

from small_images import noise_image
from speed_diffusers.data import open_images
from speed_diffusers.data.listing import describe_images
from speed_diffusers.errors import InputError


def lay(root: Path, *names: str) -> Path:
    """Files at the given paths: images where the suffix says so, else text; folders where the name ends in "/"."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
        elif name.endswith((".png", ".jfif", ".jpe")):
            noise_image(4, 4, seed).save(root / name, "PNG" if name.endswith("png") else "JPEG")
        else:
            (root / name).write_text("x")
    return root


def names_of(root: Path, **options: str | None) -> list[str]:
    """Paths of the images that are read, below the folder."""
    source = open_images(train_data_dir=str(root), **options)
    return [os.path.relpath(source.dataset[row]["image"]["path"], root) for row in range(len(source))]


def test_names_of_systems_are_passed_over_and_names_of_people_are_not(tmp_path: Path) -> None:
    root = lay(
        tmp_path / "a",
        *("__background__/1.png", "cat/2.jfif", "cat/3.jpe", "cat/@eaDir/2.png", "@eaDir/4.png", "lost+found/"),
        *(
            "__MACOSX/cat/._2.png",
            ".thumbs/5.png",
            "cat/.6.png",
            "cat/notes.txt",
            "dog/7.png",
            "readme.md",
            "Makefile",
        ),
    )
    source = open_images(train_data_dir=str(root))
    assert source.label_names == ["__background__", "cat", "dog"]
    assert names_of(root) == ["__background__/1.png", "cat/2.jfif", "cat/3.jpe", "dog/7.png"]
    assert source.ignored == (
        "hidden or of a system: 6 (.thumbs, @eaDir, __MACOSX, ...)",
        "other files: 3 (no suffix 1, .md 1, .txt 1)",
    )
    assert describe_images(source) == "4 images, 3 classes (0 '__background__' to 2 'dog'), 1 to 2 images per class"


def test_links_are_followed_once(tmp_path: Path) -> None:
    lay(tmp_path, "far/more/1.png", "a/cat/2.png", "a/dog/3.png")
    root = tmp_path / "a"
    (root / "cat" / "linked").symlink_to(tmp_path / "far")
    (root / "elk").symlink_to(tmp_path / "far" / "more", target_is_directory=True)
    (root / "cat" / "around").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog" / "circle.png").symlink_to(root / "dog" / "circle.png")
    assert names_of(root) == ["cat/2.png", "cat/linked/more/1.png", "dog/3.png", "elk/1.png"]
    assert open_images(train_data_dir=str(root)).ignored == (
        "link to a folder around it: 1 (cat/around)",
        "link that leads nowhere: 2 (dog/circle.png, dog/gone.png)",
    )
    (root / "bee").symlink_to(tmp_path / "unplugged")
    with pytest.raises(InputError, match="'.*bee' is a link that leads nowhere"):
        open_images(train_data_dir=str(root))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = lay(tmp_path / "a", "cat/1.png", "dog/2.png"), os.scandir

    def locked(place: str) -> object:
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match="Cannot read the folder '.*dog': Permission denied"):
        open_images(train_data_dir=str(root))


def test_an_empty_class_keeps_its_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_images(train_data_dir=str(lay(tmp_path / "a", "cat/", "dog/1.png", "elk/2.png")))
    assert (source.label_names, source.labels.tolist()) == (["cat", "dog", "elk"], [1, 2])
    assert "1 of 3 classes in column 'label' have no image (0 'cat')" in caplog.text
    assert "0 to 1 images per class" in describe_images(source)


def test_a_folder_around_the_classes_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_images(train_data_dir=str(lay(tmp_path / "a", "images/cat/1.png", "images/dog/2.png")))
    assert "There is one class, 'images'" in caplog.text and str(tmp_path / "a" / "images") in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
@pytest.mark.parametrize("name", [b"cat/b\xff.png", b"c\xff\n/1.png"])
def test_names_that_are_no_text_are_shown_in_one_line(name: bytes, tmp_path: Path) -> None:
    root = lay(tmp_path / "a", "cat/1.png")
    place = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.link(root / "cat" / "1.png", place)
    with pytest.raises(InputError, match=r"1 name in the data is no UTF-8, the first is '.*\\xff.*rename") as caught:
        open_images(train_data_dir=str(root))
    assert str(caught.value).isprintable()
    os.unlink(place)
    os.rmdir(os.path.dirname(place)) if b"\n" in name else None
    Path(os.fsdecode(os.path.join(os.fsencode(root), b"\xfe.txt"))).write_text("x")
    assert all(line.isprintable() for line in open_images(train_data_dir=str(root)).ignored)


LABELS = {
    "None,NA,nan,null,None": (["NA", "None", "nan", "null"], [1, 0, 2, 3, 1]),
    "001,01,1,001,002": (["001", "002", "01", "1"], [0, 2, 3, 0, 1]),
    "0,2,1,10,0": ([str(label) for label in range(11)], [0, 2, 1, 10, 0]),
    "True,False,True,1.0,": None,
}


@pytest.mark.parametrize("written", LABELS)
def test_labels_in_a_csv_file_stay_as_they_are_written(written: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "[a]*", *(f"{row}.png" for row in range(5)))
    rows = [f"{row}.png,{label}" for row, label in enumerate(written.split(","))]
    (root / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))
    expected = LABELS[written]
    if expected is None:
        with pytest.raises(InputError, match="1 of 5 rows have no label in column 'kind', the first is row 4"):
            open_images(train_data_dir=str(root), label_column="kind")
        return
    source = open_images(train_data_dir=str(root), label_column="kind")
    assert (source.label_names, source.labels.tolist()) == expected
    np.testing.assert_array_equal(source.load(3, 4), np.array(noise_image(4, 4, 3)))


def test_a_metadata_file_that_is_about_something_else_is_passed_over(tmp_path: Path) -> None:
    for place, header in (("a", "key,value"), ("b", "file_name,text")):
        root = lay(tmp_path / place, "cat/1.png", "dog/2.png")
        (root / "metadata.csv").write_text(f"{header}\ncat/1.png,x\n")
        source = open_images(train_data_dir=str(root))
        assert source.label_names == ["cat", "dog"]
        column = "file_name" if place == "a" else "label"
        assert source.ignored == (f"metadata.csv: it has no column '{column}'",)
    flat = lay(tmp_path / "c", "1.png")
    (flat / "metadata.csv").write_text("key,value\n1,x\n")
    with pytest.raises(InputError, match="metadata.csv' has no column 'file_name'; columns: key, value"):
        open_images(train_data_dir=str(flat))


def test_a_metadata_file_without_rows_is_told(tmp_path: Path) -> None:
    root = lay(tmp_path / "a", "1.png")
    (root / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(InputError, match="no rows"):
        open_images(train_data_dir=str(root))
    (root / "metadata.csv").write_text("")
    with pytest.raises(InputError, match="Cannot read '.*metadata.csv'"):
        open_images(train_data_dir=str(root))


def test_rows_and_images_that_do_not_meet_are_counted(tmp_path: Path) -> None:
    root = lay(tmp_path / "a", "train/1.png", "train/2.png", "test/3.png")
    (root / "metadata.jsonl").write_text(
        '{"file_name": "test/3.png", "label": "NA"}\n{"file_name": "train/2.png", "label": "None"}\n'
    )
    source = open_images(train_data_dir=str(root))
    assert (names_of(root), source.label_names) == (["train/2.png"], ["None"])
    assert source.ignored == ("split 'test': 1 image", "not named in metadata.jsonl: 1 image")
    assert open_images(train_data_dir=str(root), split="test").label_names == ["NA"]
    for name, message in {
        "train/9.png": "names 1 file that is not there",
        "../1.png": "file names are relative",
    }.items():
        (root / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "label": "a"}}\n')
        with pytest.raises(InputError, match=message):
            open_images(train_data_dir=str(root))
