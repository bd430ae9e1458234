"""The index of a set: for each sample its shard, where in it, class and checksum; and the file it is stored in.

The index is one safetensors file. `data/indexing.py` builds it.
"""

import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter

from mvsplit.data.faults import Finding
from mvsplit.data.storage import Storage
from mvsplit.data.tar_scan import Columns, Shard
from mvsplit.data.tars import MAX_MEMBER, NO_CLASS, Place, split_name
from mvsplit.utils.console import info_once
from mvsplit.utils.files import whole_file

VERSION = 1
DTYPES = {"label": "i8", "offset": "i8", "size": "i4", "crc32": "u4"}
"""Types of the columns, by the last part of their names."""
SHARDS = TypeAdapter(list[Shard])
WHOLE_SHARD = {"truncated", "bad_header", "missing_shard", "empty_shard", "network", "cache_full"}
Part = tuple[Shard, Columns]
"""The entries of one shard."""


class Row(NamedTuple):
    """One sample in an index.

    Attributes:
        shard: that contains it.
        location: path or address of the file that contains it.
        columns: that describe it.
        row: in these columns.
    """

    shard: Shard
    location: str
    columns: Columns
    row: int

    @property
    def label(self) -> int:
        return int(self.columns["label"][self.row])

    def place(self, part: str) -> Place:
        """Offset in the file and size of one part; the size is −1 if the sample has no such part."""
        if f"{part}.offset" not in self.columns:
            return 0, -1
        return int(self.columns[f"{part}.offset"][self.row]), int(self.columns[f"{part}.size"][self.row])

    def crc32(self, part: str) -> int:
        return int(self.columns[f"{part}.crc32"][self.row])


def location_of(folder: str, shard: Shard, number: int) -> str:
    """Path or address of the file that contains sample `number` of a shard."""
    name = f"{folder}/{shard.name}"
    return f"{name}/{shard.files[number]}" if shard.files else name


class Index(ABC):
    """Samples by number.

    Attributes:
        folder: path or address that the shards' names are relative to.
        parts: that at least one sample has.
        fingerprint: equal for the same samples with the same numbers.
    """

    folder: str
    parts: set[str]
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> Row:
        """The entry of sample `number`."""

    @abstractmethod
    def substitute(self, number: int, attempt: int, draw: int) -> int:
        """A sample to try in the place of sample `number`, chosen by the random number `draw`."""

    @abstractmethod
    def shard(self, number: int) -> Shard:
        """Shard number `number`."""

    @property
    @abstractmethod
    def scanned(self) -> Sequence[Shard]:
        """The shards that have been indexed."""

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with them."""
        return [finding for shard in self.scanned for finding in shard.findings]

    def location(self, number: int) -> str:
        """Path or address of the file that contains sample `number`."""
        return self.row(number).location

    def key(self, storage: Storage, number: int) -> str:
        """The name of sample `number`: its shard and, where the tar can still be read, its key."""
        row = self.row(number)
        offset, _ = row.place("data")
        name = row.location.removeprefix(f"{self.folder}/")
        if not offset:
            return name
        try:
            file = os.open(storage.cached(row.location), os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(file, "rb", buffering=0):
                header = os.pread(file, 512, offset - 512)  # right before the data
            return f"{name}:{split_name(tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name)[0]}"
        except (OSError, tarfile.TarError):
            return f"{name}:byte {offset}"


def parts_in(columns: Columns) -> set[str]:
    """Parts that at least one of the samples has."""
    return {name.partition(".")[0] for name in columns if name.endswith(".size")}


@dataclass(frozen=True)
class ShardIndex(Index):
    """The samples of a list of shards, in file order.

    Attributes:
        shards: see `data/tar_scan.py`.
        columns: likewise, of all shards in a row.
    """

    folder: str
    shards: list[Shard]
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["label"])

    @cached_property
    def parts(self) -> set[str]:  # type: ignore[override]
        return parts_in(self.columns)

    @cached_property
    def shard_of(self) -> NDArray:
        """Number of each sample's shard."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), [s.samples for s in self.shards])

    @cached_property
    def starts(self) -> NDArray:
        """Number of each shard's first sample, and at the end the number of all samples."""
        return np.cumsum([0, *(s.samples for s in self.shards)])

    @property
    def scanned(self) -> Sequence[Shard]:
        return self.shards

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Hash of all samples' checksums and classes: equal for the same data wherever it is stored."""
        return fingerprint(self.columns)

    def row(self, number: int) -> Row:
        number_of_shard = int(self.shard_of[number])
        shard = self.shards[number_of_shard]
        location = location_of(self.folder, shard, number - int(self.starts[number_of_shard]))
        return Row(shard, location, self.columns, number)

    def shard(self, number: int) -> Shard:
        return self.shards[number]

    def substitute(self, number: int, attempt: int, draw: int) -> int:
        return draw % len(self)

    def first(self, count: int) -> "ShardIndex":
        """Only the first `count` samples."""
        counts = np.clip(count - self.starts[:-1], 0, np.diff(self.starts)).tolist()
        shards = [replace(shard, samples=n) for shard, n in zip(self.shards, counts, strict=True)]
        return ShardIndex(self.folder, shards, {name: column[:count] for name, column in self.columns.items()})


