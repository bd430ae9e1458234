"""Small data sets for the tests: pictures, shards, and the reading pieces with their usual settings."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torchvision.io import encode_png

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.faults import FaultPolicy
from mvsplit.data.formats import Images, Latents
from mvsplit.data.index import ShardIndex, load_index
from mvsplit.data.reader import ShardReader
from mvsplit.data.shards import write_shard, write_shards
from mvsplit.data.storage import Storage
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


def storage(folder: Path, **settings: Any) -> Storage:
    """A cache in `folder`/cache that waits little."""
    quick: dict[str, Any] = {"retries": 2, "backoff_s": 0.01, "timeout_s": 1.0}
    return Storage(str(folder / "cache"), **quick | settings)


def grey(size: int = 8) -> Images:
    return Images([size, size], 1, CentreCrop([size, size]))


def colour(size: int = 32) -> Images:
    return Images([size, size], 3, CentreCrop([size, size]))


def index(folder: Path, policy: FaultPolicy | None = None, pattern: str = "*.tar", **settings: Any) -> ShardIndex:
    return load_index(storage(folder), str(folder), pattern, settings.pop("form", grey()), policy, **settings)


def reader(
    folder: Path, policy: FaultPolicy | None = None, train: bool = True, form: Images | Latents | None = None
) -> ShardReader:
    form = form or grey()
    policy = policy or FaultPolicy()
    return ShardReader(index(folder, policy, form=form), storage(folder), form, policy, train)


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
