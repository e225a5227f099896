"""What an image file becomes: the crop of DiT, every colour mode right, damaged files named."""

import errno
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw

from small_images import encoded, noise_image
from speed_diffusers.data import decode
from speed_diffusers.data.decode import load_image
from speed_diffusers.errors import InputError


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of guided-diffusion, which DiT uses, as published."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (50, 37), (37, 50), (64, 64), (100, 30), (9, 7), (1, 1)])
def test_center_crop_is_that_of_dit(size: tuple[int, int]) -> None:
    image = noise_image(*size)
    np.testing.assert_array_equal(load_image(image, 16), adm_center_crop(image, 16))


def test_image_of_the_right_size_comes_back_bit_for_bit() -> None:
    image = noise_image(16, 16)
    for center_crop in (True, False):
        result = load_image({"bytes": encoded(image), "path": None}, 16, center_crop)
        assert result.dtype == np.uint8
        assert result.flags.writeable
        np.testing.assert_array_equal(result, np.array(image))


def test_without_center_crop_the_whole_image_is_squeezed() -> None:
    image = Image.new("RGB", (40, 20), "red")
    ImageDraw.Draw(image).rectangle((0, 0, 9, 19), fill="blue")
    assert load_image(image, 16, center_crop=False)[8, 1].tolist() == [0, 0, 255]
    assert load_image(image, 16, center_crop=True)[8, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 20000)])
def test_absurd_aspect_ratio_costs_nothing(size: tuple[int, int]) -> None:
    started = time.perf_counter()
    for center_crop in (True, False):
        assert (load_image(Image.new("RGB", size, "green"), 256, center_crop) == [0, 128, 0]).all()
    assert time.perf_counter() - started < 2


GREY_60 = round(0.6 * 255)
MODES = {
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "LA opaque": (Image.new("LA", (4, 4), (77, 255)), (77, 77, 77)),
    "LA hidden": (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
    "P": (Image.new("RGB", (4, 4), (200, 10, 30)).quantize(4), (200, 10, 30)),
    "RGBA opaque": (Image.new("RGBA", (4, 4), (200, 10, 30, 255)), (200, 10, 30)),
    "RGBA hidden colour": (Image.new("RGBA", (4, 4), (200, 10, 30, 0)), (255, 255, 255)),
    "RGBA half": (Image.new("RGBA", (4, 4), (0, 0, 0, 102)), (GREY_60, GREY_60, GREY_60)),
    "CMYK": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (Image.new("RGB", (4, 4), (100, 100, 100)).convert("YCbCr"), (100, 100, 100)),
    "I;16": (Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)), (156, 156, 156)),
    "I, 8 bits": (Image.fromarray(np.full((4, 4), 200, dtype=np.int32)), (200, 200, 200)),
    "I, 16 bits": (Image.fromarray(np.full((4, 4), 40000, dtype=np.int32)), (156, 156, 156)),
    "I, 31 bits": (Image.fromarray(np.full((4, 4), 2**30, dtype=np.int32)), (127, 127, 127)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_right_rgb(mode: str) -> None:
    image, expected = MODES[mode]
    result = load_image(image, 4)
    assert result.shape == (4, 4, 3)
    np.testing.assert_allclose(result.astype(int), np.broadcast_to(expected, (4, 4, 3)), atol=1)


def test_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 10, 30])
    content = encoded(image, transparency=0)
    assert (load_image({"bytes": content, "path": None}, 4) == 255).all()


def test_sixteen_bit_grey_ramp_keeps_its_values() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = load_image({"bytes": encoded(Image.fromarray(ramp)), "path": None}, 256)
    assert np.abs(result[..., 0] - ramp / 257.0).max() <= 0.5


def test_camera_rotation_is_applied() -> None:
    image = Image.new("RGB", (16, 16), "black")
    ImageDraw.Draw(image).rectangle((0, 0, 15, 3), fill="white")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the top becomes the right side
    result = load_image({"bytes": encoded(image, exif=exif), "path": None}, 16)
    assert result[8, 15].tolist() == [255, 255, 255]
    assert result[0, 8].tolist() == [0, 0, 0]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_image({"bytes": content, "path": None}, 8) == [255, 0, 0]).all()


