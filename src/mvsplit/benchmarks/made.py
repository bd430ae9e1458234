"""Data sets made for measuring: as large and as compressible as real ones, random in content."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from mvsplit.data.shards import write_shard
from mvsplit.utils.console import track

CLASSES = 10
Members = dict[str, bytes]


def jpegs(count: int, size: list[int], seed: int) -> Iterator[Members]:
    """Pictures of (height, width): soft colours under grain, which compress to about what photographs do."""
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
    """Posteriors as `src/encode.py` writes them; with `flip` also those of the mirrored pictures."""
    generator = torch.Generator().manual_seed(seed)

    def posterior() -> bytes:
        mean, std = torch.randn(2, *shape, generator=generator).bfloat16()
        return save({"mean": mean.contiguous(), "std": std.abs().contiguous()})

    for number in range(count):
        mirrored = {"flipped.safetensors": posterior()} if flip else {}
        yield {"safetensors": posterior(), **mirrored, "cls": str(number % CLASSES).encode()}


def write_set(folder: Path, samples: Iterator[Members], count: int, shard_size: int) -> Path:
    """Shards `train-000000.tar`, … in a folder, which appears when they are whole; one that is there is left alone."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    starts = range(0, count, shard_size)
    for shard, start in enumerate(track(starts, f"making {folder.name}")):
        group = [(f"{i:08d}", next(samples)) for i in range(start, min(start + shard_size, count))]
        write_shard(partial / f"train-{shard:06d}.tar", group)
    partial.rename(folder)
    return folder


def write_folders(folder: Path, samples: Iterator[Members]) -> Path:
    """The same pictures as `<folder>/<class>/<number>.jpg`, for torchvision's ImageFolder."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    for number, members in enumerate(samples):
        place = partial / members["cls"].decode()
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}.jpg").write_bytes(members["jpg"])
    partial.rename(folder)
    return folder
