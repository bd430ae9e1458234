"""Classes and image size of a folder of class folders: read while a config is composed, for `data=image_folder`."""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median_low

from PIL import Image

from mvsplit.utils.errors import UserError

LOOKED_AT = 100
"""Images from which the size is taken, spread over the classes."""
LARGEST = 256
"""Side to which larger images are scaled: ADM's."""
STEP = 4
"""Sides are multiples of it: `model.patch_size` must divide them."""


def class_folders(root: Path) -> list[Path]:
    """Folders of the classes, in the order of their numbers; hidden folders are ignored."""
    return sorted(path for path in root.glob("[!.]*") if path.is_dir())


def num_classes(folder: str, train: str) -> int:
    """Number of classes in <folder>/<train>.

    Raises:
        UserError: if it has none.
    """
    root = Path(folder, train)
    if not (classes := class_folders(root)):
        raise UserError(f"data.folder = {folder}: no class folders in '{root}'")
    return len(classes)


def image_size(folder: str, train: str) -> list[int]:
    """[side, side]: the median of the shorter sides of some images in <folder>/<train>, at most 256.

    Raises:
        UserError: if no image can be read.
    """
    step = -(-num_classes(folder, train) // LOOKED_AT)
    classes = class_folders(Path(folder, train))[::step]
    sides = []
    for path in classes:
        for file in islice(_files(path), -(-LOOKED_AT // len(classes))):
            with suppress(Exception), Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:  # reads its header
                sides.append(min(image.size))
    if not sides:
        raise UserError(f"data.folder = {folder}: no readable images in '{folder}/{train}/<class>/'")
    side = min(median_low(sides), LARGEST)
    return [side // STEP * STEP or side] * 2


def _files(folder: Path) -> Iterator[Path]:
    """Files in a folder and its subfolders, always in the same order."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (path for path in (Path(parent, name) for name in sorted(files)) if path.is_file())


RESOLVERS = {"folder_classes": num_classes, "folder_image_size": image_size}
"""For `register_resolvers`: `${folder_classes:…}` and `${folder_image_size:…}` in the configs."""
