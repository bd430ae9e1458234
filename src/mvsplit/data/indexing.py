"""Index a set's shards once, so that any sample can be read directly and every rank gets equally many.

The index is stored beside the shards if this project wrote them, else in the cache. Shards that have changed since, and
those that an interruption left out, are scanned again.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from numpy.typing import NDArray

from mvsplit.data.faults import FaultPolicy, Finding
from mvsplit.data.formats import Format
from mvsplit.data.index import Part, ShardIndex, keep_index, lost_samples, merge, read_index, split
from mvsplit.data.remote import is_remote
from mvsplit.data.shard_set import INFO, ShardSet, own_index
from mvsplit.data.storage import CONNECTIONS, Storage
from mvsplit.data.tar_scan import Shard, same_members, scan_tar, stamp
from mvsplit.utils.console import info_once, progress
from mvsplit.utils.errors import UserError

SAVE_EVERY_S = 30.0
MAX_THREADS = 16
"""Local shards scanned at a time: decoding images and hashing release the interpreter lock."""


class StoredIndex(NamedTuple):
    """What earlier runs, or `src/encode.py`, indexed of a set.

    Attributes:
        folder: path or address that the shards' names are relative to.
        names: of the shards that are to be indexed.
        path: of the file in which the index is stored.
        valid: entries by the shards' names, if they may still be correct.
        former: all entries, for shards that have been damaged since.
    """

    folder: str
    names: list[str]
    path: Path
    valid: dict[str, Part]
    former: dict[str, Part]


def load_index(shards: ShardSet, policy: FaultPolicy | None = None) -> ShardIndex:
    """The index of these shards: the stored one, brought up to date.

    Raises:
        UserError: if there is nothing to index, or the policy does not tolerate the damage.
    """
    stored, parts = stored_index(shards), PartFiles(shards)

    def scan(name: str) -> Part:
        return _compared(stored.valid.get(name), shards) or parts.scan(name)

    return update_index(stored, parts.get if shards.remote else scan, policy)


def stored_index(shards: ShardSet) -> StoredIndex:
    """What is known of these shards without scanning them."""
    folder, remote, names = shards.folder, shards.remote, shards.names()
    path = index_path(shards.storage, folder, names, shards.form)
    valid = former = _tar_parts(read_index(path, folder))
    beside = shards.beside(own_index(shards.pattern))
    if remote or (beside.exists() and not _newer(path, beside)):
        own = _tar_parts(read_index(beside, folder))
        former = valid | own
        # An index that was written with its shards is valid for those that have not been written since.
        valid = valid | {name: part for name, part in own.items() if remote or not _newer(Path(folder, name), beside)}
    return StoredIndex(folder, names, path, valid, former)


def index_path(storage: Storage, folder: str, names: list[str], form: Format) -> Path:
    """Where the index of these shards is stored in the cache."""
    return storage.cache_dir / "indices" / f"{_key([folder, names, sorted(form.members.items())])}.safetensors"


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class PartFiles:
    """Indices of single shards, each in a file of its own: for remote sets, which are indexed shard by shard."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        key = _key([shards.folder, sorted(shards.form.members.items())])
        self.place = shards.storage.cache_dir / "indices" / f"{key}.parts"

    def get(self, name: str) -> Part:
        """A shard's index; the shard is downloaded and scanned if there is none. Other processes wait meanwhile."""
        path = self.place / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
        if (part := self._read(path, name)) is not None:
            return part
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                return self._read(path, name) or self._scan_and_keep(name, path)
        return self._scan_and_keep(name, path)  # the cache cannot be written: reported once

    def _scan_and_keep(self, name: str, path: Path) -> Part:
        part = self.scan(name)
        if not part[0].findings:
            keep_index(path, merge(self.shards.folder, [part]))
        return part

    def scan(self, name: str) -> Part:
        """Download and scan a shard; if it contains fewer samples than its publisher lists, it has been truncated."""
        folder = self.shards.folder
        shard, columns = scan_tar(self.shards.storage, folder, name, self.shards.form)
        counted = self.shards.published.get(name, shard.samples)
        if counted != shard.samples and not shard.findings:
            what = f"{folder}/{name}: contains {shard.samples} samples; {INFO} lists {counted}"
            shard = replace(shard, findings=(Finding("truncated", what),))
        return shard, columns

    def _read(self, path: Path, name: str) -> Part | None:
        index = read_index(path, self.shards.folder) if path.exists() else None
        return None if index is None or [s.name for s in index.shards] != [name] else (index.shards[0], index.columns)


