"""Members and samples of a tar, in order, with every byte accounted for.

Not by `tarfile` itself, which stops silently at damage, reads extended headers of any length into memory, and
takes hours and gigabytes for some of 64 KB. Names are labels and nothing else: nothing is ever written under them.
"""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any

from mvsplit.data.faults import DataFault, Finding, Kind

MAX_MEMBER = 1 << 28
"""Largest member that is read, in bytes."""
MAX_HEADER = 1 << 16
"""Largest size of all extended headers of one member, in bytes."""
MAX_JSON = 1 << 20
"""Largest json of a sample, in bytes."""
BLOCK = tarfile.BLOCKSIZE
RECORDS = [1 << bits for bits in range(9, 21)]
"""Record sizes in bytes that `tar -b` may pad to, besides the usual 10,240."""
RECORD = re.compile(rb"(\d{1,5}) ([^=\n]{1,200})=")
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
NOT_DATA = ("cls", "json", "txt")
NO_CLASS = -1
"""Label of a sample without a class, in sets that need none."""

Place = tuple[int, int]
"""(offset in the file, size) of a member's bytes."""


def members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """All members of a tar of `size` bytes but folders; `offset_data` and `size` of each locate its bytes.

    Raises:
        DataFault: `truncated` or `bad_header`, with the place; all members before it were whole.
    """
    place, last = 0, tarfile.TarInfo()
    while (member := _next(file, place, f", after {last.name[:80]!r}" * bool(place))) is not None:
        place = member.offset_data
        if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
            place += -(-member.size // BLOCK) * BLOCK
        if place > size:
            raise DataFault("truncated", f"cut short inside {member.name[:80]!r}")
        last = member
        if not member.isdir():
            yield member
    _check_end(file, size, place, last)


def _check_end(file: IO[bytes], size: int, place: int, last: tarfile.TarInfo) -> None:
    """A tar ends with two blocks of zeros, and more of them up to a whole record, but with nothing else.

    The rest of a tar that was never written to disk is zeros too. It is found unless it begins between two members, is
    shorter than a record, and the file's size is a multiple of the record.
    """
    rest = read(file, place, 2 * BLOCK + RECORDS[-1])
    after = f", after {last.name[:80]!r}" * bool(place)
    if len(rest) < 2 * BLOCK:
        kind: Kind = "truncated" if place else "bad_header"
        raise DataFault(kind, f"damaged at byte {place}{after}: neither a header nor the end of the tar")
    if rest.strip(b"\0"):
        raise DataFault("bad_header", f"zeros at byte {place}{after}, followed by more data")
    if (zeros := size - place) > 2 * tarfile.RECORDSIZE:
        tail = read(file, last.offset_data + max(0, last.size - 16), min(last.size, 16))
        fits = any(zeros - 2 * BLOCK < record and size % record == 0 for record in RECORDS)
        if not fits or (tail and not any(tail)):
            raise DataFault("truncated", f"nothing but zeros from byte {place}{after}")


def _next(file: IO[bytes], place: int, after: str) -> tarfile.TarInfo | None:
    """The member whose header, with its extensions, is at `place`; None at a block of zeros or the end of the file."""
    begin, fields = place, dict[bytes, bytes]()
    while True:
        block = read(file, place, BLOCK)
        if place == begin and (len(block) < BLOCK or not any(block)):
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            place += BLOCK
            extends = member.type in (*LONG_NAMES, *PAX)
            if member.size < 0 or (place - begin + member.size * extends) > MAX_HEADER:
                raise ValueError(f"{'header' if extends else 'member'} of {member.size} bytes")
            if not extends:
                break
            content = read(file, place, member.size)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                fields[b"path"] = content.partition(b"\0")[0]
            elif member.type != tarfile.XGLTYPE:  # a header for all members holds nothing for a single one
                fields |= _pax(content) if member.type in PAX else {}
        except (tarfile.HeaderError, ValueError) as error:
            kind: Kind = "truncated" if len(block) < BLOCK else "bad_header"
            what = f"neither a header nor the end of the tar ({error})"
            raise DataFault(kind, f"damaged at byte {place}{after}: {what}") from None
        place += -(-member.size // BLOCK) * BLOCK
    more = member.type == tarfile.GNUTYPE_SPARSE and block[482]
    while more and place - begin <= MAX_HEADER:
        block, place = read(file, place, BLOCK), place + BLOCK
        more = len(block) == BLOCK and block[504]
    if any(key.startswith(b"GNU.sparse.") for key in fields) or member.type == tarfile.GNUTYPE_SPARSE:
        member.sparse = b""  # marks it as sparse
    member.size = int(fields.get(b"size", member.size))
    member.name = fields.get(b"path", b"").decode("utf-8", "surrogateescape").rstrip("/") or member.name
    member.offset_data = place
    return member


def _pax(content: bytes) -> dict[bytes, bytes]:
    """The fields of a pax header: records of `<length> <key>=<value>\\n`."""
    fields, place = dict[bytes, bytes](), 0
    while place < len(content):
        found = RECORD.match(content, place)
        end = place + int(found[1]) if found else 0
        if not found or end <= found.end() or content[end - 1 : end] != b"\n":
            raise ValueError("invalid pax header")
        fields[found[2]] = content[found.end() : end - 1]
        place = end
    if not re.fullmatch(rb"\d{1,18}", fields.get(b"size", b"0")):
        raise ValueError("invalid size in a pax header")
    return fields


def member_problem(member: tarfile.TarInfo) -> str | None:
    """Why a member must not be read; None if it may be."""
    if not member.isreg() or member.issparse():
        return "is not a regular file"
    if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
        return "has an unsafe name"
    if not member.name.isprintable():
        return "has unprintable characters in its name"
    if member.size > MAX_MEMBER:
        return f"has {member.size} bytes; at most {MAX_MEMBER} are allowed"
    return None


def split_name(name: str) -> tuple[str, str]:
    """A member's key and lower-case suffix: `a/b.c.JPG` → (`a/b`, `c.jpg`)."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def read(file: IO[bytes], place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


class ShardFindings(list[Finding]):
    """What is wrong with one shard; `ignored` counts its members that are never read, by suffix."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.location, self.ignored = location, Counter[str]()

    def add(self, kind: Kind, what: str) -> None:
        self.append(Finding(kind, f"{self.location}: {what}"))


class TarSamples:
    """Iterates over a tar's samples as (key, {part: place}, label).

    Consecutive members with one key (the path up to the first dot of its last part) are one sample.

    Args:
        suffixes: of each part that a format reads; the part `data` is required.
        found: damage is added here; samples that it affects are left out.
        labelled: a sample without a valid class is damaged; else it gets the label `NO_CLASS`.
    """

    def __init__(
        self, file: IO[bytes], suffixes: Mapping[str, tuple[str, ...]], found: ShardFindings, labelled: bool = True
    ) -> None:
        self.file, self.found, self.labelled = file, found, labelled
        self.part_of = {suffix: part for part, names in suffixes.items() for suffix in names}
        self.key, self.keys = "", set[str]()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Place], int]]:
        sample: dict[str, Place] | None = {}  # members of one sample; None once one of them was bad
        broken = False
        try:
            for member in members(self.file, os.fstat(self.file.fileno()).st_size):
                key, suffix = split_name(member.name)
                if key != self.key:
                    yield from self._sample(sample)
                    self.key, sample = key, {}
                    if key in self.keys:
                        self.found.add("bad_member", f"sample '{key}' occurs again: its members must be adjacent")
                        sample = None
                    self.keys.add(key)
                problem = member_problem(member)
                if sample is not None and suffix in sample:
                    problem = "occurs twice"
                if problem:
                    self.found.add("bad_member", f"member {member.name[:80]!r} {problem}")
                    sample = None
                elif sample is not None:
                    sample[suffix] = (member.offset_data, member.size)
        except DataFault as fault:
            broken = True
            self.found.add(fault.kind, str(fault))
        before = len(self.found)
        yield from self._sample(sample)
        if broken:  # that the last sample is incomplete is the same damage
            del self.found[before:]

    def _sample(self, sample: dict[str, Place] | None) -> Iterator[tuple[str, dict[str, Place], int]]:
        if not sample:
            return
        parts: dict[str, Place] = {}
        for suffix, place in sample.items():
            part = self.part_of.get(suffix)
            if part in parts:
                self.found.add("bad_member", f"sample '{self.key}' has two members for its {part}")
                return
            if part is not None:
                parts[part] = place
            elif suffix not in NOT_DATA:
                self.found.ignored[suffix[:20]] += 1
        if "data" not in parts:
            names = ", ".join(suffix for suffix, part in self.part_of.items() if part == "data")
            has = ", ".join(suffix[:20] for suffix in sample)
            self.found.add("missing_member", f"sample '{self.key}' has no image or latent ({names}), only {has!r}")
            return
        try:
            about = parse_json(self._read(sample.get("json")))
            label = self._label(self._read(sample.get("cls")), about)
        except DataFault as fault:
            self.found.add(fault.kind, f"sample '{self.key}' {fault}")
            return
        if "txt" in sample:
            parts["txt"] = sample["txt"]
        elif isinstance(about.get("caption"), str):
            parts["json"] = sample["json"]
        yield self.key, parts, label

    def _label(self, cls: bytes | None, about: dict[str, Any]) -> int:
        try:
            return parse_label(cls, about)
        except DataFault:
            if self.labelled:
                raise
            return NO_CLASS

    def _read(self, place: Place | None) -> bytes | None:
        return None if place is None else read(self.file, place[0], min(place[1], MAX_JSON + 1))


