"""From any image file to a square of 8-bit RGB, the same way for every training set.

The crop is DiT's (guided-diffusion's `center_crop_arr`): halve with a box filter while the shorter side is at least
twice the wanted one, resize it with a bicubic filter, cut the centre. Scores of models trained here therefore compare
with published ones.
"""

import errno
import io
import logging
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import InputError

logger = logging.getLogger(__name__)

MAX_ASPECT_RATIO = 4
"""Longer images lose their ends before they are resized: a 1 x 5000 one would otherwise grow to 256 x 1,280,000."""

GREY_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""What is opened, as Pillow calls it: no format that Pillow hands to another program (EPS to Ghostscript)."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation (`ImageOps.exif_transpose`)."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

FAULTS_OF_A_FILE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENAMETOOLONG,
)
"""Refusals of the operating system that are the same each time the image is opened."""

MOST_CHARACTERS = 200
"""Of a path or reason in a message: a column of texts may hold whole files in base64."""


class UnreadableImage(InputError):
    """An image that is missing, damaged, in no known format or absurdly large."""

    path: str | None = None
    """Where it lies, if that is known; cut where it is long."""
    reason: str = ""
    """What is wrong with it, in one line."""


def load_image(
    image: Image.Image | Mapping[str, object],
    resolution: int,
    center_crop: bool = True,
    *,
    name: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Decodes an image, brings it to RGB and to a square.

    Rotation from the camera is applied; transparent parts become white; 16-bit grey is scaled to 8 bits, and 32-bit
    integer grey from the smallest of 8, 16 and 31 bits that holds its largest value; of an animation the first frame
    is taken. An RGB image that already has the wanted size comes back bit for bit. What is damaged beside the pixels
    (EXIF, a PNG's texts and their checksums) does no harm.

    Args:
        image: A PIL image, or what `datasets.Image(decode=False)` yields: {"bytes": encoded file or None, "path": its
            path or None}.
        resolution: Side of the result in pixels.
        center_crop: True: resize the shorter side, keep the centre. False: squeeze the whole image into the square.
        name: What errors call this image ("row 17"); its path is added where it has one.

    Returns:
        uint8 array of shape (resolution, resolution, 3), values 0..255.

    Raises:
        UnreadableImage: An `InputError` that names it: it is missing, damaged, in no known format or absurdly large.
        OSError: The disk or this machine failed, which says nothing about the image.
        MemoryError: As OSError.
    """
    try:
        rgb = _to_rgb(_upright(image) if isinstance(image, Image.Image) else _open(image))
        square = _center_square(rgb, resolution) if center_crop else _resize(rgb, (resolution, resolution))
        return np.array(square, dtype=np.uint8)
    except MemoryError:
        raise
    # Pillow's file readers raise almost anything on damaged input (OSError, SyntaxError, struct.error, IndexError,
    # DecompressionBombError, ...); whatever it is, the user needs to know which image it was.
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, *FAULTS_OF_A_FILE):
            raise
        path = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)
        path = _shortened(str(path)) if path else None
        reason = _reason(error)
        label = " ".join(part for part in (name or "image", f"({path})" if path else "") if part)
        unreadable = UnreadableImage(f"Cannot read {label}: {reason}")
        unreadable.path, unreadable.reason = path, reason
        raise unreadable from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a format that is read ({', '.join(_formats())})."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."  # without the path, which the message has already
    return f"{_shortened(str(error)) or type(error).__name__}."


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}... ({len(line):,} characters)"


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(image: Mapping[str, object]) -> Image.Image:
    """An image upright and with its pixels read, so that no file stays open and all that is wrong shows here."""
    content, path = image.get("bytes"), image.get("path")
    if not (isinstance(content, bytes) and content) and not (content is None and isinstance(path, str) and path):
        raise ValueError("it has neither bytes nor a path")
    try:
        return _decode(io.BytesIO(content) if isinstance(content, bytes) else str(path))
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        whole = content if isinstance(content, bytes) else Path(str(path)).read_bytes()
        if not whole.startswith(PNG_SIGNATURE):
            raise
        # Pillow gives up on texts above 1 MB and on any wrong checksum; the pixels may be whole all the same.
        return _decode(io.BytesIO(_pixels_of_png(whole)))


def _decode(file: str | io.BytesIO) -> Image.Image:
    with Image.open(file, formats=_formats()) as opened:
        opened.load()
        return _upright(opened)


def _pixels_of_png(content: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need, and with its own EXIF where that is whole."""
    kept, begin = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while begin + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[begin : begin + 8])
        end = begin + 12 + length
        chunk = content[begin:end]
        whole = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind in PNG_PIXEL_CHUNKS or (kind == b"eXIf" and whole):
            kept.append(chunk)
        begin = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of a damaged EXIF block, in which nothing is of use; as many kinds as for pixels
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode in GREY_16_BIT_MODES:
        # Pillow's own conversion clips at 255, which turns nearly every image white.
        grey = np.asarray(image, dtype=np.int64)
        largest = _largest_value(grey, has_32_bits=image.mode == "I")
        return Image.fromarray(((grey * 255 + largest // 2) // largest).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the image with 8 or 16 bits per channel")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def _largest_value(grey: npt.NDArray[np.int64], *, has_32_bits: bool) -> int:
    """What is white in an image of more than 8 bits."""
    if has_32_bits:
        # Such a file does not say how many of its bits are used.
        if grey.min() < 0:
            raise ValueError("32-bit pixels below 0 have no agreed range; save the image with 8 or 16 bits")
        return next(2**bits - 1 for bits in (8, 16, 31) if grey.max() < 2**bits)
    if 255 < grey.max() < 4096:
        _warn_of_12_bits()
    return 65535


@cache
def _warn_of_12_bits() -> None:
    logger.warning(
        "A 16-bit image has no value above 4095 of 65535 and becomes dark. If your images hold 12 bits, scale them to "
        "16 (or to 8) before."
    )


def _center_square(image: Image.Image, resolution: int) -> Image.Image:
    shorter = min(image.size)
    longest = MAX_ASPECT_RATIO * shorter
    if max(image.size) > longest:
        image = _crop_center(image, (min(image.width, longest), min(image.height, longest)))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = _resize(image, (round(image.width * scale), round(image.height * scale)))
    return _crop_center(image, (resolution, resolution))


def _crop_center(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
