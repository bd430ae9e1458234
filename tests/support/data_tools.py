"""Small data sets for the tests: images, shards, and readers with their usual settings."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torchvision.io import encode_png

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.faults import FaultPolicy
from mvsplit.data.folder_scan import load_folder_index
from mvsplit.data.formats import Images, Latents
from mvsplit.data.index import ShardIndex
from mvsplit.data.indexing import load_index
from mvsplit.data.order import Order, StreamBatches
from mvsplit.data.reader import ShardReader
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.shard_writer import write_shard, write_shards
from mvsplit.data.storage import Storage
from mvsplit.data.streaming import StreamedSource, WebDatasetStream
from mvsplit.data.transforms import CentreCrop

SUBSTITUTE = FaultPolicy("substitute", 1.0)


def picture(value: int, height: int = 8, width: int = 8) -> bytes:
    """A grey PNG of one value."""
    return encode_png(torch.full((1, height, width), value, dtype=torch.uint8)).numpy().tobytes()


def photograph(seed: int, height: int = 96, width: int = 120) -> bytes:
    """An RGB JPEG of smooth noise, of some kilobytes."""
    noise = np.random.default_rng(seed).integers(0, 255, (12, 15, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def shards(folder: Path, count: int = 25, shard_size: int = 10, name: str = "train") -> list[Path]:
    """Grey pictures: sample i has value i mod 256 and class i mod 3."""
    return write_shards(folder, name, ((picture(i % 256), "png", i % 3) for i in range(count)), shard_size)


def jpeg_shards(folder: Path, count: int = 25, shard_size: int = 10, name: str = "train") -> list[Path]:
    return write_shards(folder, name, ((photograph(i), "jpg", i % 3) for i in range(count)), shard_size)


def latent_shards(folder: Path, count: int, shard_size: int, shape: Sequence[int] = (4, 8, 8)) -> list[Path]:
    """Latents: sample i has mean i, its mirrored one −i, std 0."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, count, shard_size):
        samples = []
        for i in range(first, min(first + shard_size, count)):
            members = {}
            for suffix, sign in (("safetensors", 1), ("flipped.safetensors", -1)):
                mean = torch.full(tuple(shape), float(sign * i), dtype=torch.bfloat16)
                members[suffix] = safetensors.torch.save({"mean": mean, "std": torch.zeros_like(mean)})
            samples.append((f"{i:08d}", members | {"cls": str(i % 3).encode()}))
        paths.append(folder / f"train-{first // shard_size:06d}.tar")
        write_shard(paths[-1], samples)
    return paths


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_by_ranks(
    order: Callable[[], Order], steps: int, micro: int, world: int, first: int = 0
) -> list[list[tuple[int, int]]]:
    """What all ranks together read in batches of 12, step by step; each with its own order."""
    ranks = [list(StreamBatches(order(), 12, micro, r, world, steps, lambda: first)) for r in range(world)]
    accumulate = 12 // (micro * world)
    return [
        [item for m in range(accumulate) for rank in ranks for item in rank[step * accumulate + m]]
        for step in range(steps - first)
    ]


def storage(folder: Path, **settings: Any) -> Storage:
    """A cache in `folder`/cache with short time-outs."""
    quick: dict[str, Any] = {"retries": 2, "backoff_s": 0.01, "timeout_s": 1.0}
    return Storage(str(folder / "cache"), **quick | settings)


def grey(size: int = 8) -> Images:
    return Images([size, size], 1, CentreCrop([size, size]))


def colour(size: int = 32) -> Images:
    return Images([size, size], 3, CentreCrop([size, size]))


def index(folder: Path, policy: FaultPolicy | None = None, pattern: str = "*.tar", **settings: Any) -> ShardIndex:
    """Of shards, or with `layout="folders"` of class folders."""
    found = ShardSet(storage(folder), str(folder), pattern, settings.get("form", grey()))
    return (load_folder_index if settings.get("layout") == "folders" else load_index)(found, policy)


def reader(
    folder: Path, policy: FaultPolicy | None = None, train: bool = True, form: Images | Latents | None = None
) -> ShardReader:
    form = form or grey()
    policy = policy or FaultPolicy()
    return ShardReader(index(folder, policy, form=form), storage(folder), form, policy, train)


def stream(folder: Path, policy: FaultPolicy | None = None, pattern: str = "*.tar") -> WebDatasetStream:
    """All shards through webdataset's pipeline, on one rank."""
    found = ShardSet(storage(folder), str(folder), pattern, grey())
    source = StreamedSource(found, policy or FaultPolicy(), 10, 1, 0, samples_per_shard=10, buffer=1)
    return WebDatasetStream(source, 0, 1, lambda: 0)


def datamodule(folder: Path | str, cache: Path, **settings: Any) -> ShardDataModule:
    defaults: dict[str, Any] = {
        "format": grey(),
        "storage": storage(cache),
        "image_size": [8, 8],
        "channels": 1,
        "num_classes": 10,
        "batch_size": 4,
        "train": "train-*.tar",
        "val": "train-*.tar",
    }
    return ShardDataModule(str(folder), **defaults | settings)


def image_folder(root: Path, classes: Sequence[str], size: tuple[int, int], count: int = 2) -> None:
    """Colour pictures of (height, width) in <root>/{train,val}/<class>/."""
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(photograph(i, *size))
