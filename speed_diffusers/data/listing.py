"""What a set of images holds, for the plan of a run: enough to see that it is the set that was meant."""

import numpy as np

from .images import ImageRows, ImageSource
from .scan import number


def describe_images(source: ImageRows) -> str:
    """Images, classes (how many, the first and the last), and images per class (fewest and most), in one line."""
    images = number(len(source), "image")
    if source.label_names is None:
        return ", ".join(filter(None, (images, "without classes", source.description)))
    first, *more = (f"{label} {name!r}" for label, name in enumerate(source.label_names))
    classes = f"{images}, {source.num_classes:,} class{'es' * bool(more)} ({' to '.join([first, *more[-1:]])})"
    if not isinstance(source, ImageSource):
        return f"{classes}, {source.description}"
    counts = np.bincount(source.labels, minlength=source.num_classes)
    return f"{classes}, {counts.min():,} to {counts.max():,} images per class"


def describe_ignored(source: ImageRows) -> str:
    """What lies beside the images and is not read, in one line; empty if there is nothing."""
    return "; ".join(source.ignored)
