"""Where shards lie: local files, or https, S3 and GCS addresses, fetched whole into a cache through fsspec.

A fetch is bounded in time (every read has a time-out), in size (the cache's limit) and in tries (back-off between
them), verified, and renamed into place when it is whole. Processes of one machine share the cache: one fetches a
shard, the others wait for it.
"""

import errno
import hashlib
import math
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.callbacks
from braceexpand import braceexpand
from filelock import FileLock
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from mvsplit.data.faults import DataFault
from mvsplit.utils.errors import UserError

PROTOCOLS = ("https", "http", "s3", "gs")
MAX_SHARDS = 1_000_000
CONNECTIONS = 4
"""Shards fetched at a time, where several are wanted."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MIN_RATE = 10_000
"""Bytes a second below which a server counts as stalled."""
REMEMBER_S = 60.0
"""For how long a shard that could not be fetched is not tried again: its samples fail at once meanwhile."""


def is_remote(location: str) -> bool:
    return "://" in location


class Storage:
    """Finds, fetches and keeps shards.

    Args:
        cache_dir: where remote shards and indices are kept. cache_gib: limit of the kept shards; the least recently
            used go first.
        retries: further tries of a fetch that failed. backoff_s: pause before the first of them; each next is twice as
            long. timeout_s: of connecting, and of each read: a server that stalls is left.
        token_env: environment variable whose value is sent as bearer token to https addresses, if it is set. S3 and GCS
            take their credentials from their own usual places.
        options: further arguments of the fsspec file system, e.g. `{anon: true}` for public S3 buckets.
    """

    def __init__(
        self,
        cache_dir: str,
        cache_gib: PositiveFloat = 100.0,
        retries: NonNegativeInt = 5,
        backoff_s: NonNegativeFloat = 1.0,
        timeout_s: PositiveFloat = 30.0,
        token_env: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.cache_dir, self.limit = Path(cache_dir), int(cache_gib * 2**30)
        self.retries, self.backoff_s, self.timeout_s = retries, backoff_s, timeout_s
        self.token_env, self.options = token_env, options or {}
        self.retried: list[str] = []
        """Fetches that succeeded only after a retry, one line each, since somebody last emptied the list."""
        self._failed: dict[str, tuple[float, DataFault]] = {}

    # ---------------------------------------------------------------- finding

    def expand(self, folder: str, pattern: str) -> list[str]:
        """Locations of the shards that a pattern with {000..146} or * names below a folder or address.

        Raises:
            UserError: if the folder does not exist, nothing matches, or the pattern cannot be used there.
        """
        if not pattern.isprintable():
            raise UserError(f"data: {pattern!r} is no name of shards")
        if "pipe:" in pattern:
            raise UserError(f"data: '{pattern}': pipe: runs a shell; see data.reader and data.allow_pipe")
        names = expand_braces(pattern)
        try:
            locations = [found for name in names for found in self._matches(folder, name)]
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

    def _matches(self, folder: str, name: str) -> list[str]:
        wild = any(c in name for c in "*?[")
        if is_remote(folder):
            base = f"{folder.rstrip('/')}/{name}"
            protocol = self._protocol(base)
            if not wild:
                return [base]
            if protocol in ("http", "https"):
                raise UserError(f"data: '{name}' cannot be looked for at {folder}; name the shards, e.g. {{000..146}}")
            return sorted(f"{protocol}://{found}" for found in self._filesystem(protocol).glob(base))
        if not Path(folder).is_dir():
            raise UserError(f"data.folder = {folder}: there is no such folder")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"data: '{name}' leads out of {folder}")
        return sorted(str(p) for p in Path(folder).glob(name) if p.is_file()) if wild else [str(Path(folder, name))]

    @staticmethod
    def _protocol(location: str) -> str:
        protocol = location.partition("://")[0]
        if protocol not in PROTOCOLS:  # chained ones (`simplecache::…`) and `pipe:` too
            raise UserError(f"data.folder = {location}: allowed are local paths, {', '.join(PROTOCOLS)}")
        return protocol

    def _filesystem(self, protocol: str) -> Any:
        options: dict[str, Any] = dict(self.options)
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
            options["client_kwargs"] = {"timeout": timeout}
            if protocol == "https" and self.token_env and (token := os.environ.get(self.token_env)):
                options["headers"] = {"Authorization": f"Bearer {token}"}  # dropped where a redirect leaves the host
        elif protocol == "s3":
            limits = {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s, "retries": {"max_attempts": 1}}
            options["config_kwargs"] = limits
        else:
            options["timeout"] = self.timeout_s
        try:
            return fsspec.filesystem(protocol, **options)
        except ImportError:
            raise UserError(f"{protocol}:// needs another package: pip install 'mvsplit[remote]'") from None

    # --------------------------------------------------------------- fetching

    def cached(self, location: str) -> Path:
        """Where a shard is on this machine, or will be."""
        if not is_remote(location):
            return Path(location)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(location).path.rpartition("/")[2])[-80:]
        return self.cache_dir / "shards" / f"{hashlib.sha256(location.encode()).hexdigest()[:16]}-{name}"

    def local(self, location: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The shard as a local file, fetched if need be.

        Args:
            size, sha256: what it must be, if known.

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
            path.parent.mkdir(parents=True, exist_ok=True)
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
        """Fetch a small remote file that may have changed, if there is one; the cached one stays if nobody answers."""
        path = self.cached(location)
        with suppress(OSError):
            if time.time() - path.stat().st_ctime < REMEMBER_S:  # other ranks ask too
                return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                self._fetch(location, path, None, None)
        except DataFault as fault:
            if fault.kind == "missing_shard":
                path.unlink(missing_ok=True)
        except OSError:
            return  # a cache that cannot be written: the shards tell it

    def discard_damaged(self, location: str, sha256: str) -> None:
        """Remove a cached shard whose bytes are not those that were fetched: the next to want it fetches it anew."""
        path = self.cached(location)
        if is_remote(location) and sha256:
            with suppress(OSError), path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    path.unlink()

    @staticmethod
    def _usable(path: Path, size: int | None) -> bool:
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)  # used just now: the last to go
            return True
        except OSError:
            return False

    def _fetch(self, location: str, path: Path, size: int | None, sha256: str | None) -> None:
        partial = path.with_name(f"{path.name}.partial")
        reason = ""
        try:
            for attempt in range(self.retries + 1):
                if attempt:
                    time.sleep(self.backoff_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
                try:
                    self._make_room(size or 0)
                    digest = self._download(location, partial)
                except DataFault:
                    raise
                except FileNotFoundError as error:
                    if error.filename is None:  # the server's word; else somebody has removed the cache's folder
                        raise DataFault("missing_shard", f"{location}: there is no such shard") from None
                    path.parent.mkdir(parents=True, exist_ok=True)
                    reason = _line(error)
                    continue
                except PermissionError as error:
                    raise DataFault("network", f"{location}: access denied ({_line(error)})") from None
                except Exception as error:  # each protocol's library has kinds of its own
                    if getattr(error, "errno", None) in NO_ROOM:
                        raise DataFault(
                            "cache_full", f"{location}: no room for it in data.storage.cache_dir = {self.cache_dir}"
                        ) from None
                    status = getattr(error, "status", 0)
                    if status in (401, 403):
                        raise DataFault("network", f"{location}: access denied (status {status})") from None
                    reason = f"{type(error).__name__} {_line(error)}".strip()
                    continue
                if (size is None or partial.stat().st_size == size) and sha256 in (None, digest):
                    os.replace(partial, path)
                    if attempt:
                        self.retried.append(f"{location}: fetched at try {attempt + 1} ({reason})")
                    return
                reason = "replaced"
            if reason == "replaced":
                raise DataFault("replaced_shard", f"{location}: not the shard that was indexed")
            raise DataFault("network", f"{location}: could not be fetched in {self.retries + 1} tries ({reason})")
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _download(self, location: str, partial: Path) -> str:
        within = _Within(self.limit, self.timeout_s, f"{location}: larger than data.storage.cache_gib allows")
        self._filesystem(self._protocol(location)).get_file(location, str(partial), callback=within)
        with partial.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _make_room(self, incoming: int) -> None:
        """Remove the least recently used shards until the rest and what comes are within the limit.

        Who still has one open reads on: the file goes when it is closed.
        """
        kept = sorted(self._kept())
        total = sum(size for _, size, _ in kept) + incoming
        for _, size, path in kept:
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _kept(self) -> Iterator[tuple[int, int, Path]]:
        for path in (self.cache_dir / "shards").iterdir():
            if not path.name.endswith((".lock", ".partial")):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    yield stat.st_mtime_ns, stat.st_size, path


def expand_braces(pattern: str) -> list[str]:
    """All names that {000..146} and {a,b} in a pattern stand for.

    Raises:
        UserError: if these are more than `MAX_SHARDS`; found before anything is spelt out.
    """
    ranges = re.findall(r"\{(-?\d{1,12})\.\.(-?\d{1,12})[.}]", pattern)
    counts = [abs(int(b) - int(a)) + 1 for a, b in ranges]
    counts += [inner.count(",") + 1 for inner in re.findall(r"\{([^{}]*)\}", pattern)]
    if math.prod(counts) > MAX_SHARDS or len(pattern) > 1000 or re.search(r"\d{13,}\.\.|\.\.-?\d{13,}", pattern):
        raise UserError(f"data: '{pattern[:100]}' names more than {MAX_SHARDS} shards")
    try:
        return list(islice(braceexpand(pattern), MAX_SHARDS))
    except (ValueError, RecursionError) as error:
        raise UserError(f"data: '{pattern}' is no pattern of names ({error})") from None


class _Within(fsspec.callbacks.Callback):
    """Ends a download that grows beyond a limit, or only drips."""

    def __init__(self, limit: int, window_s: float, message: str) -> None:
        super().__init__()
        self.limit, self.window_s, self.message = limit, window_s, message
        self._since, self._had = time.monotonic(), 0

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.limit:
            raise DataFault("cache_full", self.message)
        elapsed = time.monotonic() - self._since
        if elapsed > self.window_s:
            if self.value - self._had < MIN_RATE * elapsed:
                raise ConnectionError(f"slower than {MIN_RATE} bytes a second")
            self._since, self._had = time.monotonic(), self.value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
