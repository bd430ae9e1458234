"""Read single samples out of tar shards by position: `pread`, checksum, decode, transform."""

import io
import os
import zlib
from collections.abc import Callable
from typing import Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from mvsplit.data.index import ShardIndex
from mvsplit.utils.errors import UserError

Sample = dict[str, Tensor | int | float]
Transform = Callable[[Tensor, int], Tensor]
"""(uint8 image (C, height, width), place in the training stream) → float image in [−1, 1]."""


def decode(data: bytes, mode: Literal["L", "RGB"]) -> Tensor:
    """An encoded picture as (1 or 3, height, width) uint8.

    By Pillow: torchvision's own decoder dies of a damaged PNG with the whole process.

    Raises:
        ValueError, OSError, SyntaxError: if it is damaged, or holds more than 8 bits a channel.
    """
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise ValueError(f"{image.mode} pixels; 8 bits a channel are read")
        return pil_to_tensor(image.convert(mode))


class ShardReader(Dataset[Sample]):
    """Map-style view of an index; items are asked for as (place in the stream, sample number).

    Items: `image` (C, height, width) float32, `label`, `index` (sample number), `position` (place in the stream),
    `weight` (1, or 0 for places beyond the first pass where `once` is set).

    Args:
        channels: 1 decodes to grey, 3 to RGB. transform: see `Transform`.
    """

    def __init__(self, index: ShardIndex, channels: int, transform: Transform, once: bool = False) -> None:
        self.index, self.transform, self.once = index, transform, once
        self.mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}  # file descriptors do not travel to other processes

    def raw(self, number: int) -> bytes:
        """The encoded image of sample `number`.

        Raises:
            UserError: if its bytes are not those that were indexed.
        """
        row = self.index.rows[number]
        shard = int(row["shard"])
        if shard not in self._files:
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], int(row["size"]), int(row["offset"]))
        if zlib.crc32(data) != row["crc32"]:
            raise UserError(f"{self.index.shards[shard]}: sample {number} at byte {row['offset']} fails its checksum")
        return data

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        position, number = item
        row = self.index.rows[number]
        try:
            image = decode(self.raw(number), self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, UserError):
                raise
            where = self.index.shards[int(row["shard"])]
            raise UserError(
                f"{where}: sample {number} at byte {row['offset']} does not decode as an image ({error})"
            ) from error
        return {
            "image": self.transform(image, position),
            "label": int(row["label"]),
            "index": number,
            "position": position,
            "weight": float(not self.once or position < len(self)),
        }
