"""A file lock that is released when its process ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_held: set[IO[str]] = set()


def _close_in_child() -> None:
    for file in _held:
        file.close()


# A worker process may outlive a killed run by seconds, and would keep its lock. (Started programs inherit no files.)
os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock on a file, which is created if missing; does not wait.

    Yields:
        Whether the lock was free.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        _held.add(file)
        try:
            yield True
        finally:
            _held.discard(file)
