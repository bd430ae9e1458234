"""Tensors in files, read one at a time.

They are read, not mapped: pages of a mapped file count as memory of the process once they are touched.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mvsplit.utils.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Types by their names in a safetensors file."""
MAX_HEADER = 16 << 20
"""Bytes of a safetensors header; 1000 blocks need 2 MiB."""
MAX_DIMENSIONS = 8
"""Of a tensor."""
BUFFER = 1 << 22
"""Bytes that are converted at a time."""


def check_shape(shape: Sequence[Any]) -> None:
    """Raises `ValueError` for a shape that no tensor can have; a length of zero hides the others from products."""
    if len(shape) > MAX_DIMENSIONS or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"a tensor of {len(shape)} dimensions, or with lengths that are no numbers")
    if math.prod(length for length in shape if length) >= 1 << 48:
        raise ValueError("a tensor with an impossible shape")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        offset: of its first value, in bytes from the beginning of the file.
        dtype: of its values.
        shape: of the tensor.
        stride: in values; None if it is contiguous.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def extent(self) -> int:
        """Number of values from the first to the last."""
        if self.stride is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


class TensorFile:
    """A file whose tensors' places are known.

    Args:
        path: of a regular file; it stays open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fill(self, out: Tensor, offset: int, dtype: torch.dtype | None = None) -> None:
        """Read values into a contiguous tensor (n,), from this byte of the file on.

        Nothing is allocated but one buffer for conversions, which stays: what is freed between tensors that stay would
        leave holes in the process's memory, up to 40 % of it.

        Args:
            out: where to; its type may be another than that of the file.
            offset: in bytes.
            dtype: of the values in the file; None for that of `out`.

        Raises:
            UserError: if the file ends before.
        """
        if dtype in (None, out.dtype):
            self._fill(out, offset)
            return
        assert dtype is not None
        if not len(self._buffer):
            self._buffer = torch.empty(BUFFER, dtype=torch.uint8)
        step = BUFFER // dtype.itemsize
        for first in range(0, len(out), step):
            part = out[first : first + step]
            values = self._buffer[: len(part) * dtype.itemsize].view(dtype)
            self._fill(values, offset + first * dtype.itemsize)
            part.copy_(values)

    def _fill(self, out: Tensor, offset: int) -> None:
        view = out.view(torch.uint8).numpy().data if len(out) else memoryview(b"")
        while len(view):
            count = os.preadv(self.file.fileno(), [view], offset)
            if not count:
                raise UserError(f"{self.path}: damaged, it ends at byte {offset}")
            view, offset = view[count:], offset + count

    def read(self, stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this file, in memory of its own.

        Args:
            stored: where it is.
            dtype: to convert to; None for its own.

        Raises:
            UserError: if the file ends before.
        """
        flat = torch.empty(stored.extent, dtype=dtype or stored.dtype)
        self.fill(flat, stored.offset, stored.dtype)
        if stored.stride is None or 0 in stored.shape:
            return flat.reshape(stored.shape)
        return flat.as_strided(stored.shape, stored.stride).contiguous()


class SafetensorsFile(TensorFile):
    """A safetensors file.

    Attributes:
        tensors: where each tensor is, by name.
        metadata: of the file.

    Raises:
        ValueError, OSError, SafetensorError: for a file that is none.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():  # it could also be a device or a pipe
            raise ValueError("not a regular file" if path.exists() else "no such file")
        super().__init__(path)
        size = int.from_bytes(self.file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"a header of more than {MAX_HEADER >> 20} MiB")
        safe_open(str(path), "pt")  # the library checks that the tensors fill the file, without overlaps
        header = json.loads(os.pread(self.file.fileno(), size, 8))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors: dict[str, Stored] = {}
        for name, about in header.items():
            if about["dtype"] not in DTYPES:
                raise ValueError(f"{name[:100]!r} has type {about['dtype']}")
            check_shape(about["shape"])
            offset = 8 + size + about["data_offsets"][0]
            self.tensors[name] = Stored(offset, DTYPES[about["dtype"]], tuple(about["shape"]))