def update_index(stored: StoredIndex, scan: Callable[[str], Part], policy: FaultPolicy | None = None) -> ShardIndex:
    """Scan the shards that have no valid entry, and check the whole.

    The index is stored from time to time: an interruption costs no more than what was scanned since.

    Raises:
        UserError: if the policy does not tolerate the damage, or there are no samples.
    """
    folder, names, policy = stored.folder, stored.names, policy or FaultPolicy()
    stale = [name for name in names if not _is_current(stored.valid.get(name), folder, name)]
    # What is saved of a shard that was not scanned yet must not be taken for its present state: no file has this stamp.
    done = {name: (replace(shard, stamp_ns=1), columns) for name, (shard, columns) in stored.former.items()}
    done |= stored.valid
    if stale:
        _scan_stale(stored, stale, done, scan, policy)
    index = merge(folder, [done[name] for name in names])
    check_damage(folder, index.shards, policy)
    if not len(index):
        reason = f": {index.findings[0].message}" if index.findings else ""
        raise UserError(f"data: the {len(index.shards)} shards in {folder} contain no samples{reason}")
    return index


def _scan_stale(
    stored: StoredIndex, stale: list[str], done: dict[str, Part], scan: Callable[[str], Part], policy: FaultPolicy
) -> None:
    folder, names = stored.folder, stored.names

    def save() -> None:
        keep_index(stored.path, merge(folder, [done[name] for name in names if name in done]))

    saved = time.monotonic()
    pool = ThreadPoolExecutor(CONNECTIONS if is_remote(folder) else min(MAX_THREADS, os.cpu_count() or 1))
    scanned = pool.map(scan, stale)
    try:
        with progress(f"indexing {folder}, shards", len(names), len(names) - len(stale)) as advance:
            for name in stale:
                new, old = next(scanned), stored.former.get(name)
                if policy.action == "fatal":
                    policy.enforce(new[0].findings)
                if new[0].findings and old is not None and old[0].samples > new[0].samples:
                    # Damaged since: its samples keep their numbers, and reading shows which are lost.
                    lost = old[0].samples - new[0].samples
                    info_once(f"data: {new[0].findings[0].message}; {lost} of its indexed samples are lost")
                    new = old
                done[name] = new
                advance(1)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    save()
                    saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        save()


def _is_current(part: Part | None, folder: str, name: str) -> bool:
    """Whether an entry still fits its shard, by size and time; its samples are verified as they are read."""
    if part is None or part[0].findings:
        return False
    if is_remote(folder) or part[0].files:  # an image folder has been compared with its listing
        return True
    try:
        stat = os.stat(f"{folder}/{name}")
    except OSError:
        return False
    return stat.st_size == part[0].size and part[0].stamp_ns == stamp(stat)


def _tar_parts(index: ShardIndex | None) -> dict[str, Part]:
    # A tar's entry that lists files would point elsewhere.
    return {s.name: (s, c) for s, c in split(index) if not s.files} if index is not None else {}


def _newer(one: Path, other: Path) -> bool:
    return one.exists() and stamp(one.stat()) > stamp(other.stat())


def _compared(part: Part | None, shards: ShardSet) -> Part | None:
    """The entry of a local shard from an index that was written with it: without times, valid wherever it is copied to.

    It gets this copy's time if headers and classes are those of the shard; the rest is verified as it is read.
    """
    if part is None or part[0].stamp_ns or part[0].findings:
        return None
    shard, columns = part
    path = Path(shards.folder, shard.name)
    with suppress(OSError):
        stat = path.stat()
        if stat.st_size == shard.size and same_members(path, columns, shards.form):
            return replace(shard, stamp_ns=stamp(stat)), columns
    return None


def check_damage(folder: str, shards: Sequence[Shard], policy: FaultPolicy, unseen: float = 0.0) -> None:
    """Log what is wrong with these shards; about `unseen` samples of the set are in others.

    Raises:
        UserError: if the policy does not tolerate it.
    """
    findings = [finding for shard in shards for finding in shard.findings]
    readable = sum(shard.samples for shard in shards)
    if findings:
        lost, kinds = lost_samples(shards), _listed(Counter(finding.kind for finding in findings))
        among = f"about {lost + readable} samples in {folder} ({kinds})"
        policy.enforce(findings, lost if readable else 0, lost + readable + unseen, among)
        if readable:
            info_once(f"data: {readable} samples in {folder} are readable, about {lost} are damaged ({kinds})")
    ignored = sum((Counter(shard.ignored) for shard in shards), Counter[str]())
    if ignored:
        info_once(f"data: {folder} contains members that are never read, by suffix: {_listed(ignored)}")


def check_classes(labels: NDArray, num_classes: int, location: Callable[[int], str]) -> None:
    """Check that all labels are below the number of classes, if there are any classes.

    Args:
        location: returns the file of a label by its place.

    Raises:
        UserError: naming the file with the highest label, or one without a label.
    """
    if not num_classes:
        return
    if len(labels) and int(labels.min()) < 0:
        raise UserError(
            f"data.num_classes = {num_classes}: {location(int(labels.argmin()))} contains a sample without a class"
            " label; use 0 if the set has no classes"
        )
    if len(labels) and (highest := int(labels.max())) >= num_classes:
        raise UserError(
            f"data.num_classes = {num_classes}: {location(int(labels.argmax()))} contains class {highest};"
            f" must be at least {highest + 1}"
        )


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(
        f"{name} {n}" if str(name).isprintable() else f"{name!r} {n}" for name, n in sorted(counts.items())
    )
