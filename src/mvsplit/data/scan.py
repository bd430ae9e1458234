"""Scan one shard: where its samples' parts lie, their classes and checksums, and whatever is wrong with it.

Sequential readers skip damage without a word: a tar cut short or with a broken header simply ends early. Here every
byte is accounted for. Names in a tar are labels and nothing else: nothing is ever written under them.
"""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mvsplit.data.faults import DataFault, Finding, Kind
from mvsplit.data.formats import Format
from mvsplit.data.storage import Storage, is_remote

MAX_MEMBER = 1 << 28
"""Bytes of a member that is read; larger ones are refused."""
MAX_HEADER = 1 << 20
"""Bytes of a tar header with its extensions, and of a sample's json."""
NOT_DATA = ("cls", "json", "txt")

Place = tuple[int, int]
"""(offset in the file, size) of a member's bytes."""
Columns = dict[str, NDArray]
"""`label`, and for each part `<part>.offset`, `.size` (−1: the sample has none), `.crc32`; one entry per sample."""


@dataclass(frozen=True)
class Shard:
    """One tar file, or one class of an image folder.

    Attributes:
        name: below the set's folder. size: in bytes. stamp_ns: time of a local tar's last change when it was scanned;
            0 if it is not compared. sha256: of the bytes of a tar; of names, sizes and times in an image folder.
            samples: how many it holds. files: of an image folder's class, in the order of its samples. findings: what
            was wrong with it. ignored: members that are not read, by suffix.
    """

    name: str
    size: int = 0
    stamp_ns: int = 0
    sha256: str = ""
    samples: int = 0
    files: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)


def scan_tar(storage: Storage, folder: str, name: str, form: Format) -> tuple[Shard, Columns]:
    """Everything the index holds of a tar; what is wrong with it is among its findings."""
    scanned = _scan_tar(storage, folder, name, form)
    damaged = {finding.kind for finding in scanned[0].findings}
    if damaged and is_remote(folder) and not damaged & {"network", "cache_full"}:
        # What came may have been cut on the way by a server that did not say how long it is, or evicted meanwhile.
        with suppress(OSError):
            storage.cached(f"{folder}/{name}").unlink()
        scanned = _scan_tar(storage, folder, name, form)
    return scanned


def _scan_tar(storage: Storage, folder: str, name: str, form: Format) -> tuple[Shard, Columns]:
    location = f"{folder}/{name}"
    shard, found = Shard(name), _Findings(location)
    rows: list[tuple[dict[str, Place], dict[str, int], int]] = []
    ignored: Counter[str] = Counter()
    try:
        path = storage.local(location)
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise DataFault("missing_shard", f"{location}: is no file")
        if not stat.st_size:
            raise DataFault("empty_shard", f"{location}: an empty file")
        with path.open("rb") as file:
            shard = Shard(
                name,
                size=stat.st_size,
                stamp_ns=0 if is_remote(folder) else stamp(stat),
                sha256=hashlib.file_digest(file, "sha256").hexdigest(),
            )
            for key, parts, label in _Samples(file, stat.st_size, form, found, ignored):
                content = {part: _bytes(file, place) for part, place in parts.items()}
                if (damage := form.inspect(content["data"])) is not None:
                    found.add("zeroed", f"sample '{key}': {damage}")
                else:
                    rows.append((parts, {part: zlib.crc32(data) for part, data in content.items()}, label))
        if not rows and not found:
            raise DataFault("empty_shard", f"{location}: holds no samples")
    except FileNotFoundError:
        found.add("missing_shard", "there is no such shard")
    except DataFault as fault:
        found.append(Finding(fault.kind, str(fault)))
    except OSError as error:
        found.add("truncated", error.strerror or str(error))
    shard = replace(shard, samples=len(rows), findings=tuple(found), ignored=dict(ignored))
    return shard, _columns(rows)


