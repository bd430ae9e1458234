"""Reads `state.pt`, plain containers and small tensors that `torch.save` wrote, without running code from it.

It takes memory in proportion to the file. PyTorch's own restricted loader inflates compressed records, and builds large
objects from a few bytes, such as a `bytearray` of any length. This one calls only what `GLOBALS` lists.
`release_file.py` reads larger files with it, whose tensors stay on disk.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.training.tensor_files import MAX_DIMENSIONS
from mvsplit.utils.limits import MAX_REASON

MAX_PICKLE = 2 << 20
"""Bytes of pickled containers, which take up to 60 times as much memory; a typical state has 10 KiB."""
MAX_KEY = 16
"""Entries of a tuple that is a key: a tuple is hashed anew each time that it is used."""
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def read_state(path: Path) -> Any:
    """The content of the file.

    Raises:
        ValueError: for anything wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            if not stored or sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("it contains compressed records")
            name = next(record.filename for record in records if record.filename.endswith("data.pkl"))
            if archive.getinfo(name).file_size > MAX_PICKLE:
                raise ValueError(f"more than {MAX_PICKLE >> 20} MiB of containers")
            with archive.open(name) as file:
                return _Data(file, archive, name.removesuffix("data.pkl")).load()
    except Exception as error:  # a hand-made pickle can raise anything
        raise ValueError(str(error)[:MAX_REASON] or type(error).__name__) from None


def check_place(offset: Any, size: Any, stride: Any) -> None:
    """Check where a pickle says that a tensor is.

    Raises:
        ValueError: if these are not plain numbers, few and credible.
    """
    lengths = [len(part) if isinstance(part, tuple) else -1 for part in (size, stride)]
    if not 0 <= lengths[0] <= MAX_DIMENSIONS or lengths[0] != lengths[1]:
        raise ValueError("a tensor without a shape")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *size, *stride)):
        raise ValueError("a tensor without a place")


def storage_of(pid: Any) -> tuple[torch.dtype, str, int]:
    """Type, record's name and number of values of ("storage", type, record's name, device, number of values).

    Raises:
        ValueError: for anything else. Nothing else is hashed or shown: nested tuples can take exponential time.
    """
    _, dtype, key, _, count = pid if type(pid) is tuple and len(pid) == 5 else [None] * 5
    if not isinstance(dtype, torch.dtype) or type(key) is not str or len(key) > 20 or type(count) is not int:
        raise ValueError("a tensor without storage")
    return dtype, key, count


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, but only as a view of stored values."""
    check_place(offset, size, stride)
    if not isinstance(storage, Tensor) or prod(size) > storage.numel():
        raise ValueError("a tensor claims more values than are stored")
    return storage.as_strided(size, stride, offset)


def _is_plain(value: Any) -> bool:
    """Whether it hashes quickly: nested tuples that share their parts can take exponential time."""
    flat = (str, int, float, bool, type(None))
    if isinstance(value, tuple) and len(value) <= MAX_KEY:
        return all(isinstance(part, flat) for part in value)
    return isinstance(value, flat)


def _set(items: Any = ()) -> set[Any]:
    if not all(map(_is_plain, items)):
        raise ValueError("a set of containers")
    return set(items)


def _empty_dict() -> "OrderedDict[Any, Any]":
    return OrderedDict()  # filled by later opcodes


def _bytes(text: str, encoding: str) -> bytes:
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise ValueError("bytes of another encoding than latin1")
    return text.encode(encoding)


GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": _empty_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,  # its name in the pickle protocol that PyTorch uses
    "_codecs.encode": _bytes,  # how that protocol stores bytes
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{str(dtype): dtype for dtype in STORAGES.values()},
}


_TARGETS = {pickle.APPEND: -2, pickle.SETITEM: -3, pickle.APPENDS: None, pickle.SETITEMS: None}
"""Stack index of the container that an opcode writes into; None: below the mark."""
_OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID, *_TARGETS,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
)  # fmt: skip
"""The opcodes that `torch.save` uses for plain containers and tensors; others could compute with tensors."""


def _checked(opcode: bytes) -> Callable[[Any], None]:
    load = pickle._Unpickler.dispatch[opcode[0]]

    def write(data: Any) -> None:
        place = _TARGETS[opcode]
        target = data.metastack[-1][-1] if place is None else data.stack[place]
        if not isinstance(target, dict | list):
            raise ValueError(f"an item assigned to a {type(target).__name__}")
        keys = data.stack[-2:-1] if opcode == pickle.SETITEM else data.stack[::2] if opcode == pickle.SETITEMS else ()
        if not all(map(_is_plain, keys)):
            raise ValueError("a key is a container")
        load(data)

    def reduce(data: Any) -> None:
        data.made += sum(len(part) for part in data.stack[-1] if isinstance(part, str | list | tuple))
        if data.made > data.limit:  # one stored object can be used again and again
            raise ValueError(f"more than {data.limit >> 20} MiB of containers")
        load(data)

    def protocol(data: Any) -> None:
        if (found := data.read(1)) != b"\x02":
            raise ValueError(f"written with pickle protocol {found[0]}; only protocol 2, PyTorch's default, is read")

    special = {pickle.REDUCE: reduce, pickle.PROTO: protocol}
    return write if opcode in _TARGETS else special.get(opcode, load)


class PlainUnpickler(pickle._Unpickler):  # in Python: the C version allocates memory for any memo index
    """Builds plain containers; subclasses decide what becomes of a tensor's storage."""

    known = GLOBALS
    limit = MAX_PICKLE

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.made = 0

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.known:
            raise ValueError(f"{module}.{name}"[:MAX_REASON])
        return self.known[f"{module}.{name}"]

    dispatch = {opcode[0]: _checked(opcode) for opcode in _OPCODES}  # noqa: RUF012


class _Data(PlainUnpickler):
    """Reads storages into memory."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        dtype, key, count = storage_of(pid)
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            if len(content) != count * dtype.itemsize:
                raise ValueError("a tensor claims more values than are stored")
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]
