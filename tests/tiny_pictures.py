"""Pictures for tests that ask only whether there is one."""

from pathlib import Path
from typing import Any

from PIL import Image

from speed_diffusers.files import written_whole


def save_dot(history: Any, areas: Any, title: str, path: Path) -> None:
    """Stands in for `save_error_map`: writes a PNG of one pixel, as whole as that is written."""
    with written_whole(path) as temporary:
        Image.new("L", (1, 1)).save(temporary, format="png")
