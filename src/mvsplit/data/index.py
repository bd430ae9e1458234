"""Index tar shards once: where each sample's image lies, its class and its checksum.

A plain scan of the tar headers, so that any sample can be read directly (`data/reader.py`), every rank gets equally
many, and damage is found before training: a tar cut short or with a broken header simply ends early for most readers.
"""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvsplit.utils.console import track
from mvsplit.utils.errors import UserError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
"""What is decoded. Nothing else in a shard is read, and nothing is ever unpickled."""
ROW = np.dtype([("shard", "i4"), ("offset", "i8"), ("size", "i8"), ("label", "i8"), ("crc32", "u4")])


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a list of shards, in file order.

    Attributes:
        shards: the tar files. rows: one record of `ROW` per sample.
    """

    shards: list[Path]
    rows: NDArray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Hash of all samples' checksums and classes: equal for the same data wherever it lies."""
        content = np.stack([self.rows["crc32"].astype("<i8"), self.rows["label"].astype("<i8")])
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]


def find_shards(folder: Path, pattern: str) -> list[Path]:
    """The shards that a data config names, sorted.

    Raises:
        UserError: if the folder does not exist or nothing in it matches.
    """
    if not folder.is_dir():
        raise UserError(f"data.folder = {folder}: there is no such folder")
    shards = sorted(p for p in folder.glob(pattern) if p.is_file())
    if not shards:
        raise UserError(f"data: no shards match '{pattern}' in {folder}")
    return shards


def load_index(shards: list[Path], cache: bool = True) -> ShardIndex:
    """Index the shards, or take the index kept beside them if the shards have not changed since.

    Raises:
        UserError: naming shard and sample, if a shard is damaged or a sample lacks an image or a class.
    """
    stamp = hashlib.sha256("".join(f"{p.name} {(s := p.stat()).st_size} {s.st_mtime_ns}\n" for p in shards).encode())
    kept = shards[0].parent / f".index-{stamp.hexdigest()[:16]}"
    if kept.is_file():
        digest, content = (data := kept.read_bytes())[:32], data[32:]
        if hashlib.sha256(content).digest() == digest:  # a damaged index is only a reason to make it again
            return ShardIndex(shards, np.frombuffer(content, dtype=ROW))
    parts = [scan_shard(path, number) for number, path in enumerate(track(shards, "indexing shards"))]
    rows = np.concatenate(parts)
    if not len(rows):
        raise UserError(f"data: the {len(shards)} shards in {shards[0].parent} hold no samples")
    if cache and os.access(kept.parent, os.W_OK):
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(hashlib.sha256(rows.tobytes()).digest() + rows.tobytes())
        partial.replace(kept)
    return ShardIndex(shards, rows)


def scan_shard(path: Path, number: int) -> NDArray:
    """Rows of one shard.

    Raises:
        UserError: if the tar is damaged or a sample lacks an image or a class.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    try:
        with path.open("rb") as file:
            for key, members in _samples(path, file):
                image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
                if image is None:
                    raise UserError(f"{path}: sample '{key}' has no image ({', '.join(IMAGE_SUFFIXES)})")
                if "cls" not in members:
                    raise UserError(f"{path}: sample '{key}' has no class label ({key}.cls)")
                label = _read(file, members["cls"])
                if not label.strip().isdigit() or len(label.strip()) > 9:
                    raise UserError(f"{path}: the class label of sample '{key}' is {label[:20]!r}, not a number")
                rows.append((number, image.offset_data, image.size, int(label), zlib.crc32(_read(file, image))))
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar shard ({error})") from error
    return np.array(rows, dtype=ROW)


def _read(file: io.BufferedReader, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _samples(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Consecutive members with one key (the path up to the first dot of its last part) are one sample."""
    key, end = "", 0
    members: dict[str, tarfile.TarInfo] = {}
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // 512) * 512
            if not member.isfile():
                continue
            if end > size:
                raise UserError(f"{path}: cut short inside '{member.name}'")
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            this = f"{folder}/{stem}" if folder else stem
            if this != key and members:
                yield key, members
                members = {}
            key = this
            members[suffix.lower()] = member
    if members:
        yield key, members
    # A tar ends with two blocks of zeros. Without them, or with a header that is not one, tarfile just stops.
    file.seek(end)
    if file.read(1024) != bytes(1024):
        raise UserError(f"{path}: damaged at byte {end}, after sample '{key}': neither a header nor the end of the tar")
