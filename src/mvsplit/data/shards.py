"""Write WebDataset tar shards: for each sample `<key>.png` (or jpg, jpeg, webp) and `<key>.cls`, the class in ASCII."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import webdataset as wds


def write_shards(folder: Path, name: str, samples: Iterable[tuple[bytes, str, int]], shard_size: int) -> list[Path]:
    """Write shards `<name>-000000.tar`, … of up to `shard_size` samples each.

    A shard appears under its name only when it is whole: an interrupted write leaves nothing that could be read.

    Args:
        samples: (encoded image, its file suffix without the dot, class).

    Returns:
        The shards' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    samples, number = iter(samples), 0
    while group := list(islice(samples, shard_size)):
        path = folder / f"{name}-{len(paths):06d}.tar"
        partial = path.with_suffix(f".tar.{os.getpid()}.partial")
        with wds.TarWriter(str(partial), mtime=0) as writer:
            for image, suffix, label in group:
                writer.write({"__key__": f"{name}{number:08d}", suffix: image, "cls": str(label).encode()})
                number += 1
        partial.replace(path)
        paths.append(path)
    return paths
