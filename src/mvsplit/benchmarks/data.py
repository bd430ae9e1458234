"""The cost of reading: our loader compared with plain webdataset, torchvision's ImageFolder and reading the tar alone.

The readers take turns in one run, in alternating order, so that other load on the machine affects all of them. All
decode with the format's own `decode` and return stacked tensors on the CPU; `finish`, which runs on the device, is
omitted everywhere. Ours also verifies checksums and keeps its place in the stream. Shards are in the page cache.
"""

import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import webdataset as wds
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from rich.table import Table
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision.datasets import ImageFolder

from mvsplit.benchmarks.common import RoundsConfig, save_figures
from mvsplit.benchmarks.synthetic_sets import CLASSES, SyntheticSet, image_set, latent_set
from mvsplit.data.formats import Images, Latents
from mvsplit.data.order import StreamOrder
from mvsplit.data.reader import NO_TRAINER
from mvsplit.utils.console import info, print_table, show_table, track

Spread = dict[str, float]
"""`median`, `min` and `max` over the rounds."""
Train = Callable[[list[str], Path], dict[str, float]]
Size = Annotated[list[PositiveInt], Len(2, 2)]
ENDLESS = 10**9
BUFFER = 1000
"""Size of plain webdataset's shuffle buffer."""


@dataclass
class ImagesConfig:
    samples: PositiveInt
    shard_size: PositiveInt
    picture_size: Size
    image_size: Size
    batch_size: PositiveInt


@dataclass
class LatentsConfig:
    samples: PositiveInt
    shard_size: PositiveInt
    shape: Annotated[list[PositiveInt], Len(3, 3)]
    flip: bool
    batch_size: PositiveInt


@dataclass
class ResumeConfig:
    shards: PositiveInt
    shard_size: PositiveInt
    batch_size: PositiveInt


