"""Sets of images made by any program: ADM's .npz, or a folder of png, jpg and webp files.

Shapes: N images, B of a batch, C channels (1 or 3).
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mvsplit.data.faults import reason_of
from mvsplit.data.tars import MAX_MEMBER
from mvsplit.data.transforms import decode_picture, in_colour
from mvsplit.evaluation.npz_files import Member, members
from mvsplit.evaluation.weight_files import file_sha256
from mvsplit.utils.errors import UserError

MAX_IMAGES = 10_000_000
MAX_PIXELS = 1 << 26
"""Most images of a set, and most pixels of one."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class ImageFiles(ABC):
    """A set of images of one size; memory does not grow with their number.

    Attributes:
        shape: (C, height, width).
        labels: (N,) int64; None if they are not stored.
    """

    shape: tuple[int, int, int]
    labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 (B, C, height, width); the last batch may be smaller.

        Raises:
            UserError: for the first image that cannot be read.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of a .npz file, or of a folder's file names and contents. It reads all files."""


def open_images(path: str) -> ImageFiles:
    """The images at a path: a folder, or a .npz file with `arr_0`.

    Raises:
        UserError: if there are none, or they cannot be read.
    """
    if os.path.isdir(path):
        return ImageFolder(Path(path))
    if not path.endswith(".npz"):
        what = "must be a folder or a .npz file" if os.path.exists(path) else "no such file or folder"
        raise UserError(f"{path}: {what}")
    return NpzImages(Path(path))


class NpzImages(ImageFiles):
    """`arr_0` (N, height, width, C) or (N, height, width) uint8, and `arr_1` (N,) integer labels if it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = members(path, ["arr_0", "arr_1"])
        if "arr_0" not in arrays:
            raise UserError(f"{path}: has no array 'arr_0', the images")
        self.images = arrays["arr_0"]
        _check_images(self.images)
        _, height, width, channels = (*self.images.shape, 1)[:4]
        self.shape = (channels, height, width)
        self.labels = _labels(arrays["arr_1"], len(self)) if "arr_1" in arrays else None

    def __len__(self) -> int:
        return self.images.shape[0]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        channels, height, width = self.shape
        for chunk in self.images.chunks(batch_size):
            images = torch.from_numpy(chunk).view(-1, height, width, channels)
            yield images.permute(0, 3, 1, 2).contiguous()

    @cached_property
    def fingerprint(self) -> str:
        return file_sha256(self.path)


def _check_images(array: Member) -> None:
    shape = array.shape
    if array.dtype != np.uint8:
        raise UserError(f"{array.path}: 'arr_0' is {array.dtype}, must be uint8 from 0 to 255")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise UserError(f"{array.path}: 'arr_0' has the shape {list(shape)}, must be N × height × width × 3 or × 1")
    if shape[0] > MAX_IMAGES or shape[1] * shape[2] > MAX_PIXELS:
        raise UserError(f"{array.path}: 'arr_0' has the shape {list(shape)}; at most {MAX_IMAGES} × {MAX_PIXELS}")


def _labels(array: Member, count: int) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise UserError(
            f"{array.path}: 'arr_1' is {array.dtype}, {list(array.shape)}; must be {count} whole numbers, the labels"
        )
    return torch.from_numpy(array.whole().astype(np.int64))


class ImageFolder(ImageFiles):
    """All images below a folder, sorted by path; hidden ones are left out. Grey if all are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
        names = (path.relative_to(folder) for path in found if path.suffix.lower() in SUFFIXES)
        self.files = sorted(
            (folder / name for name in names if not any(part.startswith(".") for part in name.parts)),
            key=lambda path: path.relative_to(folder).as_posix(),
        )
        if not self.files:
            raise UserError(f"{folder}: contains no images ({', '.join(SUFFIXES)})")
        if len(self.files) > MAX_IMAGES:
            raise UserError(f"{folder}: contains {len(self.files)} images; at most {MAX_IMAGES} are allowed")
        self.mode: Literal["L", "RGB"] = "RGB" if any(in_colour(self._bytes(path)) for path in self.files) else "L"
        first = self._decode(self.files[0])
        self.shape = (first.shape[0], first.shape[1], first.shape[2])

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for first in range(0, len(self.files), batch_size):
            yield torch.stack([self._image(path) for path in self.files[first : first + batch_size]])

    def _image(self, path: Path) -> Tensor:
        image = self._decode(path)
        if image.shape != self.shape:
            size, needed = (f"{shape[1]} × {shape[2]}" for shape in (image.shape, self.shape))
            raise UserError(f"{path}: {size} pixels, must be {needed} as {self.files[0].name}")
        return image

    def _decode(self, path: Path) -> Tensor:
        data = self._bytes(path)
        try:
            picture = decode_picture(data, self.mode, MAX_PIXELS)
        except Exception as error:  # decoders fail in many ways
            raise UserError(f"{path}: cannot be decoded ({reason_of(error)})") from None
        pixels = torch.from_numpy(np.array(picture))  # (height, width) or (height, width, 3)
        return pixels.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()

    def _bytes(self, path: Path) -> bytes:
        try:
            if not path.is_file() or path.stat().st_size > MAX_MEMBER:
                raise UserError(f"{path}: must be a regular file of at most {MAX_MEMBER} bytes")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            name = path.relative_to(self.folder).as_posix().encode(errors="surrogateescape")
            digest.update(name + b"\0" + hashlib.sha256(self._bytes(path)).digest())
        return digest.hexdigest()
