"""From any image file to a square of 8-bit RGB, the same way for every training set.

The crop is DiT's (guided-diffusion's `center_crop_arr`): halve with a box filter while the shorter side is at least
twice the wanted one, resize it with a bicubic filter, cut the centre. Scores of models trained here therefore compare
with published ones.
"""

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

MAX_ASPECT_RATIO = 4
"""Longer images lose their ends before they are resized: a 1 x 5000 one would otherwise grow to 256 x 1,280,000."""

GREY_16_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def load_image(
    image: Image.Image | Mapping[str, object],
    resolution: int,
    center_crop: bool = True,
    *,
    name: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Decodes an image, brings it to RGB and to a square.

    Rotation from the camera is applied; transparent parts become white; 16-bit grey is scaled to 8 bits; of an
    animation the first frame is taken. An RGB image that already has the wanted size comes back bit for bit.

    Args:
        image: A PIL image, or what `datasets.Image(decode=False)` yields: {"bytes": encoded file or None, "path": its
            path or None}.
        resolution: Side of the result in pixels.
        center_crop: True: resize the shorter side, keep the centre. False: squeeze the whole image into the square.
        name: What errors call this image ("row 17"); its path is added where it has one.

    Returns:
        uint8 array of shape (resolution, resolution, 3), values 0..255.

    Raises:
        InputError: If the image is missing, damaged, unreadable or absurdly large. The message names it.
    """
    try:
        opened = image if isinstance(image, Image.Image) else _open(image)
        rgb = _to_rgb(ImageOps.exif_transpose(opened))
        square = _center_square(rgb, resolution) if center_crop else _resize(rgb, (resolution, resolution))
        return np.array(square, dtype=np.uint8)
    # Pillow's file readers raise almost anything on damaged input (OSError, SyntaxError, struct.error, IndexError,
    # DecompressionBombError, ...); whatever it is, the user needs to know which image it was.
    except Exception as error:
        path = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)
        label = " ".join(part for part in (name or "image", f"({path})" if path else "") if part)
        raise InputError(f"Cannot read {label}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format Pillow knows."
    return f"{' '.join(str(error).split()) or type(error).__name__}."


def _open(image: Mapping[str, object]) -> Image.Image:
    content, path = image.get("bytes"), image.get("path")
    if isinstance(content, bytes) and content:
        return Image.open(io.BytesIO(content))
    if content is None and isinstance(path, str) and path:
        with Image.open(path) as opened:
            opened.load()  # reads the pixels, so that no file stays open
            return opened
    raise ValueError("it has neither bytes nor a path")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in GREY_16_BIT_MODES:
        # Pillow's own conversion clips 16-bit values at 255, which turns nearly every image white.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the image with 8 or 16 bits per channel")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


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