def huge_png() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


DAMAGED = {
    "truncated JPEG": encoded(noise_image(64, 64), "JPEG")[:1500],
    "truncated PNG": encoded(noise_image(64, 64))[:1500],
    "empty": b"",
    "text": b"<html>not found</html>",
    "bomb": huge_png(),
    "EPS": encoded(noise_image(8, 8), "EPS"),
    "negative": encoded(Image.fromarray(np.full((4, 4), -1, dtype=np.int32)), "TIFF"),
    "float": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_image_is_named_in_one_line(kind: str) -> None:
    with pytest.raises(InputError, match=r"^Cannot read the image of row 3 \(n01/cat\.png\): ") as caught:
        load_image({"bytes": DAMAGED[kind], "path": "n01/cat.png"}, 8, name="the image of row 3")
    assert "\n" not in str(caught.value)


def png_chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG file; its right checksum if none is given."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(content: bytes, chunk: bytes, *, before: bytes) -> bytes:
    """A PNG file with one chunk more."""
    place = content.index(before) - 4
    return content[:place] + chunk + content[place:]


PNG = encoded(noise_image(8, 8))
LARGE_TEXT = png_chunk(b"zTXt", b"parameters\x00\x00" + zlib.compress(b"x" * 2**21))
DAMAGED_BESIDE_THE_PIXELS = {
    "text above 1 MB": with_chunk(PNG, LARGE_TEXT, before=b"IDAT"),
    "text above 1 MB behind the pixels": with_chunk(PNG, LARGE_TEXT, before=b"IEND"),
    "text with a wrong checksum": with_chunk(PNG, png_chunk(b"tEXt", b"a\x00b", 1), before=b"IDAT"),
    "EXIF of a PNG": with_chunk(PNG, png_chunk(b"eXIf", b"II*\x00\xff\xff\xff\xff"), before=b"IDAT"),
    "EXIF of a PNG that is none": with_chunk(PNG, png_chunk(b"eXIf", b"nonsense"), before=b"IDAT"),
    "EXIF of a WebP": encoded(noise_image(8, 8), "WEBP", lossless=True, exif=b"Exif\x00\x00nonsense"),
}


@pytest.mark.parametrize("kind", DAMAGED_BESIDE_THE_PIXELS)
def test_damage_beside_the_pixels_does_no_harm(kind: str, tmp_path: Path) -> None:
    content = DAMAGED_BESIDE_THE_PIXELS[kind]
    (tmp_path / "image").write_bytes(content)
    for image in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "image")}):
        np.testing.assert_array_equal(load_image(image, 8), np.array(noise_image(8, 8)))


def test_a_png_is_turned_by_its_exif_though_its_text_is_damaged() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = with_chunk(encoded(noise_image(8, 8), exif=exif), LARGE_TEXT, before=b"IDAT")
    turned = np.rot90(np.array(noise_image(8, 8)), -1)
    np.testing.assert_array_equal(load_image({"bytes": content, "path": None}, 8), turned)


def test_twelve_bits_in_sixteen_are_told(caplog: pytest.LogCaptureFixture) -> None:
    dark = {"bytes": encoded(Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16))), "path": None}
    bright = {"bytes": encoded(Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16))), "path": None}
    decode._warn_of_12_bits.cache_clear()
    load_image(bright, 4)
    assert not caplog.records
    assert (load_image(dark, 4) == load_image(dark, 4)).all()
    (record,) = caplog.records
    assert "no value above 4095 of 65535" in record.message


def test_a_text_in_the_image_column_makes_a_short_line() -> None:
    with pytest.raises(
        InputError, match=r"Cannot read image \(A{200}\.\.\. \(131,072 characters\)\): File name"
    ) as caught:
        load_image({"bytes": None, "path": "A" * 131_072}, 8)
    assert len(str(caught.value)) < 400


def test_failure_of_the_machine_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        load_image({"bytes": None, "path": "a.png"}, 8)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.png"):
        load_image({"bytes": None, "path": str(tmp_path / "nowhere.png")}, 8)
