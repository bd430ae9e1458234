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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mvsplit.data.faults import DataFault, FaultPolicy, Finding
from mvsplit.data.formats import Format, Manifest
from mvsplit.data.scan import Columns, Shard, scan_folder, scan_tar, split_name
from mvsplit.data.storage import CONNECTIONS, Storage, is_remote
from mvsplit.utils.console import progress, say
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
        content = np.stack([self.columns["data.crc32"].astype("<i8"), self.columns["label"].astype("<i8")])
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

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
            with storage.cached(location).open("rb") as file:
                file.seek(offset - 512)  # the header right before the data
                return f"{name}:{split_name(tarfile.TarInfo.frombuf(file.read(512), 'utf-8', 'replace').name)[0]}"
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
) -> ShardIndex:
    """The index of the shards that a pattern names: the kept one, brought up to date.

    Raises:
        UserError: if there is nothing to index, or the policy does not bear what is damaged.
    """
    policy, folder = policy or FaultPolicy(), folder.rstrip("/")
    scan: Callable[[str], tuple[Shard, Columns]]
    if layout == "folders":
        files = _pictures(Path(folder, pattern), form)
        names = [f"{pattern}/{name}" for name in files]
        labels = {f"{pattern}/{name}": i for i, name in enumerate(files)}

        def scan(name: str) -> tuple[Shard, Columns]:
            return scan_folder(folder, name, files[name.removeprefix(f"{pattern}/")], labels[name], form)
    else:
        names = [location.removeprefix(f"{folder}/") for location in storage.expand(folder, pattern)]

        def scan(name: str) -> tuple[Shard, Columns]:
            return scan_tar(storage, folder, name, form)

    key = json.dumps([folder, names, sorted(form.members.items())])
    place = storage.cache_dir / "indices" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    kept = read_index(place, folder)
    if kept is None and layout == "shards":
        kept = read_index(_beside(storage, folder, own_index(pattern)), folder)
    # A tar's entry that lists files would lead to other places.
    known = {s.name: (s, c) for s, c in split(kept) if layout == "folders" or not s.files} if kept is not None else {}
    index = _updated(folder, names, known, scan, policy, place)
    _judge(index, policy)
    return index


def _updated(
    folder: str,
    names: list[str],
    known: dict[str, tuple[Shard, Columns]],
    scan: Callable[[str], tuple[Shard, Columns]],
    policy: FaultPolicy,
    place: Path,
) -> ShardIndex:
    """Scan what is not known, keeping the index from time to time: an interruption costs no more."""
    stale = [name for name in names if not _holds(known.get(name), folder, name)]
    done = {name: known[name] for name in names if name in known}

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
                new, old = next(scanned), known.get(name)
                if new[0].findings and policy.action == "fatal":
                    policy.judge(new[0].findings, 1, 1)
                if new[0].findings and old is not None and old[0].samples > new[0].samples:
                    # Damaged since: its samples keep their numbers, and reading them tells what is gone.
                    gone = old[0].samples - new[0].samples
                    say(f"data: {new[0].findings[0].message}; of the indexed samples {gone} are gone")
                    new = old
                done[name] = new
                advance(1)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    save()
                    saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if stale:
            save()
    return merge(folder, [done[name] for name in names])


def _holds(known: tuple[Shard, Columns] | None, folder: str, name: str) -> bool:
    """Whether what is known of a shard still holds, by size and time; its samples are verified as they are read."""
    if known is None or known[0].findings:
        return False
    if is_remote(folder):
        return True
    try:
        stat = os.stat(f"{folder}/{name}")
    except OSError:
        return False
    return (known[0].files or stat.st_size == known[0].size) and known[0].mtime_ns in (0, stat.st_mtime_ns)


def _judge(index: ShardIndex, policy: FaultPolicy) -> None:
    findings = index.findings
    if not len(index):
        reason = f": {findings[0].message}" if findings else ""
        raise UserError(f"data: the {len(index.shards)} shards in {index.folder} hold no samples{reason}")
    if findings:
        lost, kinds = index.lost(), _listed(Counter(f.kind for f in findings))
        if lost > policy.max_rate * (lost + len(index)):
            raise UserError(
                f"data.faults.max_rate = {policy.max_rate}: about {lost} of {lost + len(index)} samples in"
                f" {index.folder} are damaged ({kinds}); the first: {findings[0].message}"
            )
        say(f"data: {len(index)} samples of {index.folder} can be read, about {lost} cannot ({kinds})")
    ignored = sum((Counter(shard.ignored) for shard in index.shards), Counter[str]())
    if ignored:
        say(f"data: members in {index.folder} that are never read, by suffix: {_listed(ignored)}")


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(
        f"{name} {n}" if str(name).isprintable() else f"{name!r} {n}" for name, n in sorted(counts.items())
    )


def _pictures(root: Path, form: Format) -> dict[str, tuple[str, ...]]:
    """Pictures of each class of an image folder `<root>/<class>/…`; classes and pictures sorted.

    Raises:
        UserError: if there are none.
    """
    suffixes = {f".{suffix}" for suffix in form.members["data"]}
    if not root.is_dir():
        raise UserError(f"data.folder = {root.parent}: there is no folder '{root.name}' in it")
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    found = {
        path.name: tuple(sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in suffixes))
        for path in classes
    }
    if not any(found.values()):
        raise UserError(f"data: no pictures in {root}/<class>/")
    return found


# ------------------------------------------------------------------- keeping


def set_name(pattern: str) -> str:
    """What the files beside a set's shards are called after: `train` for `train-*.tar` and `train-{000..146}.tar`."""
    return re.sub(r"[-_.]?(\{.*\}|[*?\d]+)?(\.tar)?$", "", pattern.rpartition("/")[2]) or "set"


def own_index(pattern: str) -> str:
    return f"{set_name(pattern)}.index.safetensors"


def read_manifest(storage: Storage, folder: str, pattern: str) -> Manifest | None:
    """What `src/encode.py` wrote about the set, if it did."""
    try:
        content = json.loads(_beside(storage, folder.rstrip("/"), f"{set_name(pattern)}.manifest.json").read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _beside(storage: Storage, folder: str, name: str) -> Path:
    """A small file that may lie beside the shards, here or there."""
    location = f"{folder}/{name}"
    with suppress(DataFault):  # there is none
        storage.local(location)
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
    safetensors.numpy.save_file(index.columns, partial, metadata={"index": about})
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
        consistent = all(len(column) == sum(s.samples for s in shards) for column in columns.values())
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
    return ShardIndex(folder, shards, columns) if consistent else None


def _digest(columns: Columns, shards: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(shards, sort_keys=True).encode())
    for name in sorted(columns):
        digest.update(name.encode() + columns[name].tobytes())
    return digest.hexdigest()
