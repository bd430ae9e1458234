"""Index a set's shards once, so that any sample can be read directly and every rank gets equally many.

The index is one safetensors file: beside the shards if this project wrote them, else in the cache. Shards that have
changed since, and those that an interruption left out, are scanned again.
"""

import hashlib
import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mvsplit.data.faults import FaultPolicy, Finding
from mvsplit.data.formats import Format, Manifest
from mvsplit.data.scan import MAX_MEMBER, Columns, Shard, folder_digest, scan_folder, scan_tar, split_name, stamp
from mvsplit.data.storage import CONNECTIONS, Storage, expand_braces, is_remote
from mvsplit.utils.console import progress, say, say_once
from mvsplit.utils.errors import UserError

VERSION = 1
SAVE_EVERY_S = 30.0
WHOLE_SHARD = {"truncated", "bad_header", "missing_shard", "empty_shard", "network", "cache_full"}
Layout = Literal["shards", "folders"]


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a list of shards, in file order.

    Attributes:
        folder: path or address that the shards' names are relative to. shards, columns: see `data/scan.py`.
    """

    folder: str
    shards: list[Shard]
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["label"])

    @property
    def parts(self) -> set[str]:
        """Parts that at least one sample has."""
        return {name.partition(".")[0] for name in self.columns if name.endswith(".size")}

    @cached_property
    def shard_of(self) -> NDArray:
        """Number of each sample's shard."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), [s.samples for s in self.shards])

    @cached_property
    def starts(self) -> NDArray:
        """Number of each shard's first sample, and at the end how many there are."""
        return np.cumsum([0, *(s.samples for s in self.shards)])

    @property
    def findings(self) -> list[Finding]:
        return [finding for shard in self.shards for finding in shard.findings]

    @property
    def fingerprint(self) -> str:
        """Hash of all samples' checksums and classes: equal for the same data wherever it lies."""
        digest = hashlib.sha256()
        for name, column in sorted(self.columns.items()):
            if name == "label" or name.endswith(".crc32"):
                digest.update(name.encode() + column.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def location(self, number: int) -> str:
        """Path or address of the file that holds sample `number`."""
        shard = int(self.shard_of[number])
        name = f"{self.folder}/{self.shards[shard].name}"
        files = self.shards[shard].files
        return f"{name}/{files[number - int(self.starts[shard])]}" if files else name

    def key(self, storage: Storage, number: int) -> str:
        """What to call sample `number`: its shard and, where the tar can still be read, its key."""
        location, offset = self.location(number), int(self.columns["data.offset"][number])
        name = location.removeprefix(f"{self.folder}/")
        if not offset:
            return name
        try:
            file = os.open(storage.cached(location), os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(file, "rb", buffering=0):
                header = os.pread(file, 512, offset - 512)  # right before the data
            return f"{name}:{split_name(tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name)[0]}"
        except (OSError, tarfile.TarError):
            return f"{name}:byte {offset}"

    def first(self, count: int) -> "ShardIndex":
        """Only the first so many samples."""
        counts = np.clip(count - self.starts[:-1], 0, np.diff(self.starts)).tolist()
        shards = [replace(shard, samples=n) for shard, n in zip(self.shards, counts, strict=True)]
        return ShardIndex(self.folder, shards, {name: column[:count] for name, column in self.columns.items()})

    def lost(self) -> int:
        """About how many samples the findings have cost: one each, for a damaged shard what the others hold."""
        whole = [s.samples for s in self.shards if not s.findings] or [1]
        lost = 0
        for shard in self.shards:
            kinds = [f.kind for f in shard.findings]
            lost += sum(kind not in WHOLE_SHARD for kind in kinds)
            if WHOLE_SHARD.intersection(kinds):
                lost += max(1, round(sum(whole) / len(whole)) - shard.samples)
        return lost


def load_index(
    storage: Storage,
    folder: str,
    pattern: str,
    form: Format,
    policy: FaultPolicy | None = None,
    layout: Layout = "shards",
    classes: Sequence[str] | None = None,
) -> ShardIndex:
    """The index of the shards that a pattern names: the kept one, brought up to date.

    Args:
        classes: of an image folder: those that it may have, in the order of their numbers; by default its own.

    Raises:
        UserError: if there is nothing to index, or the policy does not bear what is damaged.
    """
    policy, folder = policy or FaultPolicy(), clean_folder(folder)
    scan: Callable[[str], tuple[Shard, Columns]]
    if layout == "folders":
        files = _pictures(Path(folder, pattern), form, classes)
        names = [f"{pattern}/{name}" for name in files]
        labels = {f"{pattern}/{name}": i for i, name in enumerate(classes or files)}

        def scan(name: str) -> tuple[Shard, Columns]:
            return scan_folder(folder, name, files[name.removeprefix(f"{pattern}/")], labels[name], form)
    else:
        names = _named(storage, folder, pattern)

        def scan(name: str) -> tuple[Shard, Columns]:
            return scan_tar(storage, folder, name, form)

    key = json.dumps([folder, names, sorted(form.members.items())])
    place = storage.cache_dir / "indices" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    known = former = _known(read_index(place, folder), layout)
    if layout == "folders":
        digests = {name: folder_digest(Path(folder, name), files[Path(name).name]) for name in names}
        known = {name: part for name, part in known.items() if part[0].sha256 == digests.get(name)}
    else:
        beside = _beside(storage, folder, own_index(pattern))
        if is_remote(folder) or (beside.exists() and not (place.exists() and _newer(place, beside))):
            own = _known(read_index(beside, folder), layout)
            former = known | own
            known = known | {n: part for n, part in own.items() if is_remote(folder) or _adopt(part[0], folder, beside)}
    known = {name: (_stamped(shard, folder), columns) for name, (shard, columns) in known.items()}
    index = _updated(folder, names, known, former, scan, policy, place)
    _judge(index, policy)
    return index


def _updated(
    folder: str,
    names: list[str],
    known: dict[str, tuple[Shard, Columns]],
    former: dict[str, tuple[Shard, Columns]],
    scan: Callable[[str], tuple[Shard, Columns]],
    policy: FaultPolicy,
    place: Path,
) -> ShardIndex:
    """Scan what is not known, keeping the index from time to time: an interruption costs no more.

    Args:
        known: what may still hold. former: what was known before, for shards that have been damaged since.
    """
    stale = [name for name in names if not _holds(known.get(name), folder, name)]
    # What is saved of a shard that was not scanned yet must not pass for what it is now: no file has this stamp.
    done = {name: (replace(shard, stamp_ns=1), columns) for name, (shard, columns) in former.items()} | known
    if not stale:
        return merge(folder, [done[name] for name in names])

    def save() -> None:
        try:
            write_index(place, merge(folder, [done[name] for name in names if name in done]))
        except OSError as error:
            say(f"data: the index cannot be kept ({place}: {error.strerror or error}); it is made anew each time")

    saved = time.monotonic()
    pool = ThreadPoolExecutor(CONNECTIONS if is_remote(folder) else 1)
    scanned = pool.map(scan, stale)
    try:
        with progress(f"indexing {folder}, shards", len(names), len(names) - len(stale)) as advance:
            for name in stale:
                new, old = next(scanned), former.get(name)
                if new[0].findings and policy.action == "fatal":
                    raise UserError(new[0].findings[0].message)
                if new[0].findings and old is not None and old[0].samples > new[0].samples:
                    # Damaged since: its samples keep their numbers, and reading them tells what is gone.
                    gone = old[0].samples - new[0].samples
                    say_once(f"data: {new[0].findings[0].message}; of the indexed samples {gone} are gone")
                    new = old
                done[name] = new
                advance(1)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    save()
                    saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        save()
    return merge(folder, [done[name] for name in names])


def _holds(known: tuple[Shard, Columns] | None, folder: str, name: str) -> bool:
    """Whether what is known of a shard still holds, by size and time; its samples are verified as they are read."""
    if known is None or known[0].findings:
        return False
    if is_remote(folder):
        return True
    if known[0].files:  # compared with the listing already
        return True
    try:
        stat = os.stat(f"{folder}/{name}")
    except OSError:
        return False
    return stat.st_size == known[0].size and known[0].stamp_ns == stamp(stat)


def _known(index: ShardIndex | None, layout: Layout) -> dict[str, tuple[Shard, Columns]]:
    # A tar's entry that lists files would lead to other places.
    return {s.name: (s, c) for s, c in split(index) if layout == "folders" or not s.files} if index is not None else {}


def _newer(one: Path, other: Path) -> bool:
    return stamp(one.stat()) > stamp(other.stat())


def _adopt(shard: Shard, folder: str, beside: Path) -> bool:
    """Whether an index that was written with its shards still speaks of this one: it is not the younger."""
    path = Path(folder, shard.name)
    return not path.exists() or not _newer(path, beside)


def _stamped(shard: Shard, folder: str) -> Shard:
    """An index written with its shards knows no times: it must hold where they are copied to. From here on it does."""
    if shard.stamp_ns or shard.files or is_remote(folder):
        return shard
    with suppress(OSError):
        return replace(shard, stamp_ns=stamp(os.stat(f"{folder}/{shard.name}")))
    return shard


def _named(storage: Storage, folder: str, pattern: str) -> list[str]:
    """Names of a set's shards; with wildcards also of those that its manifest names and that are not there.

    Raises:
        UserError: if there are others, or `src/encode.py` has not finished them.
    """
    names = [location.removeprefix(f"{folder}/") for location in storage.expand(folder, pattern)]
    for begun in sorted({name.rpartition("-")[0] for name in names if Path(folder, f".encode/{name}.json").exists()}):
        if not Path(folder, f"{begun}.manifest.json").exists():
            raise UserError(f"data.folder = {folder}: src/encode.py has not finished '{begun}'; run it again")
    manifest = read_manifest(storage, folder, pattern)
    if manifest is None or expand_braces(pattern) != [pattern] or not any(c in pattern for c in "*?["):
        return names
    shards = manifest.get("shards")
    listed = [str(s.get("name")) for s in shards if isinstance(s, dict)] if isinstance(shards, list) else []
    listed = [name for name in listed if fnmatch(name, pattern) and "/" not in name]
    if listed and (others := sorted(set(names) - set(listed))):
        raise UserError(f"data: {folder}/{others[0]} is not named in {set_name(pattern)}.manifest.json")
    return sorted({*names, *listed})


def _judge(index: ShardIndex, policy: FaultPolicy) -> None:
    findings = index.findings
    if not len(index):
        reason = f": {findings[0].message}" if findings else ""
        raise UserError(f"data: the {len(index.shards)} shards in {index.folder} hold no samples{reason}")
    if findings:
        if policy.action == "fatal":
            raise UserError(findings[0].message)
        lost, kinds = index.lost(), _listed(Counter(f.kind for f in findings))
        if lost > policy.max_rate * (lost + len(index)):
            raise UserError(
                f"data.faults.max_rate = {policy.max_rate}: about {lost} of {lost + len(index)} samples in"
                f" {index.folder} are damaged ({kinds}); the first: {findings[0].message}"
            )
        say_once(f"data: {len(index)} samples of {index.folder} can be read, about {lost} cannot ({kinds})")
    ignored = sum((Counter(shard.ignored) for shard in index.shards), Counter[str]())
    if ignored:
        say_once(f"data: members in {index.folder} that are never read, by suffix: {_listed(ignored)}")


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(
        f"{name} {n}" if str(name).isprintable() else f"{name!r} {n}" for name, n in sorted(counts.items())
    )


def _pictures(root: Path, form: Format, allowed: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Pictures of each class of an image folder `<root>/<class>/…`; classes and pictures sorted, hidden ones left out.

    Raises:
        UserError: if there are none, or classes that are not allowed.
    """
    suffixes = {f".{suffix}" for suffix in form.members["data"]}
    if not root.is_dir():
        raise UserError(f"data.folder = {root.parent}: there is no folder '{root.name}' in it")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in classes:
        if allowed is not None and path.name not in allowed:
            raise UserError(f"data: {path} is a class that the training set does not have")
    found = {
        path.name: tuple(
            sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        )
        for path in classes
    }
    if not any(found.values()):
        raise UserError(f"data: no pictures in {root}/<class>/")
    return found


# ------------------------------------------------------------------- keeping


def clean_folder(folder: str) -> str:
    """A set's folder or address, written in the one way that its shards' locations begin with."""
    return folder.rstrip("/") if is_remote(folder) else str(Path(folder).absolute())


def set_name(pattern: str) -> str:
    """What the files beside a set's shards are called after: `train` for `train-*.tar` and `train-{000..146}.tar`."""
    return re.sub(r"[-_.]?(\{.*\}|[*?\d]+)?(\.tar)?$", "", pattern.rpartition("/")[2]) or "set"


def own_index(pattern: str) -> str:
    return f"{set_name(pattern)}.index.safetensors"


def read_manifest(storage: Storage, folder: str, pattern: str) -> Manifest | None:
    """What `src/encode.py` wrote about the set, if it did."""
    try:
        content = json.loads(_beside(storage, clean_folder(folder), f"{set_name(pattern)}.manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _beside(storage: Storage, folder: str, name: str) -> Path:
    """A small file that may lie beside the shards, here or there."""
    location = f"{folder}/{name}"
    if is_remote(location):
        storage.refresh(location)
    return storage.cached(location)


def merge(folder: str, parts: list[tuple[Shard, Columns]]) -> ShardIndex:
    """The index of several shards."""
    dtypes = {name: column.dtype for _, columns in parts for name, column in columns.items()}
    columns = {}
    for name, dtype in sorted(dtypes.items()):
        absent = -1 if name.endswith(".size") else 0
        pieces = [part.get(name, np.full(shard.samples, absent, dtype)) for shard, part in parts]
        columns[name] = np.concatenate(pieces)
    return ShardIndex(folder, [shard for shard, _ in parts], columns or {"label": np.zeros(0, "i8")})


def split(index: ShardIndex) -> Iterator[tuple[Shard, Columns]]:
    """Inverse of `merge`."""
    for shard, start in zip(index.shards, index.starts.tolist(), strict=False):
        yield shard, {name: column[start : start + shard.samples] for name, column in index.columns.items()}


def write_index(path: Path, index: ShardIndex) -> None:
    """Write the index in one safetensors file, atomically."""
    shards = [vars(shard) for shard in index.shards]
    about = json.dumps({"version": VERSION, "shards": shards, "digest": _digest(index.columns, shards)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(safetensors.numpy.save(index.columns, metadata={"index": about}))  # with the user's own rights
    partial.replace(path)


def read_index(path: Path, folder: str) -> ShardIndex | None:
    """A kept index; None if there is none or it is damaged: then it is made anew."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["index"])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if about["version"] != VERSION or about["digest"] != _digest(columns, about["shards"]):
            return None
        shards = [
            Shard(**s | {"findings": tuple(Finding(*f) for f in s["findings"]), "files": tuple(s["files"])})
            for s in about["shards"]
        ]
        index = ShardIndex(folder, shards, columns)
        return index if _consistent(index) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
        return None


def _consistent(index: ShardIndex) -> bool:
    """Whether the columns are what a scan could have made: the file may come from anywhere."""
    total = sum(shard.samples for shard in index.shards)
    sizes = np.array([2**62 if shard.files else shard.size for shard in index.shards])[index.shard_of]
    columns = index.columns
    if any(c.shape != (total,) or c.dtype.kind not in "iu" for c in columns.values()) or (columns["label"] < 0).any():
        return False
    for part in index.parts | {"data"} if total else set():
        offset, size, _ = (columns[f"{part}.{name}"] for name in ("offset", "size", "crc32"))
        if (offset < 0).any() or (size > MAX_MEMBER).any() or (offset + size > sizes).any():
            return False
    return all(isinstance(n, int) for shard in index.shards for n in shard.ignored.values())


def _digest(columns: Columns, shards: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(shards, sort_keys=True).encode())
    for name in sorted(columns):
        digest.update(name.encode() + columns[name].tobytes())
    return digest.hexdigest()
