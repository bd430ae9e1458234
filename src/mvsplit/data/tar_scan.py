"""Scan one shard: where its samples' parts are, their classes and checksums, and everything that is wrong with it.

Sequential readers skip damage silently: a tar cut short or with a broken header simply ends early. Here every
byte is accounted for.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Annotated

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from pydantic import NonNegativeInt

from mvsplit.data.faults import DataFault, Finding
from mvsplit.data.formats import Format
from mvsplit.data.remote import is_remote
from mvsplit.data.storage import Storage
from mvsplit.data.tars import Place, ShardFindings, TarSamples, read

Columns = dict[str, NDArray]
"""`label`, and for each part `<part>.offset`, `.size` (−1: the sample has none), `.crc32`; one entry per sample."""
ScannedSample = tuple[dict[str, Place], dict[str, int], int]
"""Places and checksums of a sample's parts, and its class."""


@dataclass(frozen=True)
class Shard:
    """One tar file, or one class of an image folder.

    Attributes:
        name: relative to the set's folder.
        size: in bytes.
        stamp_ns: time of a local tar's last change when it was scanned; 0 if it is not compared.
        sha256: of the bytes of a tar, if nothing was wrong with it or it is remote; of names, sizes and times in an
            image folder.
        samples: number of samples in it.
        files: of an image folder's class, in the order of its samples.
        findings: what was wrong with it.
        ignored: number of members that are not read, by suffix.
    """

    name: str
    size: Annotated[int, Ge(0), Lt(1 << 62)] = 0
    stamp_ns: int = 0
    sha256: str = ""
    samples: NonNegativeInt = 0
    files: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)


def scan_tar(storage: Storage, folder: str, name: str, form: Format) -> tuple[Shard, Columns]:
    """Everything the index stores about a tar; what is wrong with it is among its findings."""
    scanned = _scan_tar(storage, folder, name, form)
    damaged = {finding.kind for finding in scanned[0].findings}
    if damaged and is_remote(folder) and not damaged & {"network", "cache_full"}:
        # The download may have been cut short by a server that sent no length, or the file evicted since.
        storage.discard(f"{folder}/{name}")
        scanned = _scan_tar(storage, folder, name, form)
    return scanned


def _scan_tar(storage: Storage, folder: str, name: str, form: Format) -> tuple[Shard, Columns]:
    location = f"{folder}/{name}"
    shard, found = Shard(name), ShardFindings(location)
    rows: list[ScannedSample] = []
    try:
        path = storage.local(location)
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise DataFault("missing_shard", f"{location}: not a regular file")
        if not stat.st_size:
            raise DataFault("empty_shard", f"{location}: empty file")
        with path.open("rb") as file:
            shard = Shard(name, stat.st_size, 0 if is_remote(folder) else stamp(stat))
            for key, parts, label in TarSamples(file, form.members, found, form.labelled):
                content = {part: read(file, *place) for part, place in parts.items()}
                if (damage := form.inspect(content["data"])) is not None:
                    found.add("undecodable", f"sample '{key}' cannot be decoded ({damage})")
                else:
                    rows.append((parts, {part: zlib.crc32(data) for part, data in content.items()}, label))
            if not found or is_remote(folder):  # a damaged local one is scanned again, and may be a sparse terabyte
                file.seek(0)
                shard = replace(shard, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        if not rows and not found:
            raise DataFault("empty_shard", f"{location}: contains no samples")
    except FileNotFoundError:
        found.add("missing_shard", "shard does not exist")
    except DataFault as fault:
        found.append(Finding(fault.kind, str(fault)))
    except OSError as error:
        found.add("truncated", error.strerror or str(error))
    shard = replace(shard, samples=len(rows), findings=tuple(found), ignored=dict(found.ignored))
    return shard, columns_of(rows)


def same_members(path: Path, columns: Columns, form: Format) -> bool:
    """Whether a tar's samples are where these columns place them, with their classes; their contents are not read."""
    found = ShardFindings(str(path))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        samples = TarSamples(file, form.members, found, form.labelled)
        new = columns_of([(parts, {}, label) for _, parts, label in samples])
    return not found and all(
        np.array_equal(column, columns.get(name, [])) for name, column in new.items() if not name.endswith(".crc32")
    )


def stamp(stat: os.stat_result) -> int:
    """When a file was last changed. A copy can keep one of the two times, but not both."""
    return max(stat.st_mtime_ns, stat.st_ctime_ns)


def columns_of(rows: list[ScannedSample]) -> Columns:
    """The index's columns for a shard's samples."""
    columns: Columns = {"label": np.array([label for _, _, label in rows], dtype="i8")}
    for part in sorted({part for parts, _, _ in rows for part in parts}):
        places = np.array([parts.get(part, (0, -1)) for parts, _, _ in rows], dtype="i8")
        columns[f"{part}.offset"], columns[f"{part}.size"] = places[:, 0].copy(), places[:, 1].astype("i4")
        columns[f"{part}.crc32"] = np.array([crc32.get(part, 0) for _, crc32, _ in rows], dtype="u4")
    return columns
