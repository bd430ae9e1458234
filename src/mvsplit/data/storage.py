"""Where shards are: local files, or remote ones, which are downloaded whole into a cache.

A download is bounded in time (every read has a time-out), in size (the cache's limit) and in attempts (with back-off
between them), verified, and renamed into place when it is complete. Processes of one machine share the cache: one
downloads a shard, the others wait for it.
"""

import errno
import hashlib
import math
import os
import random
import re
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal
from urllib.parse import urlsplit

from braceexpand import braceexpand
from filelock import FileLock
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from mvsplit.data.faults import DataFault
from mvsplit.data.remote import Remote, is_remote
from mvsplit.utils.console import info
from mvsplit.utils.errors import UserError

CHANGED = "shard has changed since it was indexed"
MAX_SHARDS = 1_000_000
CONNECTIONS = 4
"""Shards downloaded at a time, where several are needed."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FOLDER, MARKER = "mvsplit-shards", ".mvsplit-shards"
"""The cache's own folder in `cache_dir`, and the file in it that marks it as such."""
KEPT = re.compile(r"[0-9a-f]{16}-[A-Za-z0-9._-]{0,80}\.kept")
"""Names of the cached files: nothing else is ever removed."""
REMEMBER_S = 60.0
"""How long a failed download is not tried again: until then, the shard's samples fail at once."""


