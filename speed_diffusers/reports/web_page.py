"""A web page in one file: its styles, scripts, data and pictures are inside it, and it loads nothing."""

import base64
import io
import json
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

logger = logging.getLogger(__name__)

WEB = files(__package__) / "web"
STYLES = ("charts.css", "report.css")
SCRIPTS = ("charts.js", "strategies.js", "report.js")
QUALITY = 88
"""Of pictures as WebP, in percent: a third of the bytes of PNG, and no difference is seen."""


def web_file(name: str) -> str:
    """The text of one of the files of `reports/web`: styles and scripts, which other pages may use too."""
    return (WEB / name).read_text("utf-8")


def web_page(title: str, data: dict[str, Any]) -> str:
    """The page of a report.

    Args:
        title: For the tab of the browser and the page's head.
        data: From `training.report_data`: JSON values, of which NaN and infinity are none.

    Returns:
        HTML that needs no other file and no network, and may not ask for any.
    """
    # "<" is written so that no name of a run or class can end the script element that the data lie in.
    text = json.dumps(data | {"title": title}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "<!--styles-->": f"<style>\n{_together(STYLES)}</style>",
        "<!--data-->": f'<script type="application/json" id="data">{text.replace("<", chr(92) + "u003c")}</script>',
        "<!--scripts-->": f"<script>\n{_together(SCRIPTS)}</script>",
    }
    page = web_file("report.html")
    for place, part in parts.items():
        page = page.replace(place, part)
    return page


def _together(names: tuple[str, ...]) -> str:
    return "\n".join(map(web_file, names))


def image_url(path: Path, max_width: int) -> str | None:
    """A picture as the text that stands for it inside a page; None, with a warning, where it cannot be read.

    Args:
        path: Picture file.
        max_width: Pixels; a wider one is made smaller.
    """
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        logger.warning("%s cannot be read as a picture; it is left out (%s).", path, error)
        return None
    if picture.width > max_width:
        size = (max_width, round(picture.height * max_width / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
