"""Write WebDataset tar shards, each complete or absent."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import webdataset as wds

from mvsplit.data.shard_set import ShardSet
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write one shard; it appears under its name only when it is complete, and its bytes depend only on the samples.

    Args:
        samples: (key, {suffix without the first dot: content}).
    """
    with whole_file(path) as file, wds.TarWriter(file, mtime=0, user="", group="", mode=0o644) as writer:
        for key, members in samples:
            writer.write({"__key__": key} | members)


def write_shards(folder: Path, name: str, samples: Iterable[tuple[bytes, str, int]], shard_size: int) -> list[Path]:
    """Write shards `<name>-000000.tar`, … of up to `shard_size` samples each, and return their paths.

    Args:
        samples: (encoded image, its file suffix without the dot, class), as `<key>.<suffix>` and `<key>.cls`.

    Raises:
        UserError: if there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    numbered = enumerate(samples)
    while group := list(islice(numbered, shard_size)):
        paths.append(folder / f"{name}-{len(paths):06d}.tar")
        members = [(number, {suffix: data, "cls": str(label).encode()}) for number, (data, suffix, label) in group]
        write_shard(paths[-1], [(f"{name}{number:08d}", member) for number, member in members])
    if not paths:
        raise UserError(f"{folder}: no samples to write for {name}")
    return paths


def write_if_missing(shards: ShardSet, prepare: Callable[[Path], None]) -> None:
    """Let `prepare` write the set into its local folder if none of these shards exist.

    Raises:
        UserError: if other files are in the way.
    """
    folder = Path(shards.folder)
    with suppress(UserError):
        if shards.remote or any(map(os.path.exists, shards.storage.expand(shards.folder, shards.pattern))):
            return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"data.folder = {folder}: contains files other than data.train; use a new folder")
    # The folder appears when it is complete; of two processes that start at once, the first one wins.
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    partial.mkdir(parents=True)  # what is removed below was made by this process
    try:
        prepare(partial / folder.name)
        with suppress(OSError):
            (partial / folder.name).rename(folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, error.filename or str(folder)) from error
    finally:
        shutil.rmtree(partial)