class Storage:
    """Finds, downloads and caches shards.

    Args:
        cache_dir: where remote shards (in a folder of their own) and indices are stored.
        cache_gib: limit of the cached shards; the least recently used are removed first.
        retries: further attempts at a failed download.
        backoff_s: pause before the first retry; doubles each time.
        timeout_s: of connecting, and of each read.
        token_env: environment variable with a bearer token for https addresses, if it is set: `HF_TOKEN`, which is sent
            to huggingface.co alone (or the host of `HF_ENDPOINT`), or `DATA_TOKEN`, which is sent to the host that
            `DATA_TOKEN_HOST` names. So no config can have a secret sent elsewhere.
        options: further arguments of the fsspec file system, e.g. `{anon: true}` for public S3 buckets. S3 and GCS take
            their credentials, and the address of a private server, from their usual environment variables.
    """

    def __init__(
        self,
        cache_dir: str,
        cache_gib: PositiveFloat = 100.0,
        retries: NonNegativeInt = 5,
        backoff_s: NonNegativeFloat = 1.0,
        timeout_s: PositiveFloat = 30.0,
        token_env: Literal["HF_TOKEN", "DATA_TOKEN"] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.cache_dir, self.limit = Path(cache_dir), int(cache_gib * 2**30)
        self.folder = self.cache_dir / FOLDER
        self.retries, self.backoff_s = retries, backoff_s
        self.remote = Remote(timeout_s, token_env, options or {})
        self.retried: list[str] = []
        """Downloads that succeeded only after a retry, one line each, since the list was last emptied."""
        self._failed: dict[str, tuple[float, DataFault]] = {}
        self._reported = False

    @staticmethod
    def check(options: dict[str, Any] | None) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        options = options or {}
        nested = options.get("client_kwargs")
        for key in ("endpoint_url", "endpoint"):
            if (key in options or (isinstance(nested, dict) and key in nested)) and options.get("anon") is not True:
                raise ValueError(
                    f"data.storage.options.{key}: would receive this machine's credentials; name your server in the"
                    " environment (AWS_ENDPOINT_URL), or add anon: true"
                )

    def expand(self, folder: str, pattern: str) -> list[str]:
        """Locations of the shards that a pattern with {000..146} or * names in a folder or at an address.

        Raises:
            UserError: if the folder does not exist, nothing matches, or the pattern cannot be used there.
        """
        if not pattern.isprintable():
            raise UserError(f"data: {pattern!r} is not a valid name pattern")
        names = expand_braces(pattern)
        matches = self.remote.matches if is_remote(folder) else _local_matches
        try:
            locations = [found for name in names for found in matches(folder, name)]
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"data: '{pattern}' in {folder}: {error}") from None
        if not locations:
            raise UserError(f"data: no shards match '{pattern}' in {folder}")
        if len(set(locations)) < len(locations):
            twice = next(location for location in locations if locations.count(location) > 1)
            raise UserError(f"data: '{pattern}' names {twice} twice")
        return locations

    def cached(self, location: str) -> Path:
        """Where a shard is on this machine, or will be."""
        if not is_remote(location):
            return Path(location)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(location).path.rpartition("/")[2])[-80:]
        return self.folder / f"{hashlib.sha256(location.encode()).hexdigest()[:16]}-{name}.kept"

    def local(self, location: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The shard as a local file, downloaded if necessary; size and sha256, if known, are what it must have.

        Raises:
            DataFault: `missing_shard`, `replaced_shard`, `network` or `cache_full`.
        """
        if not is_remote(location):
            return Path(location)
        path = self.cached(location)
        if self._usable(path, size):
            return path
        when, fault = self._failed.get(location, (-REMEMBER_S, None))
        if fault is not None and time.monotonic() - when < REMEMBER_S:
            raise fault
        try:
            self._claim()
            with FileLock(f"{path}.lock"):
                if not self._usable(path, size):
                    self._fetch(location, path, size, sha256)
        except OSError as error:
            why = error.strerror or error
            raise DataFault("cache_full", f"{location}: data.storage.cache_dir = {self.cache_dir}: {why}") from None
        except DataFault as fault:
            self._failed[location] = (time.monotonic(), fault)
            raise
        return path

    def refresh(self, location: str) -> None:
        """Download a small remote file that may have changed, if it exists; without an answer the cached one stays."""
        path = self.cached(location)
        with suppress(OSError):
            if time.time() - path.stat().st_ctime < REMEMBER_S:  # other ranks need it too
                return
        try:
            self._claim()
            with FileLock(f"{path}.lock"):
                self._fetch(location, path, None, None)
        except DataFault as fault:
            if fault.kind == "missing_shard":
                self.discard(location)
        except OSError:
            return  # the cache cannot be written: reported with the first shard

    def discard(self, location: str) -> None:
        """Remove a remote shard from the cache: it is downloaded again when it is next needed."""
        path = self.cached(location)
        with suppress(OSError):
            if is_remote(location) and self._owned() and S_ISREG(path.lstat().st_mode):
                path.unlink()

    def discard_damaged(self, location: str, sha256: str) -> None:
        """Remove a cached shard whose bytes are no longer those that were downloaded."""
        if is_remote(location) and sha256:
            with suppress(OSError), self.cached(location).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    self.discard(location)

    def _owned(self) -> bool:
        return S_ISREG((self.folder / MARKER).lstat().st_mode)

    def _claim(self) -> None:
        """Create the cache's own folder if it does not exist."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (names := os.listdir(self.folder)):
            (self.folder / MARKER).touch()
        elif MARKER not in names or not self._owned():
            raise DataFault(
                "cache_full",
                f"data.storage.cache_dir = {self.cache_dir}: its folder {FOLDER} contains other files; use another one",
            )

    @staticmethod
    def _usable(path: Path, size: int | None) -> bool:
        try:
            stat = path.lstat()
            if not S_ISREG(stat.st_mode) or size not in (None, stat.st_size):
                return False
            os.utime(path, follow_symlinks=False)  # most recently used: the last to be removed
            return True
        except OSError:
            return False

    def _fetch(self, location: str, path: Path, size: int | None, sha256: str | None) -> None:
        partial = path.with_name(f"{path.name}.partial")
        reason = ""
        try:
            for attempt in range(self.retries + 1):
                if attempt:
                    if not self._reported:
                        info(f"data: {location}: download failed ({reason}); trying again, up to {self.retries} times")
                        self._reported = True  # one line, not one per shard
                    time.sleep(self.backoff_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
                try:
                    self._make_room(size or 0)
                    digest = self.remote.download(location, partial, self.limit)
                except Exception as error:  # each protocol's library has its own kinds
                    reason = self._reason_to_retry(location, error)
                    continue
                if (size is None or partial.stat().st_size == size) and sha256 in (None, digest):
                    os.replace(partial, path)
                    if attempt:
                        self.retried.append(f"{location}: downloaded on attempt {attempt + 1} ({reason})")
                    return
                reason = CHANGED
            if reason == CHANGED:
                raise DataFault("replaced_shard", f"{location}: {reason}")
            raise DataFault("network", f"{location}: download failed after {self.retries + 1} attempts ({reason})")
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _reason_to_retry(self, location: str, error: Exception) -> str:
        """Why a download failed; raises `DataFault` if another attempt would fail too."""
        line, status = " ".join(str(error).split())[:120], getattr(error, "status", 0)
        if isinstance(error, UserError):
            raise error
        if isinstance(error, FileNotFoundError):
            if error.filename is None:  # the server's answer; else the cache's folder has been removed
                raise DataFault("missing_shard", f"{location}: shard does not exist") from None
            self._claim()
            return line
        if isinstance(error, PermissionError) or status in (401, 403):
            reason = f"status {status}" if status else line
            raise DataFault("network", f"{location}: access denied ({reason})") from None
        if getattr(error, "errno", None) in NO_ROOM:
            what = f"{location}: does not fit into data.storage.cache_dir = {self.cache_dir}"
            raise DataFault("cache_full", f"{what} ({os.strerror(error.errno)})") from None  # type: ignore[attr-defined]
        return f"{type(error).__name__} {line}".strip()

    def _make_room(self, incoming: int) -> None:
        """Remove the least recently used shards until the rest and the next one are within the limit.

        A process that has one open can still read it: the file is freed when it is closed.
        """
        kept = list[tuple[int, int, Path]]()
        for path in self.folder.iterdir() if self._owned() else ():
            if KEPT.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    stat = path.lstat()
                    if S_ISREG(stat.st_mode):
                        kept.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in kept) + incoming
        for _, size, path in sorted(kept):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _local_matches(folder: str, name: str) -> list[str]:
    if not Path(folder).is_dir():
        raise UserError(f"data.folder = {folder}: folder does not exist")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"data: '{name}' is outside {folder}")
    wild = any(c in name for c in "*?[")
    return sorted(str(p) for p in Path(folder).glob(name) if p.is_file()) if wild else [str(Path(folder, name))]


def expand_braces(pattern: str) -> list[str]:
    """All names that {000..146} and {a,b} in a pattern stand for.

    Raises:
        UserError: if there are more than `MAX_SHARDS`; detected before any name is generated.
    """
    ranges = re.findall(r"\{(-?\d{1,12})\.\.(-?\d{1,12})[.}]", pattern)
    counts = [abs(int(b) - int(a)) + 1 for a, b in ranges]
    counts += [inner.count(",") + 1 for inner in re.findall(r"\{([^{}]*)\}", pattern)]
    if math.prod(counts) > MAX_SHARDS or len(pattern) > 1000 or re.search(r"\d{13,}\.\.|\.\.-?\d{13,}", pattern):
        raise UserError(f"data: '{pattern[:100]}' names more than {MAX_SHARDS} shards")
    try:
        return list(islice(braceexpand(pattern), MAX_SHARDS))
    except (ValueError, RecursionError) as error:
        raise UserError(f"data: '{pattern}' is not a valid name pattern ({error})") from None
