"""Remote files (https, S3 and GCS) through fsspec: where a secret may be sent, and downloads that cannot hang."""

import asyncio
import hashlib
import os
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.callbacks

from mvsplit.data.faults import DataFault
from mvsplit.utils.errors import UserError

PROTOCOLS = ("https", "http", "s3", "gs")
MIN_RATE = 10_000
"""Bytes a second below which a server counts as stalled."""


def is_remote(location: str) -> bool:
    return "://" in location


class Remote:
    """Lists and downloads remote files; for the arguments see `Storage`."""

    def __init__(self, timeout_s: float, token_env: str | None, options: dict[str, Any]) -> None:
        self.timeout_s, self.token_env, self.options = timeout_s, token_env, options

    def matches(self, folder: str, name: str) -> list[str]:
        """Addresses of the files that a name, possibly with *, stands for.

        Raises:
            UserError: for protocols that are not supported or cannot list files.
        """
        address = f"{folder.rstrip('/')}/{name}"
        protocol = _protocol(address)
        if not any(c in name for c in "*?["):
            return [address]
        if protocol in ("http", "https"):
            raise UserError(f"data: '{name}' in {folder}: http cannot list files; name the shards, e.g. {{000..146}}")
        return sorted(f"{protocol}://{found}" for found in self.filesystem(address).glob(address))

    def token(self, location: str) -> str | None:
        """The bearer token for an address, if there is one."""
        hosts = {
            "HF_TOKEN": ("huggingface.co", urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname),
            "DATA_TOKEN": (os.environ.get("DATA_TOKEN_HOST"),),
        }
        url = urlsplit(location)
        if self.token_env and url.scheme == "https" and url.hostname and url.hostname in hosts[self.token_env]:
            return os.environ.get(self.token_env)
        return None

    def filesystem(self, location: str) -> Any:
        """The fsspec file system for an address, all of whose reads time out."""
        protocol = _protocol(location)
        options: dict[str, Any] = dict(self.options)
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
            options["client_kwargs"] = {"timeout": timeout, "auto_decompress": False}
            options["headers"] = {"Accept-Encoding": "identity"} | options.get("headers", {})
            if token := self.token(location):  # dropped where a redirect leaves the host
                options["headers"]["Authorization"] = f"Bearer {token}"
        elif protocol == "s3":
            limits = {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s, "retries": {"max_attempts": 1}}
            options["config_kwargs"] = limits
        else:
            options["timeout"] = self.timeout_s
        try:
            return fsspec.filesystem(protocol, **options)
        except ImportError:
            raise UserError(f"{protocol}:// needs another package: pip install -e '.[remote]'") from None

    def download(self, location: str, path: Path, limit: int) -> str:
        """Download a file of at most `limit` bytes, and return its sha256.

        Raises:
            DataFault: `cache_full`, if it is larger than the limit.
            Exception: whatever the protocol's library raises.
        """
        path.unlink(missing_ok=True)  # left by a killed process, or a link that would be written through
        received = _Received(limit, f"{location}: larger than data.storage.cache_gib allows")
        filesystem = self.filesystem(location)  # asynchronous for all of these protocols
        fetch = filesystem._get_file(location, str(path), callback=received)
        future = asyncio.run_coroutine_threadsafe(fetch, filesystem.loop)
        # A server may also trickle its headers or bytes, so that no single read times out.
        before, window_s = 0, 2 + 2 * self.timeout_s  # to connect, and to answer
        while not wait([future], timeout=window_s).done:
            if received.value - before < MIN_RATE * self.timeout_s:
                future.cancel()
                raise ConnectionError(f"slower than {MIN_RATE} bytes a second")
            before, window_s = received.value, self.timeout_s
        future.result()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _protocol(location: str) -> str:
    protocol = location.partition("://")[0]
    if protocol not in PROTOCOLS:  # chained ones (`simplecache::…`) too
        raise UserError(f"data.folder = {location}: must be a local path or an address of {', '.join(PROTOCOLS)}")
    return protocol


class _Received(fsspec.callbacks.Callback):
    """Counts received bytes; stops a download that grows beyond a limit."""

    def __init__(self, limit: int, message: str) -> None:
        super().__init__()
        self.limit, self.message = limit, message

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.limit:
            raise DataFault("cache_full", self.message)
