"""Write WebDataset tar shards: a tar per so many samples, whole or not there."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import webdataset as wds


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write one shard; it appears under its name only when it is whole, and its bytes depend on the samples alone.

    Args:
        samples: (key, {suffix without the first dot: content}).
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            with wds.TarWriter(file, mtime=0, user="", group="", mode=0o644) as writer:
                for key, members in samples:
                    writer.write({"__key__": key} | members)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    partial.replace(path)


def write_shards(folder: Path, name: str, samples: Iterable[tuple[bytes, str, int]], shard_size: int) -> list[Path]:
    """Write shards `<name>-000000.tar`, … of up to `shard_size` samples each.

    Args:
        samples: (encoded image, its file suffix without the dot, class), as `<key>.<suffix>` and `<key>.cls`.

    Returns:
        The shards' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    samples, number = iter(samples), 0
    while group := list(islice(samples, shard_size)):
        paths.append(folder / f"{name}-{len(paths):06d}.tar")
        write_shard(
            paths[-1],
            [
                (f"{name}{number + i:08d}", {suffix: image, "cls": str(label).encode()})
                for i, (image, suffix, label) in enumerate(group)
            ],
        )
        number += len(group)
    return paths
