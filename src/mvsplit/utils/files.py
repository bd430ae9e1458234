"""Files that are either complete or absent."""

import os
import re
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


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left of `whole_file`s in a folder, of which no other process may be writing any.

    Nothing is removed through a link: neither in a linked folder nor the file that a link names.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if re.search(r"\.\d+\.partial$", path.name) and (path.is_symlink() or path.is_file()):
            path.unlink(missing_ok=True)
