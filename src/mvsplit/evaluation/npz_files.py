"""Arrays in .npz files made by anybody: read as streams, checked before memory is taken, never unpickled.

Each member of the zip archive is a .npy file: a header with type and shape, then the values.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from mvsplit.data.faults import reason_of
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file

MAX_HEADER = 10_000
"""Most bytes of a member's header."""


@dataclass(frozen=True)
class Member:
    """An array in a .npz file.

    Attributes:
        path: of the file.
        name: of the array, without `.npy`.
        dtype: of its values.
        shape: of the array.
    """

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def chunks(self, rows: int) -> Iterator[NDArray]:
        """The array, so many rows at a time.

        Raises:
            UserError: if there are fewer or more values than the header says, or they fail their checksum.
        """
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        with _reporting(self.path, self.name), _opened(self.path, self.name) as file:
            _read_header(file)
            for first in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - first)
                data = bytearray(count * row)
                _fill(file, data)
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
            if file.read(1):  # the end: this also verifies the checksum
                raise ValueError("there are more values than the header says")

    def whole(self) -> NDArray:
        """The whole array; its caller has checked that it is small."""
        return next(self.chunks(max(1, self.shape[0])))


def members(path: Path, names: Sequence[str]) -> dict[str, Member]:
    """Those of the named arrays that a .npz file has, as their headers describe them.

    Raises:
        UserError: if it is not such a file, or a header does not fit what is stored.
    """
    if not path.is_file():  # it could also be a device or a pipe
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with _reporting(path, None), zipfile.ZipFile(path) as archive:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
    return {name: _member(path, name, sizes[name]) for name in names if name in sizes}


def _member(path: Path, name: str, size: int) -> Member:
    with _reporting(path, name), _opened(path, name) as file:
        shape, fortran, dtype = _read_header(file)
        if dtype.hasobject:
            raise ValueError("contains Python objects, which are never unpickled")
        if fortran and len(shape) > 1:
            raise ValueError("is in Fortran's order, which cannot be streamed; save np.ascontiguousarray(…)")
        if file.tell() + dtype.itemsize * math.prod(shape) != size:
            raise ValueError(f"its header says {dtype}, {list(shape)}, which are not the {size} bytes that are stored")
        return Member(path, name, dtype, shape)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file, MAX_HEADER)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(file, MAX_HEADER)
    else:
        raise ValueError(f"has version {version}; versions 1 and 2 can be read")
    if any(side < 0 for side in shape):
        raise ValueError(f"has the shape {list(shape)}")
    return shape, fortran, dtype


def _fill(file: IO[bytes], data: bytearray) -> None:
    view, done = memoryview(data), 0
    while done < len(data):
        # In pieces: of a deflated member, a read returns little at a time.
        part = file.read(min(len(data) - done, 1 << 20))
        if not part:
            raise ValueError("ends early")
        view[done : done + len(part)] = part
        done += len(part)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        yield file


@contextmanager
def _reporting(path: Path, name: str | None) -> Iterator[None]:
    """Turn what goes wrong in reading an archive into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # in many ways: the file may contain anything
        where = f"{path}: array '{name}' cannot be read" if name is not None else f"{path}: not a .npz file"
        raise UserError(f"{where} ({reason_of(error)})") from None


def write_npz(
    path: Path, count: int, shape: Sequence[int], batches: Iterable[Tensor], labels: Tensor | None = None
) -> None:
    """Write images as ADM's evaluation reads them: `arr_0` (N, height, width, C) uint8 and `arr_1` (N,) int64 labels.

    A stream: no more than a batch is in memory. The same images give the same bytes at any time.

    Args:
        path: of the file, which appears when it is complete.
        count: N.
        shape: (C, height, width).
        batches: uint8 (B, C, height, width), N images in all.
        labels: (N,).

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    channels, height, width = shape
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _array(archive, "arr_0", "|u1", (count, height, width, channels)) as member:
            done = 0
            for batch in batches:
                assert batch.dtype == torch.uint8, batch.dtype
                assert batch.shape[1:] == (channels, height, width), batch.shape
                member.write(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
                done += len(batch)
            assert done == count, (done, count)
        if labels is not None:
            assert labels.shape == (count,), labels.shape
            with _array(archive, "arr_1", "<i8", (count,)) as member:
                member.write(labels.cpu().numpy().astype("<i8").data)


@contextmanager
def _array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A member whose header is written."""
    info = zipfile.ZipInfo(f"{name}.npy")  # its time is that of 1980
    info.external_attr = 0o600 << 16
    with archive.open(info, "w", force_zip64=True) as member:
        npy.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        yield member