def scan_folder(folder: str, name: str, files: tuple[str, ...], label: int, form: Format) -> tuple[Shard, Columns]:
    """The same for one class of an image folder, whose pictures are these files."""
    root = Path(folder, name)
    found = _Findings(str(root))
    rows: list[tuple[dict[str, Place], dict[str, int], int]] = []
    whole: list[str] = []
    for file in files:
        try:
            data = (root / file).read_bytes()
        except OSError as error:
            found.add("missing_member", f"{file}: {error.strerror or error}")
            continue
        if not data or (damage := form.inspect(data)) is not None:
            found.add("zeroed", f"{file}: {damage if data else 'an empty file'}")
            continue
        rows.append(({"data": (0, len(data))}, {"data": zlib.crc32(data)}, label))
        whole.append(file)
    shard = Shard(name, len(files), 0, folder_digest(root, files), len(rows), tuple(whole), tuple(found))
    return shard, _columns(rows)


def stamp(stat: os.stat_result) -> int:
    """When a file was last changed. A copy can keep the one time, but not the other."""
    return max(stat.st_mtime_ns, stat.st_ctime_ns)


def folder_digest(root: Path, files: tuple[str, ...]) -> str:
    """Hash of the files' names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):
            stat = (root / file).stat()
            digest.update(f"{file} {stat.st_size} {stamp(stat)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class _Findings(list[Finding]):
    """Findings of one shard."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.location = location

    def add(self, kind: Kind, what: str) -> None:
        self.append(Finding(kind, f"{self.location}: {what}"))


def _columns(rows: list[tuple[dict[str, Place], dict[str, int], int]]) -> Columns:
    columns: Columns = {"label": np.array([label for _, _, label in rows], dtype="i8")}
    for part in sorted({part for parts, _, _ in rows for part in parts}):
        places = np.array([parts.get(part, (0, -1)) for parts, _, _ in rows], dtype="i8")
        columns[f"{part}.offset"], columns[f"{part}.size"] = places[:, 0].copy(), places[:, 1].astype("i4")
        columns[f"{part}.crc32"] = np.array([crc32.get(part, 0) for _, crc32, _ in rows], dtype="u4")
    return columns