def fingerprint(columns: Columns) -> str:
    """Hash of all samples' checksums and classes."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        if name == "label" or name.endswith(".crc32"):
            digest.update(name.encode() + column.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def lost_samples(shards: Sequence[Shard]) -> int:
    """About how many samples are lost to the findings: one each; a damaged shard as many as the others contain."""
    whole = [s.samples for s in shards if not s.findings] or [1]
    lost = 0
    for shard in shards:
        kinds = [f.kind for f in shard.findings]
        lost += sum(kind not in WHOLE_SHARD for kind in kinds)
        if WHOLE_SHARD.intersection(kinds):
            lost += max(1, round(sum(whole) / len(whole)) - shard.samples)
    return lost


def merge(folder: str, parts: list[Part]) -> ShardIndex:
    """The index of several shards."""
    dtypes = {name: column.dtype for _, columns in parts for name, column in columns.items()}
    columns = {}
    for name, dtype in sorted(dtypes.items()):
        absent = -1 if name.endswith(".size") else 0
        pieces = [part.get(name, np.full(shard.samples, absent, dtype)) for shard, part in parts]
        columns[name] = np.concatenate(pieces)
    return ShardIndex(folder, [shard for shard, _ in parts], columns or {"label": np.zeros(0, "i8")})


def split(index: ShardIndex) -> Iterator[Part]:
    """Inverse of `merge`."""
    for shard, start in zip(index.shards, index.starts.tolist(), strict=False):
        yield shard, {name: column[start : start + shard.samples] for name, column in index.columns.items()}


def write_index(path: Path, index: ShardIndex) -> None:
    """Write the index in one safetensors file, atomically."""
    shards = [vars(shard) for shard in index.shards]
    about = json.dumps({"version": VERSION, "shards": shards, "digest": _digest(index.columns, shards)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(safetensors.numpy.save(index.columns, metadata={"index": about}))  # with the user's own permissions


def keep_index(path: Path, index: ShardIndex) -> None:
    """Write the index if that is possible, else log why it is not."""
    try:
        write_index(path, index)
    except OSError as error:
        reason = error.strerror or error
        info_once(f"data: the index cannot be stored ({path}: {reason}); the shards are indexed again each time")


def read_index(path: Path, folder: str) -> ShardIndex | None:
    """A stored index; None if there is none or a scan could not have produced it: the shards are indexed again then.

    The file may come from anywhere: what it claims is compared with its own size before anything is allocated.
    """
    try:
        if not path.is_file():  # a pipe in its place would block
            return None
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["index"])
            shards = SHARDS.validate_python(about["shards"])
            total = sum(shard.samples for shard in shards)
            names = file.keys()
            for column in map(file.get_slice, names):
                if column.get_shape() != [total]:
                    return None
            columns = {name: file.get_tensor(name) for name in names}
        index = ShardIndex(folder, shards, columns)
        whole = about["version"] == VERSION and about["digest"] == _digest(columns, [vars(shard) for shard in shards])
        return index if whole and _consistent(index) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError, safetensors.SafetensorError):
        return None


def _consistent(index: ShardIndex) -> bool:
    """Whether every sample is inside its shard."""
    columns = index.columns
    dtypes = {name: DTYPES[name.rpartition(".")[2]] for name in columns}
    if any(column.dtype != dtypes[name] for name, column in columns.items()) or (columns["label"] < NO_CLASS).any():
        return False
    for shard in index.shards:
        if shard.samples * tarfile.BLOCKSIZE > shard.size if not shard.files else shard.samples != len(shard.files):
            return False
    limits = np.array([MAX_MEMBER if shard.files else shard.size for shard in index.shards], "i8")[index.shard_of]
    for part in index.parts | {"data"} if len(index) else set():
        offset, size, _ = (columns[f"{part}.{name}"] for name in ("offset", "size", "crc32"))
        if (offset < 0).any() or (size < -1).any() or (size > MAX_MEMBER).any() or (size > limits - offset).any():
            return False
    return True


def _digest(columns: Columns, shards: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(shards, sort_keys=True).encode())
    for name in sorted(columns):
        digest.update(name.encode() + columns[name].tobytes())
    return digest.hexdigest()
