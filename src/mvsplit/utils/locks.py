"""A file lock that is released when its process ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mvsplit.utils.errors import UserError

_held: set[IO[str]] = set()


def _close_in_child() -> None:
    for file in _held:
        file.close()


# A worker process may outlive a killed run by seconds, and would keep its lock. (Started programs inherit no files.)
os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: Path, keep: bool = True) -> Iterator[bool]:
    """Hold the lock on a file, which is created if missing; does not wait.

    Args:
        path: of the file.
        keep: leave the file. Without it, the holder removes the file before the lock is released.

    Yields:
        Whether the lock was free.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        if not os.fstat(file.fileno()).st_nlink:  # its holder removed it after we had opened it
            yield False
            return
        _held.add(file)
        try:
            yield True
        finally:
            _held.discard(file)
            if not keep:
                path.unlink(missing_ok=True)


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Keep other processes from writing this file or folder, by a lock beside it, which is removed afterwards.

    Raises:
        UserError: if another process is writing it.
    """
    with locked(output.with_name(f".{output.name}.lock"), keep=False) as free:
        if not free:
            raise UserError(f"output = {output}: another process is writing there")
        yield
