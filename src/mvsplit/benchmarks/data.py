"""What reading costs: our loader beside plain webdataset, torchvision's ImageFolder and the tar alone.

The readers take turns in one run, in alternating order, so that other load on the machine meets all of them. All
decode with the format's own `decode` and end with stacked tensors on the CPU; `finish`, which runs on the device, is
left out everywhere. Ours also verifies checksums and keeps the place in the stream. Shards lie in the page cache.
"""

import json
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import webdataset as wds
from annotated_types import Len
from PIL import Image
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision.datasets import ImageFolder

from mvsplit.benchmarks import made
from mvsplit.benchmarks.common import RoundsConfig
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.formats import Images, Latents
from mvsplit.data.order import StreamOrder
from mvsplit.data.storage import Storage
from mvsplit.data.transforms import CentreCrop
from mvsplit.utils.console import print_table, say, show_table, track

Spread = dict[str, float]
"""`median`, `min` and `max` over the rounds."""
Train = Callable[[list[str], Path], dict[str, float]]
Size = Annotated[list[PositiveInt], Len(2, 2)]
ENDLESS = 10**9
BUFFER = 1000
"""Samples that plain webdataset shuffles in."""


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


@dataclass
class MadeSet:
    """A set on disk and how it is read; `files`: its pictures as an image folder."""

    folder: Path
    cache: Path
    form: Images | Latents
    shape: list[int]
    batch_size: int
    files: Path | None = None

    def datamodule(self, seed: int, workers: int) -> ShardDataModule:
        data = ShardDataModule(
            str(self.folder), self.form, Storage(str(self.cache)), self.shape[1:], self.shape[0], made.CLASSES,
            self.batch_size, val="train-*.tar", seed=seed, num_workers=workers,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
        return data


def measure(config: dict[str, Any], output_dir: Path, train: Train) -> dict[str, Any]:
    """All figures; shown, and written as `bench_data.json` into the run folder.

    Args:
        train: runs `src/train.py` with these overrides and output folder; returns its final metrics.
    """
    with _folder(config["keep"]) as folder:
        say(f"making data in {folder}")
        latents, images = latent_set(folder, config), image_set(folder, config)
        result: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "system": platform.platform(), "torch": torch.__version__},
            "samples_per_s": {},
            "ratio": {},
        }
        for name, data in (("latents", latents), ("images", images)):
            result["samples_per_s"][name], result["ratio"][name] = {}, {}
            for workers in config["workers"]:
                speeds, ratios = race(name, data, workers, config)
                result["samples_per_s"][name][str(workers)] = speeds
                result["ratio"][name][str(workers)] = ratios
        result["first_batch_s"], result["resume_ratio"] = first_batches(folder, config)
        result["permutation_s"] = best_of_5(lambda: StreamOrder(config["permutation"], config["seed"]).epoch(0))
        result["data_wait_share"] = wait_share(latents, config, output_dir, train)
    path = output_dir / "bench_data.json"
    path.write_text(json.dumps(result, indent=1))
    show(result, config, path)
    return result


# ----------------------------------------------------------------------- data


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """Where the made data lie; removed at the end unless they are to be kept."""
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="mvsplit_bench_") as folder:
        yield Path(folder)


def latent_set(folder: Path, config: dict[str, Any]) -> MadeSet:
    c, seed = config["latents"], config["seed"]
    return _latents(folder, "latents", c["samples"], c["shard_size"], c["shape"], c["flip"], c["batch_size"], seed)


def _latents(
    folder: Path, name: str, count: int, shard_size: int, shape: list[int], flip: bool, batch_size: int, seed: int
) -> MadeSet:
    name = f"{name}-{'x'.join(map(str, shape))}-{count}-{shard_size}-{'flip-' * flip}{seed}"
    made.write_set(folder / name, made.latents(count, shape, flip, seed), count, shard_size)
    form = Latents(shape[1:], shape[0], flip=flip, normalise=False)
    return MadeSet(folder / name, folder / "cache", form, shape, batch_size)


def image_set(folder: Path, config: dict[str, Any]) -> MadeSet:
    c, seed = config["images"], config["seed"]
    name = f"images-{'x'.join(map(str, c['picture_size']))}-{c['samples']}-{c['shard_size']}-{seed}"
    samples = [made.jpegs(c["samples"], c["picture_size"], seed) for _ in range(2)]
    made.write_set(folder / name, samples[0], c["samples"], c["shard_size"])
    files = made.write_folders(folder / f"{name}-files", samples[1])
    form = Images(c["image_size"], 3, CentreCrop(c["image_size"], flip=True, seed=seed))
    return MadeSet(folder / name, folder / "cache", form, [3, *c["image_size"]], c["batch_size"], files)


# -------------------------------------------------------------------- readers


def train_loader(data: ShardDataModule, step: int = 0) -> DataLoader:
    """The very loader that training reads, `step` optimiser steps into a run."""
    asked = {"world_size": 1, "global_rank": 0, "local_rank": 0, "accumulate_grad_batches": 1, "max_steps": ENDLESS}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))  # batches stay in host memory
    data.trainer = SimpleNamespace(global_step=step, strategy=strategy, **asked)  # type: ignore[assignment]
    return data.train_dataloader()


def ours(data: MadeSet, workers: int, seed: int) -> Iterator[Any]:
    return iter(train_loader(data.datamodule(seed, workers)))


def webdataset(data: MadeSet, workers: int, seed: int) -> Iterator[Any]:
    """Plain webdataset, endless: random shards, a buffer to shuffle in, the format's decoding and PyTorch's collate."""
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


