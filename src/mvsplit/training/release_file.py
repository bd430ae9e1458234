"""Files that `torch.save(model.state_dict(), …)` writes, read and written tensor by tensor, without running their code.

Such a file is a zip archive of uncompressed records: `data.pkl`, the containers, and one `data/<number>` for each
storage.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvsplit.training.state_file import GLOBALS, STORAGES, PlainUnpickler, check_place, storage_of
from mvsplit.training.tensor_files import Stored, TensorFile, check_shape
from mvsplit.utils.errors import UserError

MAX_PICKLE = 8 << 20
"""Bytes of pickled containers; the state dictionary of 1000 blocks has 3 MiB."""
MAX_DIRECTORY = 16 << 20
"""Bytes of a zip archive's directory; 12,000 records have 1 MiB."""
ALIGNMENT = 64
"""Of the records' contents, as PyTorch has it."""


class _Storage(NamedTuple):
    """Values of a type in a file: where they begin, in bytes, and how many there are."""

    dtype: torch.dtype
    offset: int
    length: int


def _place(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    """`torch._utils._rebuild_tensor_v2`, but only the tensor's place."""
    check_place(offset, size, stride)
    check_shape(size)
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    start, contiguous = storage.offset + offset * storage.dtype.itemsize, Stored(0, storage.dtype, tuple(size))
    steps = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    plain = all(length == 1 or one == other for length, one, other in zip(size, stride, steps, strict=True))
    found = Stored(start, storage.dtype, tuple(size), None if plain or not contiguous.extent else tuple(stride))
    if offset + found.extent > storage.length:
        raise ValueError("a tensor claims more values than are stored")
    if found.extent > 2 * contiguous.extent or contiguous.extent > storage.length:
        raise ValueError("a tensor's values overlap or are spread over a larger one; save contiguous copies")
    return found


def _parameter(data: Any, *_: Any) -> Stored:
    if not isinstance(data, Stored):
        raise ValueError("a parameter without values")
    return data


def _ignore_attributes(data: Any) -> None:
    """Attributes of a state dictionary, its `_metadata`."""
    data.stack.pop()
    if not isinstance(data.stack[-1], OrderedDict):
        raise ValueError(f"attributes of a {type(data.stack[-1]).__name__}")


class _Places(PlainUnpickler):
    """Builds the containers, with the place of each tensor instead of its values."""

    known = GLOBALS | {"torch._utils._rebuild_tensor_v2": _place, "torch._utils._rebuild_parameter": _parameter}
    limit = MAX_PICKLE
    dispatch = PlainUnpickler.dispatch | {pickle.BUILD[0]: _ignore_attributes}

    def __init__(self, content: bytes, record: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(content))
        self.record = record

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.known:
            raise ValueError(f"it names {f'{module}.{name}'[:100]}, but only tensors and plain containers are read")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        dtype, key, count = storage_of(pid)
        offset, size = self.record(f"data/{key}")
        if size != count * dtype.itemsize:
            raise ValueError("a tensor claims more values than are stored")
        return _Storage(dtype, offset, count)


class _Bounded(io.FileIO):
    """A file of which no large part is read at once: `zipfile` reads a directory of any size."""

    def read(self, size: int | None = -1) -> bytes:
        wanted = MAX_DIRECTORY + 1 if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY + 1 or len(content := super().read(wanted) or b"") > MAX_DIRECTORY:
            raise ValueError("too many records")
        return content


class ReleaseFile(TensorFile):
    """A file of tensors by name, perhaps under `model` or `state_dict`.

    Attributes:
        tensors: where each tensor is, by name.

    Raises:
        UserError: for any other file; one line.
    """

    def __init__(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise UserError(f"release = {path}: {'not a regular file' if path.exists() else 'no such file'}")
            super().__init__(path)
        except OSError as error:  # a name that is too long, or no permission
            raise UserError(f"release = {str(path)[:100]}: {error.strerror}") from None
        try:
            found = self._containers()
        except Exception as error:  # a hand-made pickle can raise anything
            reason = " ".join(str(error or type(error).__name__).split())[:200]
            raise UserError(f"release = {path}: damaged, or not a file of tensors only ({reason})") from None
        for key in ("model", "state_dict"):
            if isinstance(found, dict) and key in found:
                found = found[key]
                break
        if not isinstance(found, dict) or not found:
            raise UserError(f"release = {path}: contains a {type(found).__name__}, must be tensors by name")
        for name, value in found.items():
            if not isinstance(name, str):
                raise UserError(f"release = {path}: a key is a {type(name).__name__}, must be a tensor's name")
            if not isinstance(value, Stored):
                raise UserError(f"release = {path}: {name[:100]!r} is a {type(value).__name__}, must be a tensor")
        claimed = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in found.values())
        if claimed > path.stat().st_size:  # many tensors of the same few values
            raise UserError(f"release = {path}: its tensors share values, and together claim more than are stored")
        self.tensors: dict[str, Stored] = dict(found)

    def _containers(self) -> Any:
        with _Bounded(self.path) as raw, zipfile.ZipFile(raw) as archive:
            names = [info.filename for info in archive.infolist()]
            folder = next((name for name in names if name.endswith("data.pkl")), None)
            if folder is None:
                raise ValueError("no data.pkl")
            folder = folder.removesuffix("data.pkl")
            if f"{folder}byteorder" in names and self._record(archive, f"{folder}byteorder", 16) != b"little":
                raise ValueError("of a machine with another byte order")
            content = self._record(archive, f"{folder}data.pkl", MAX_PICKLE)
            return _Places(content, lambda name: self._place_of(archive.getinfo(folder + name))).load()

    def _record(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        offset, size = self._place_of(archive.getinfo(name))
        if size > limit:
            raise ValueError(f"more than {limit >> 20} MiB of containers")
        out = torch.empty(size, dtype=torch.uint8)
        self.fill(out, offset)
        return out.numpy().tobytes()

    def _place_of(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        """Where a record's content begins in the file, and its size."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError("it contains compressed records")
        header = torch.empty(30, dtype=torch.uint8)
        self.fill(header, info.header_offset)
        content = header.numpy().tobytes()
        if content[:4] != b"PK\x03\x04":
            raise ValueError("a record is not where the directory says")
        start = info.header_offset + 30 + int.from_bytes(content[26:28], "little")
        start += int.from_bytes(content[28:30], "little")
        if start + info.file_size > self.path.stat().st_size:
            raise ValueError("it is truncated")
        return start, info.file_size


_TYPES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items()}


class _Number(NamedTuple):
    """A storage to be written: its record and its values' type and number."""

    key: str
    dtype: torch.dtype
    length: int


class _Named(NamedTuple):
    """A tensor to be written, alone in its storage."""

    storage: _Number
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes placeholders of tensors as `torch.save` writes tensors."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Number):
            return None
        return ("storage", _TYPES[value.dtype], value.key, "cpu", value.length)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Named):
            return NotImplemented
        stride = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        return torch._utils._rebuild_tensor_v2, (value.storage, 0, value.shape, stride, False, OrderedDict())


def write_release(
    file: Any, sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], values: Iterable[Tensor], folder: str = "model"
) -> None:
    """Write a state dictionary as `torch.save` does, one tensor in memory at a time (PyTorch needs all of them).

    Args:
        file: a new binary file.
        sizes: type and shape of every tensor.
        values: the tensors, in that order.
        folder: name of the archive's only folder.
    """
    state: OrderedDict[str, _Named] = OrderedDict()
    for number, (name, (dtype, shape)) in enumerate(sizes.items()):
        state[name] = _Named(_Number(str(number), dtype, math.prod(shape)), tuple(shape))
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(state)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def write(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"{folder}/{name}")
            start = file.tell() + 30 + len(info.filename.encode()) + 20  # the last: sizes of 64 bits
            padding = -(start + 4) % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as record:
                record.write(data)

        write("data.pkl", content.getvalue())
        write("byteorder", b"little")
        for number, tensor in enumerate(values):
            write(f"data/{number}", tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        write("version", b"3\n")
