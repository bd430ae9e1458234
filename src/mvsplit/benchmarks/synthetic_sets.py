"""Synthetic data sets for benchmarks: as large and as compressible as real ones, with random content."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.formats import Images, Latents
from mvsplit.data.shard_writer import write_shard
from mvsplit.data.storage import Storage
from mvsplit.data.transforms import CentreCrop
from mvsplit.utils.console import track

CLASSES = 10
Members = dict[str, bytes]


def jpegs(count: int, size: list[int], seed: int) -> Iterator[Members]:
    """Images of (height, width): smooth colours with noise, which compress about as well as photographs."""
    height, width = size
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 16, (2 * height, 2 * width, 1))
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        soft = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        top, left = rng.integers(height), rng.integers(width)
        pixels = soft + grain[top : top + height, left : left + width]
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield {"jpg": file.getvalue(), "cls": str(number % CLASSES).encode()}


def latents(count: int, shape: list[int], flip: bool, seed: int) -> Iterator[Members]:
    """Posteriors as `src/encode.py` writes them; with `flip` also those of the mirrored images."""
    generator = torch.Generator().manual_seed(seed)

    def posterior() -> bytes:
        mean, std = torch.randn(2, *shape, generator=generator).bfloat16()
        return save({"mean": mean.contiguous(), "std": std.abs().contiguous()})

    for number in range(count):
        mirrored = {"flipped.safetensors": posterior()} if flip else {}
        yield {"safetensors": posterior(), **mirrored, "cls": str(number % CLASSES).encode()}


def write_set(folder: Path, samples: Iterator[Members], count: int, shard_size: int) -> Path:
    """Shards `train-000000.tar`, … in a folder, which appears when they are complete; an existing folder is reused."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    starts = range(0, count, shard_size)
    for shard, start in enumerate(track(starts, f"writing {folder.name}")):
        group = [(f"{i:08d}", next(samples)) for i in range(start, min(start + shard_size, count))]
        write_shard(partial / f"train-{shard:06d}.tar", group)
    partial.rename(folder)
    return folder


def write_folders(folder: Path, samples: Iterator[Members]) -> Path:
    """The same images as `<folder>/<class>/<number>.jpg`, for torchvision's ImageFolder."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    for number, members in enumerate(samples):
        place = partial / members["cls"].decode()
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}.jpg").write_bytes(members["jpg"])
    partial.rename(folder)
    return folder


@dataclass
class SyntheticSet:
    """A set on disk and how to read it; `files`: its images as an image folder."""

    folder: Path
    cache: Path
    form: Images | Latents
    shape: list[int]
    batch_size: int
    files: Path | None = None

    def datamodule(self, seed: int, workers: int) -> ShardDataModule:
        data = ShardDataModule(
            str(self.folder), self.form, Storage(str(self.cache)), self.shape[1:], self.shape[0],
            CLASSES, self.batch_size, val="train-*.tar", seed=seed, num_workers=workers,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
        return data


def latent_set(folder: Path, name: str, c: dict[str, Any], seed: int) -> SyntheticSet:
    """Latents of `bench_data.yaml`'s section `latents`."""
    shape, count, shard_size, flip = c["shape"], c["samples"], c["shard_size"], c["flip"]
    path = folder / f"{name}-{'x'.join(map(str, shape))}-{count}-{shard_size}-{'flip-' * flip}{seed}"
    write_set(path, latents(count, shape, flip, seed), count, shard_size)
    form = Latents(shape[1:], shape[0], flip=flip, normalise=False)
    return SyntheticSet(path, folder / "cache", form, shape, c["batch_size"])


def image_set(folder: Path, config: dict[str, Any]) -> SyntheticSet:
    """Images of `bench_data.yaml`'s section `images`."""
    c, seed = config["images"], config["seed"]
    name = f"images-{'x'.join(map(str, c['picture_size']))}-{c['samples']}-{c['shard_size']}-{seed}"
    samples = [jpegs(c["samples"], c["picture_size"], seed) for _ in range(2)]
    write_set(folder / name, samples[0], c["samples"], c["shard_size"])
    files = write_folders(folder / f"{name}-files", samples[1])
    form = Images(c["image_size"], 3, CentreCrop(c["image_size"], flip=True, seed=seed))
    return SyntheticSet(folder / name, folder / "cache", form, [3, *c["image_size"]], c["batch_size"], files)