def image_folder(data: MadeSet, workers: int, seed: int) -> Iterator[Any]:
    """Torchvision's ImageFolder with the same transform, in one endless random order."""
    assert data.files is not None
    assert isinstance(data.form, Images)
    transform, draw = data.form.transform, random.Random(seed)

    def pixels(picture: Image.Image) -> Tensor:
        return transform(picture, draw.getrandbits(40))

    dataset = ImageFolder(str(data.files), transform=pixels)
    sampler = RandomSampler(dataset, num_samples=ENDLESS // len(dataset) * len(dataset))
    return iter(DataLoader(dataset, data.batch_size, sampler=sampler, num_workers=workers))


def tar_alone(data: MadeSet, workers: int, seed: int) -> Iterator[int]:
    """Every member read from front to back by `tarfile`, again and again, in this process; nothing is decoded."""
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


def race(name: str, data: MadeSet, workers: int, config: dict[str, Any]) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Samples per second of each reader, and ours as a multiple of each other's."""
    chosen = [reader for reader in READERS if data.files is not None or reader != "image_folder"]
    if workers != config["workers"][0]:
        chosen.remove("tar")  # one process in any case
    speeds: dict[str, list[float]] = {reader: [] for reader in chosen}
    turns = [reader for turn in range(config["rounds"]) for reader in (chosen if turn % 2 else chosen[::-1])]
    for reader in track(turns, f"{name}, {workers} workers"):
        speeds[reader].append(_speed(READERS[reader](data, workers, config["seed"]), data, workers, config["seconds"]))
    ratios = {
        reader: spread([a / b for a, b in zip(speeds["ours"], speeds[reader], strict=True)]) for reader in chosen[1:]
    }
    return {reader: spread(values) for reader, values in speeds.items()}, ratios


def _speed(batches: Iterator[Any], data: MadeSet, workers: int, seconds: float) -> float:
    """Samples per second once a reader runs evenly. Its processes end with it: none works in another's turn."""
    for _ in range(2 + 2 * workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        next(batches)
        count += data.batch_size
    return count / elapsed


# ------------------------------------------------------------- other measures


def first_batches(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Spread], Spread]:
    """Seconds until the first batch: data module, kept index, order, files, decoding; nothing is left from before.

    Returns:
        `indexing` (once, without a kept index), `fresh`, `resumed_10` and `resumed_90` (per cent of the first epoch);
        and the last as a multiple of `fresh`.
    """
    c, latents, seed = config["resume"], config["latents"], config["seed"]
    count = c["shards"] * c["shard_size"]
    data = _latents(folder, "resume", count, c["shard_size"], latents["shape"], latents["flip"], c["batch_size"], seed)
    with tempfile.TemporaryDirectory() as cache:
        data.cache = Path(cache)
        indexing = _first_batch(data, seed, 0)
        places = {"fresh": 0, "resumed_10": count // 10, "resumed_90": count * 9 // 10}
        times: dict[str, list[float]] = {place: [] for place in places}
        for place in list(places) * max(5, config["rounds"]):
            times[place].append(_first_batch(data, seed, places[place] // c["batch_size"]))
    ratio = spread([late / fresh for late, fresh in zip(times["resumed_90"], times["fresh"], strict=True)])
    return {"indexing": spread([indexing])} | {place: spread(values) for place, values in times.items()}, ratio


def _first_batch(data: MadeSet, seed: int, step: int) -> float:
    start = time.perf_counter()
    batch = next(iter(train_loader(data.datamodule(seed, workers=0), step)))
    elapsed = time.perf_counter() - start
    assert batch["position"][0] == step * data.batch_size
    return elapsed


def best_of_5(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def wait_share(data: MadeSet, config: dict[str, Any], output_dir: Path, train: Train) -> float:
    """Share of a step spent waiting for data, as the throughput callback of a small training run measures it."""
    c = config["training"]
    channels, *image_size = data.shape
    folder = output_dir / "training"
    folder.mkdir()
    say(f"training {c['steps']} steps on the latents")
    overrides = [
        "data=imagenet_latents", f"data.folder={data.folder}", "data.val=train-*.tar", "data.format.normalise=false",
        f"data.format.flip={config['latents']['flip']}",
        f"data.image_size={image_size}", f"data.channels={channels}", f"data.num_classes={made.CLASSES}",
        f"data.batch_size={c['batch_size']}", f"data.storage.cache_dir={data.cache}",
        f"trainer.max_steps={c['steps']}", f"trainer.log_every_n_steps={max(1, c['steps'] // 2)}",
        f"trainer.val_check_interval={c['steps']}", "trainer.limit_val_batches=1", "trainer.accelerator=cpu",
        "callbacks.sample_grid=null", "callbacks.best=null", "callbacks.every=null", "callbacks.last=null",
        "~logger", "test=false", f"seed={config['seed']}", *c["overrides"],
    ]  # fmt: skip
    return train(overrides, folder)["time/data_wait_share"]


# -------------------------------------------------------------------- results


def spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(result: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """The tables."""
    table = Table(title="samples/s, median (least – most); and ours as a multiple", title_justify="left")
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
        "… as a multiple of fresh": _range(result["resume_ratio"], ".2f"),
        "first batch, indexing included": f"{first['indexing']['median']:.3f} s, {config['resume']['shards']} shards",
        f"order of {config['permutation']} samples": f"{result['permutation_s']:.3f} s, best of 5",
        "share of a step spent waiting": f"{100 * result['data_wait_share']:.1f} %",
        "figures": str(path),
    }
    show_table("Start, resume, wait", rows)


def _range(values: Spread, form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}} – {values['max']:{form}})"