def parse_json(data: bytes | None) -> dict[str, Any]:
    """A sample's json; empty if it has none.

    Raises:
        DataFault: with the end of a line that begins with the sample.
    """
    if data is not None and len(data) > MAX_JSON:
        raise DataFault("bad_member", f"has a .json of more than {MAX_JSON} bytes")
    try:
        about = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError):
        raise DataFault("bad_member", "has an invalid .json") from None
    return about if isinstance(about, dict) else {}


def parse_caption(txt: bytes | None, json_: bytes | None) -> str | None:
    """The caption of a sample: its `txt`, else `caption` in its json; None without one. What is not UTF-8 is replaced.

    Raises:
        DataFault: like `parse_json`.
    """
    if txt is not None:
        return txt.decode(errors="replace")
    caption = parse_json(json_).get("caption")
    # A json can contain halves of characters, which cannot be written.
    return caption.encode(errors="replace").decode() if isinstance(caption, str) else None


def parse_label(cls: bytes | None, about: dict[str, Any]) -> int:
    """The class of a sample: its `cls`, else `label` in its json.

    Raises:
        DataFault: like `parse_json`.
    """
    if cls is not None:
        text = cls.strip()
        if not text.isdigit() or len(text) > 9:
            raise DataFault("bad_member", f"has the class label {text[:20]!r}, which is not a number")
        return int(text)
    label = about.get("label")
    if type(label) is int and 0 <= label < 10**9:
        return label
    raise DataFault("missing_label", "has no class label (.cls, or `label` in .json)")