@dataclass
class TrainingConfig:
    steps: PositiveInt
    batch_size: PositiveInt
    overrides: list[str]


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_data.yaml`."""

    seconds: PositiveFloat
    workers: Annotated[list[NonNegativeInt], Len(1)]
    keep: str | None
    images: ImagesConfig
    latents: LatentsConfig
    resume: ResumeConfig
    permutation: PositiveInt
    training: TrainingConfig


def measure(config: dict[str, Any], output_dir: Path, train: Train) -> dict[str, Any]:
    """All results; shown, and written as `bench_data.json` into the run folder.

    Args:
        config: plain dict of `Config`.
        train: runs `src/train.py` with these overrides and output folder; returns its final metrics.
    """
    keep = config["keep"]
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="mvsplit_bench_") as name:
        folder = Path(name)
        info(f"writing synthetic data to {folder}")
        latents, images = latent_set(folder, "latents", config["latents"], config["seed"]), image_set(folder, config)
        result: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "system": platform.platform(), "torch": torch.__version__},
            "samples_per_s": {},
            "ratio": {},
        }
        for name, data in (("latents", latents), ("images", images)):
            races = {str(workers): race(name, data, workers, config) for workers in config["workers"]}
            result["samples_per_s"][name] = {workers: speeds for workers, (speeds, _) in races.items()}
            result["ratio"][name] = {workers: ratios for workers, (_, ratios) in races.items()}
        result["first_batch_s"], result["resume_ratio"] = first_batches(folder, config)
        result["permutation_s"] = best_of_5(lambda: StreamOrder(config["permutation"], config["seed"]).epoch(0))
        result["data_wait_share"] = wait_share(latents, config, output_dir, train)
    show(result, config)
    save_figures(result, output_dir / "bench_data.json")
    return result


def ours(data: SyntheticSet, workers: int, seed: int, step: int = 0) -> Iterator[Any]:
    """The batches of training, `step` optimiser steps into a run."""
    module = data.datamodule(seed, workers)
    module.trainer = SimpleNamespace(**vars(NO_TRAINER) | {"global_step": step})  # type: ignore[assignment]
    return iter(module.train_dataloader())


def webdataset(data: SyntheticSet, workers: int, seed: int) -> Iterator[Any]:
    """Plain webdataset, endless: random shards, a shuffle buffer, the format's decoding and PyTorch's collate."""
    draw = random.Random(seed)
    flip = isinstance(data.form, Latents) and data.form.flip
    kinds = [data.form.members[part] for part in (("data", "flipped") if flip else ("data",))]

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        kind = kinds[draw.getrandbits(1)] if len(kinds) > 1 else kinds[0]
        content = next(sample[suffix] for suffix in kind if suffix in sample)
        return data.form.decode(content, draw.getrandbits(40), train=True) | {"label": int(sample["cls"])}

    urls = [str(path) for path in sorted(data.folder.glob("*.tar"))]
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False, seed=seed).shuffle(BUFFER, initial=BUFFER)
    batches = dataset.map(decode).batched(data.batch_size, collation_fn=default_collate)
    return iter(wds.WebLoader(batches, batch_size=None, num_workers=workers))


def image_folder(data: SyntheticSet, workers: int, seed: int) -> Iterator[Any]:
    """Torchvision's ImageFolder with the same transform, in an endless random order."""
    assert data.files is not None
    assert isinstance(data.form, Images)
    transform, draw = data.form.transform, random.Random(seed)
    dataset = ImageFolder(str(data.files), transform=lambda image: transform(image, draw.getrandbits(40)))
    sampler = RandomSampler(dataset, num_samples=ENDLESS // len(dataset) * len(dataset))
    return iter(DataLoader(dataset, data.batch_size, sampler=sampler, num_workers=workers))


def tar_alone(data: SyntheticSet, workers: int, seed: int) -> Iterator[int]:
    """Every member read from front to back by `tarfile`, repeatedly, in this process; nothing is decoded."""
    read = 0
    while True:
        for path in sorted(data.folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    read += len(file.read()) if file else 0
                    if member.name.endswith(".cls") and int(member.name.partition(".")[0]) % data.batch_size == 0:
                        yield read


READERS = {"ours": ours, "webdataset": webdataset, "image_folder": image_folder, "tar": tar_alone}


def race(
    name: str, data: SyntheticSet, workers: int, config: dict[str, Any]
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Samples per second of each reader, and the ratios of ours to the others."""
    chosen = [reader for reader in READERS if data.files is not None or reader != "image_folder"]
    if workers != config["workers"][0]:
        chosen.remove("tar")  # always one process
    speeds: dict[str, list[float]] = {reader: [] for reader in chosen}
    turns = [reader for turn in range(config["rounds"]) for reader in (chosen if turn % 2 else chosen[::-1])]
    for reader in track(turns, f"{name}, {workers} workers"):
        speeds[reader].append(_speed(READERS[reader](data, workers, config["seed"]), data, workers, config["seconds"]))
    ratios = {
        reader: spread([a / b for a, b in zip(speeds["ours"], speeds[reader], strict=True)]) for reader in chosen[1:]
    }
    return {reader: spread(values) for reader, values in speeds.items()}, ratios


def _speed(batches: Iterator[Any], data: SyntheticSet, workers: int, seconds: float) -> float:
    """Samples per second after a warm-up. A reader's workers end with its turn: none runs during another's."""
    for _ in range(2 + 2 * workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        next(batches)
        count += data.batch_size
    return count / elapsed


def first_batches(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Spread], Spread]:
    """Seconds until the first batch: data module, stored index, order, files, decoding; nothing else is reused.

    Returns:
        `indexing` (once, without a stored index), `fresh`, `resumed_10` and `resumed_90` (per cent of the first epoch);
        and the ratio of the last to `fresh`.
    """
    c, seed = config["resume"], config["seed"]
    count = c["shards"] * c["shard_size"]
    data = latent_set(folder, "resume", config["latents"] | c | {"samples": count}, seed)
    with tempfile.TemporaryDirectory() as cache:
        data.cache = Path(cache)
        indexing = _first_batch(data, seed, 0)
        places = {"fresh": 0, "resumed_10": count // 10, "resumed_90": count * 9 // 10}
        times: dict[str, list[float]] = {place: [] for place in places}
        for place in list(places) * max(5, config["rounds"]):
            times[place].append(_first_batch(data, seed, places[place] // c["batch_size"]))
    ratio = spread([late / fresh for late, fresh in zip(times["resumed_90"], times["fresh"], strict=True)])
    return {"indexing": spread([indexing])} | {place: spread(values) for place, values in times.items()}, ratio


def _first_batch(data: SyntheticSet, seed: int, step: int) -> float:
    start = time.perf_counter()
    batch = next(ours(data, 0, seed, step))
    elapsed = time.perf_counter() - start
    assert batch["position"][0] == step * data.batch_size
    return elapsed


def best_of_5(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of five calls."""
    return min(timeit.repeat(function, number=1, repeat=5))


def wait_share(data: SyntheticSet, config: dict[str, Any], output_dir: Path, train: Train) -> float:
    """Share of a step spent waiting for data, measured by the throughput callback of a small training run."""
    c = config["training"]
    channels, *image_size = data.shape
    folder = output_dir / "training"
    folder.mkdir()
    info(f"training {c['steps']} steps on the latents")
    overrides = [
        "data=imagenet_latents", f"data.folder={data.folder}", "data.val=train-*.tar", "data.format.normalise=false",
        f"data.format.flip={config['latents']['flip']}",
        f"data.image_size={image_size}", f"data.channels={channels}", f"data.num_classes={CLASSES}",
        f"data.batch_size={c['batch_size']}", f"data.storage.cache_dir={data.cache}",
        f"trainer.max_steps={c['steps']}", f"trainer.log_every_n_steps={max(1, c['steps'] // 2)}",
        f"trainer.val_check_interval={c['steps']}", "trainer.limit_val_batches=1", "trainer.accelerator=cpu",
        "callbacks.sample_grid=null", "callbacks.checkpoint=null", "callbacks.stop_signals=null",
        "~logger", "test=false", f"seed={config['seed']}", *c["overrides"],
    ]  # fmt: skip
    return train(overrides, folder)["time/data_wait_share"]


def spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(result: dict[str, Any], config: dict[str, Any]) -> None:
    table = Table(title="samples/s, median (min – max); and ratios of ours to the others", title_justify="left")
    for column in ("set", "workers", "ours", "webdataset", "×", "ImageFolder", "×", "tar alone", "×"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, by_workers in result["samples_per_s"].items():
        for workers, speeds in by_workers.items():
            row = [_range(speeds["ours"], ".0f")]
            for reader in ("webdataset", "image_folder", "tar"):
                ratio = result["ratio"][name][workers].get(reader)
                row += [_range(speeds[reader], ".0f"), _range(ratio, ".2f")] if ratio else ["–", "–"]
            table.add_row(name, workers, *row)
    print_table(table)
    first = result["first_batch_s"]
    rows = {
        "first batch, fresh": f"{_range(first['fresh'], '.3f')} s",
        "first batch, resumed at 10 %": f"{_range(first['resumed_10'], '.3f')} s",
        "first batch, resumed at 90 %": f"{_range(first['resumed_90'], '.3f')} s",
        "ratio of resumed at 90 % to fresh": _range(result["resume_ratio"], ".2f"),
        "first batch, indexing included": f"{first['indexing']['median']:.3f} s, {config['resume']['shards']} shards",
        f"order of {config['permutation']} samples": f"{result['permutation_s']:.3f} s, best of 5",
        "share of a step spent waiting for data": f"{100 * result['data_wait_share']:.1f} %",
    }
    show_table("start, resume, wait", rows)


def _range(values: Spread, form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}} – {values['max']:{form}})"
