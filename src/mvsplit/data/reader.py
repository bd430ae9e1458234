"""Read single samples out of tar shards by position: `pread`, checksum, decode, transform."""

import os
import zlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from mvsplit.data.index import ShardIndex
from mvsplit.utils.errors import UserError

Sample = dict[str, Tensor | int | float]
Transform = Callable[[Tensor, int], Tensor]
"""(uint8 image (C, height, width), place in the training stream) → float image in [−1, 1]."""


class ShardReader(Dataset[Sample]):
    """Map-style view of an index; items are asked for as (place in the stream, sample number).

    Items: `image` (C, height, width) float32, `label`, `index` (sample number), `position` (place in the stream),
    `weight` (1, or 0 for places beyond the first pass where `once` is set).

    Args:
        channels: 1 decodes to grey, 3 to RGB. transform: see `Transform`.
    """

    def __init__(self, index: ShardIndex, channels: int, transform: Transform, once: bool = False) -> None:
        self.index, self.transform, self.once = index, transform, once
        self.mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
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
        encoded = torch.frombuffer(bytearray(self.raw(number)), dtype=torch.uint8)
        try:
            image = decode_image(encoded, mode=self.mode)
        except RuntimeError as error:
            where = self.index.shards[int(row["shard"])]
            raise UserError(f"{where}: sample {number} at byte {row['offset']} does not decode as an image") from error
        return {
            "image": self.transform(image, position),
            "label": int(row["label"]),
            "index": number,
            "position": position,
            "weight": float(not self.once or position < len(self)),
        }