def _bytes(file: IO[bytes], place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


class _Bounded:
    """A file for `tarfile`, which would read extended headers of any length into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class _Samples:
    """Iterates over a tar's samples as (key, {part: place}, label); faults go to `found`.

    Consecutive members with one key (the path up to the first dot of its last part) are one sample.
    """

    def __init__(self, file: IO[bytes], size: int, form: Format, found: _Findings, ignored: Counter[str]) -> None:
        self.file, self.size, self.found, self.ignored = file, size, found, ignored
        self.part_of = {suffix: part for part, suffixes in form.members.items() for suffix in suffixes}
        self.key, self.broken = "", True

    def __iter__(self) -> Iterator[tuple[str, dict[str, Place], int]]:
        members: dict[str, Place] | None = {}  # of one sample; None once one of them was bad
        for member in self._members():
            key, suffix = split_name(member.name)
            if key != self.key:
                yield from self._sample(members)
                self.key, members = key, {}
            problem = member_problem(member)
            if members is not None and suffix in members:
                problem = "comes twice"
            if problem:
                self.found.add("bad_member", f"member {member.name[:80]!r} {problem}")
                members = None
            elif members is not None:
                members[suffix] = (member.offset_data, member.size)
        told = len(self.found)
        yield from self._sample(members)
        if self.broken:  # that the last sample lacks something is the same damage
            del self.found[told:]

    def _members(self) -> Iterator[tarfile.TarInfo]:
        end = 0
        self.file.seek(0)
        try:
            with tarfile.open(fileobj=_Bounded(self.file), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    tar.members = []  # it would keep them all
                    if member.size < 0 or tar.offset <= member.offset or member.offset < end:
                        # Some versions of `tarfile` would read such a header for ever.
                        self.found.add("bad_header", f"damaged at byte {end}: a member of {member.size} bytes")
                        return
                    end = tar.offset
                    if end > self.size:
                        self.found.add("truncated", f"cut short inside {member.name[:80]!r}")
                        return
                    if not member.isdir():
                        yield member
        except (tarfile.TarError, ValueError, RecursionError, OverflowError, EOFError) as error:
            self.found.add("bad_header", f"not a readable tar shard, at byte {end} ({str(error)[:80]})")
            return
        # A tar ends with two blocks of zeros. Without them, or with a header that is not one, tarfile just stops.
        rest = _bytes(self.file, (end, 1024))
        self.broken = rest != bytes(1024)
        if self.broken:
            cut = len(rest) < 512 or not any(rest)
            self.found.add(
                "truncated" if cut else "bad_header",
                f"damaged at byte {end}, after sample '{self.key}': neither a header nor the end of the tar",
            )
            return
        # Two zeroed blocks in the middle look like the end: behind the real one there is only a record's padding.
        self.file.seek(end)
        while data := self.file.read(MAX_HEADER):
            if any(data):
                self.broken = True
                self.found.add("bad_header", f"zeros at byte {end}, after sample '{self.key}', with more data behind")
                return
        if self.size - end > 2 * tarfile.RECORDSIZE:
            self.broken = True
            self.found.add("truncated", f"nothing but zeros from byte {end} on, after sample '{self.key}'")

    def _sample(self, members: dict[str, Place] | None) -> Iterator[tuple[str, dict[str, Place], int]]:
        if not members:
            return
        parts: dict[str, Place] = {}
        for suffix, place in members.items():
            part = self.part_of.get(suffix)
            if part in parts:
                self.found.add("bad_member", f"sample '{self.key}' has two members for its {part}")
                return
            if part is not None:
                parts[part] = place
            elif suffix not in NOT_DATA:
                self.ignored[suffix[:20]] += 1
        if "data" not in parts:
            names = ", ".join(suffix for suffix, part in self.part_of.items() if part == "data")
            has = ", ".join(suffix[:20] for suffix in members)
            self.found.add("missing_member", f"sample '{self.key}' has no image or latent ({names}), only {has!r}")
            return
        try:
            about = parse_json(self._read(members.get("json")))
            label = parse_label(self._read(members.get("cls")), about)
        except DataFault as fault:
            self.found.add(fault.kind, f"sample '{self.key}' {fault}")
            return
        if "txt" in members:
            parts["txt"] = members["txt"]
        elif isinstance(about.get("caption"), str):
            parts["json"] = members["json"]
        yield self.key, parts, label

    def _read(self, place: Place | None) -> bytes | None:
        return None if place is None else _bytes(self.file, (place[0], min(place[1], MAX_HEADER)))


def parse_json(data: bytes | None) -> dict[str, Any]:
    """A sample's json; empty if it has none.

    Raises:
        DataFault: saying what is wrong, for a line that begins with the sample.
    """
    try:
        about = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError):
        raise DataFault("bad_member", "has a .json that is none") from None
    return about if isinstance(about, dict) else {}


def parse_label(cls: bytes | None, about: dict[str, Any]) -> int:
    """The class of a sample: its `cls`, else `label` in its json.

    Raises:
        DataFault: like `parse_json`.
    """
    if cls is not None:
        text = cls.strip()
        if not text.isdigit() or len(text) > 9:
            raise DataFault("bad_member", f"has the class label {text[:20]!r}, not a number")
        return int(text)
    label = about.get("label")
    if type(label) is int and 0 <= label < 10**9:
        return label
    raise DataFault("missing_label", "has no class label (.cls, or `label` in .json)")


def split_name(name: str) -> tuple[str, str]:
    """A member's key and lower-case suffix: `a/b.c.JPG` → (`a/b`, `c.jpg`)."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def member_problem(member: tarfile.TarInfo) -> str | None:
    """Why a member is not read; None if it may be."""
    if not member.isreg() or member.issparse():
        return "is no plain file"
    if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
        return "has an unsafe name"
    if not member.name.isprintable():
        return "has unprintable characters in its name"
    if member.size > MAX_MEMBER:
        return f"has {member.size} bytes; {MAX_MEMBER} are allowed"
    return None
