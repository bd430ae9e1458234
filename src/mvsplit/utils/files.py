"""Files that are either complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name only when it is completely on disk.

    Raises:
        OSError: with the name of the file, which the errors of a full disk lack.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process, or a link to another file
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno is None:  # not from the system, for example from decoding an image
            raise
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
