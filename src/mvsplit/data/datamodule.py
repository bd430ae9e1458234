"""The one DataModule: shards in, batches of the endless training stream out."""

import hashlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader

from mvsplit.data.faults import FaultCounts, FaultPolicy, Finding
from mvsplit.data.formats import Format
from mvsplit.data.index import Layout, ShardIndex, clean_folder, load_index, read_manifest
from mvsplit.data.order import StreamBatches, StreamOrder
from mvsplit.data.pipeline import COSTS, WebDatasetStream
from mvsplit.data.prefetch import Prefetcher
from mvsplit.data.reader import ShardReader, collate
from mvsplit.data.storage import Storage, expand_braces, is_remote
from mvsplit.utils.console import say, say_once
from mvsplit.utils.errors import AgreedError, UserError
from mvsplit.utils.rng import Seed

Batch = dict[str, Any]
REMOTE_WINDOW = 16
"""Shards mixed at a time where the cache does not hold all of them and nothing else was asked for."""


class StreamLoader(DataLoader):
    """A loader whose place is the trainer's step count: it has nothing of its own to save."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StreamBatches.first_step` knows."""


class ShardDataModule(L.LightningDataModule):
    """Samples with class labels, from tar shards (here or remote) or image folders.

    Batches: `image` (B, C, height, width) float32 as the network sees it, `label` (B,), `index` (B,) sample numbers,
    `position` (B,) places in the training stream, `weight` (B,) 0 for what validation must not count, else 1, and
    `caption` (a list of B strings) if the set has captions.

    Args:
        folder: where the shards lie: a path, or an https, s3 or gs address. train, val: patterns of the two sets' names
            below it, with * (not https) or {000..146}; with `layout=folders`, names of folders of class folders.
        format: what a sample is (`data/formats.py`). storage: how remote shards are kept (`data/storage.py`).
        faults: what damage means for the run (`data/faults.py`).
        image_size: [height, width] of a sample. channels: of a sample. num_classes: labels are 0 … num_classes − 1.
        batch_size: samples per optimiser step, over all devices and accumulated micro-batches.
        layout: `shards` or `folders` (<folder>/<train>/<class>/<picture>).
        reader: `index` reads any sample directly; `webdataset` streams sets too large to index, with fewer guarantees.
        seed: of the order of samples. num_workers: reading processes per rank.
        window: shards mixed at a time; 0 mixes all samples; null is 0, or 16 for remote sets larger than the cache.
        prepare: called with the folder if it holds no training shards, to put some there.
        overfit_samples: train and validate on only the first so many training samples; 0 takes all.
        samples_per_shard, shuffle_buffer, allow_pipe: of `reader=webdataset` (`data/pipeline.py`).

    Raises:
        UserError: for missing or damaged shards, labels out of range and batch sizes that cannot be shared out.
    """

    def __init__(
        self,
        folder: str,
        format: Format,
        storage: Storage,
        image_size: Annotated[list[PositiveInt], Len(2, 2)],
        channels: PositiveInt,
        num_classes: PositiveInt,
        batch_size: PositiveInt,
        faults: FaultPolicy | None = None,
        train: str = "train-*.tar",
        val: str = "val-*.tar",
        layout: Layout = "shards",
        reader: Literal["index", "webdataset"] = "index",
        seed: Seed = 0,
        num_workers: NonNegativeInt = 0,
        pin_memory: bool = False,
        window: NonNegativeInt | None = None,
        prepare: Callable[[Path], None] | None = None,
        overfit_samples: NonNegativeInt = 0,
        samples_per_shard: PositiveInt = 1000,
        shuffle_buffer: PositiveInt = 1000,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__()
        self.folder, self.layout, self.prepare = clean_folder(folder), layout, prepare
        self.patterns = {"train": train, "val": val}
        self.format, self.storage, self.policy = format, storage, faults or FaultPolicy()
        self.image_size, self.channels, self.num_classes = list(image_size), channels, num_classes
        self.batch_size, self.seed = batch_size, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.window = window
        self.overfit_samples = overfit_samples
        self.streams, self.samples_per_shard = reader == "webdataset", samples_per_shard
        self.shuffle_buffer = shuffle_buffer
        self.indices: dict[str, ShardIndex] = {}
        self.counts = {"train": FaultCounts(), "val": FaultCounts()}
        self.latest: list[Finding] = []  # of the batch at hand, from all ranks
        self._pass_faults = 0
        self._restored_samples: int | None = None
        self._prefetcher: Prefetcher | None = None

    @staticmethod
    def check(train: str, val: str, reader: str, allow_pipe: bool, overfit_samples: int) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        if overfit_samples and reader != "index":
            raise ValueError(f"data.overfit_samples = {overfit_samples}: only with data.reader=index")
        for key, pattern, allowed in (("train", train, reader == "webdataset" and allow_pipe), ("val", val, False)):
            if pattern.startswith("pipe:") and not allowed:
                raise ValueError(
                    f"data.{key} = {pattern}: pipe: runs a shell; allowed for data.train with data.reader=webdataset"
                    " data.allow_pipe=true"
                )

    # ------------------------------------------------------------------ setup

    def prepare_data(self) -> None:
        """On one process: put the shards in place if this data set can, and index them."""
        self.provide()
        for name in self._indexed():
            self.load(name)

    def provide(self) -> None:
        """Put the shards in place if they are missing and this data set can.

        Raises:
            UserError: if other things are in the way.
        """
        folder = Path(self.folder)
        if self.prepare is not None and not self._there():
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"data.folder = {folder}: holds other things than data.train; name a new folder")
            # The folder appears when it is whole; of two processes that start at once, one is the first.
            partial = folder.with_name(f".{folder.name}.{os.getpid()}")
            self.prepare(partial)
            try:
                partial.rename(folder)
            except OSError:
                shutil.rmtree(partial)

    def _there(self) -> bool:
        """Whether some of the training set is in the folder."""
        pattern = self.patterns["train"]
        try:
            return pattern.startswith("pipe:") or any(map(os.path.exists, self.storage.expand(self.folder, pattern)))
        except UserError:
            return False

    def _indexed(self) -> list[str]:
        return ["val"] if self.streams else ["train", "val"]

    def setup(self, stage: str | None = None) -> None:
        for name in self._indexed():
            if name not in self.indices:
                self.indices[name] = self.load(name)
        if self.overfit_samples:
            few = self.indices["train"].first(self.overfit_samples)
            self.indices = {"train": few, "val": few}
        manifest = read_manifest(self.storage, self.folder, self.patterns["train"])
        self.format.bind(self.indices["val" if self.streams else "train"].parts, manifest)
        if self.streams or not is_remote(self.folder):
            self.window = self.window or 0
            return
        sizes = [shard.size for shard in self.indices["train"].shards]
        if self.window is None:
            self.window = REMOTE_WINDOW * (sum(sizes) > self.storage.limit)
        if self.window:
            needed = min(2 * self.window, len(sizes)) * max(sizes)  # the present window's and the next one's
            if needed > self.storage.limit:
                raise UserError(
                    f"data.storage.cache_gib = {self.storage.limit / 2**30:.3g}: data.window = {self.window} shards and"
                    f" the next as many need at least {needed / 2**30:.2g}"
                )

    def load(self, name: str) -> ShardIndex:
        """The index of one set, brought up to date, its classes checked."""
        classes = None
        if self.layout == "folders" and name == "val":  # numbered as the training set numbers them
            root = Path(self.folder, self.patterns["train"])
            classes = sorted(p.name for p in root.glob("[!.]*") if p.is_dir()) if root.is_dir() else None
        pattern = self.patterns[name]
        index = load_index(self.storage, self.folder, pattern, self.format, self.policy, self.layout, classes)
        if self.layout == "folders" and name == "train" and len(index.shards) < self.num_classes:
            say_once(f"data: {self.folder} has {len(index.shards)} classes; data.num_classes = {self.num_classes}")
        labels = index.columns["label"]
        if (highest := int(labels.max())) >= self.num_classes:
            raise UserError(
                f"data.num_classes = {self.num_classes}: {index.location(int(labels.argmax()))} holds class {highest},"
                f" so > {highest} is needed"
            )
        return index

    # ---------------------------------------------------------------- loaders

    def micro_batch(self, accumulate: int) -> int:
        """Samples per rank and forward pass.

        Raises:
            UserError: if `batch_size` cannot be shared out evenly.
        """
        world = self.trainer.world_size if self.trainer else 1
        if self.batch_size % (world * accumulate):
            raise UserError(
                f"data.batch_size = {self.batch_size}: must be divisible by devices × accumulate_grad_batches"
                f" = {world} × {accumulate}"
            )
        return self.batch_size // (world * accumulate)

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("train_dataloader needs a trainer: the stream is as long as its max_steps")
        micro_batch = self.micro_batch(trainer.accumulate_grad_batches)
        if self.streams:
            return self._streamed(trainer, micro_batch)
        index = self.indices["train"]
        order = StreamOrder(len(index), self.seed, shard_of=index.shard_of, window=self.window or 0)
        return self._loader(self.reader("train", train=True), order, micro_batch, trainer.max_steps, self.first_step)

    def first_step(self) -> int:
        """Optimiser steps already done, when the loader starts.

        Raises:
            UserError: if the data's saved state says something else.
        """
        assert self.trainer is not None
        step, done = self.trainer.global_step, self._restored_samples
        if done not in (None, step * self.batch_size):
            raise UserError(
                f"ckpt_path: the data's state ({done} samples) does not fit step {step} × data.batch_size"
                f" {self.batch_size}"
            )
        self._restored_samples = None
        return step

    def val_dataloader(self) -> StreamLoader:
        num_samples = len(self.indices["val"])
        order = StreamOrder(num_samples, self.seed, shuffle=False)
        # One pass over the set in global batches; the last is filled up with samples of weight 0, because under
        # sharded strategies every rank must run equally many forward passes.
        return self._loader(self.reader("val"), order, self.micro_batch(1), -(-num_samples // self.batch_size))

    test_dataloader = val_dataloader

    def reader(self, name: Literal["train", "val"], train: bool = False) -> ShardReader:
        """The samples of one set, by default as validation sees them."""
        return ShardReader(self.indices[name], self.storage, self.format, self.policy, train, self.seed)

    def _loader(
        self,
        reader: ShardReader,
        order: StreamOrder,
        micro_batch: int,
        num_steps: int,
        first_step: Callable[[], int] = lambda: 0,
    ) -> StreamLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        ahead = self._ahead(order) if reader.train and is_remote(self.folder) else lambda place: None
        batches = StreamBatches(order, self.batch_size, micro_batch, rank, world, num_steps, first_step, ahead)
        return StreamLoader(reader, batch_sampler=batches, **self._loading())

    def _loading(self) -> dict[str, Any]:
        # Only for copies to a GPU: page-locked memory needs a CUDA context, which a CPU run would make on somebody's.
        copied = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory and copied,
            "persistent_workers": self.num_workers > 0,
            "collate_fn": collate,
            "worker_init_fn": partial(start_worker, parent=os.getpid()),
        }

    def _ahead(self, order: StreamOrder) -> Callable[[int], None]:
        """Fetch the shards of the present window and the next; on one rank per machine."""
        if self.trainer is not None and self.trainer.local_rank != 0:
            return lambda place: None
        index = self.indices["train"]
        self._prefetcher = prefetcher = Prefetcher(self.storage, index)
        per_shard = len(index) // len(index.shards)
        stride, reach = max(self.batch_size, per_shard // 2), (self.window or 0) * per_shard
        asked = -1

        def ahead(place: int) -> None:
            nonlocal asked
            if not reach and asked < 0:  # the cache holds the set: once for all
                prefetcher.ask(order.shards_ahead(place, len(index)))
            elif reach and place // stride != asked:
                prefetcher.ask(order.shards_ahead(place, min(reach + stride, len(index))))
            asked = place // stride

        return ahead

    def _streamed(self, trainer: L.Trainer, micro_batch: int) -> "StreamedBatches":
        if trainer.is_global_zero:
            say(COSTS)
        pattern = self.patterns["train"]
        piped = pattern.startswith("pipe:")  # `check` asked for the permission
        stream = WebDatasetStream(
            expand_braces(pattern) if piped else self.storage.expand(self.folder, pattern),
            piped,
            self.storage,
            self.format,
            self.policy,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            self.num_classes,
            self.samples_per_shard,
            self.shuffle_buffer,
            lambda: trainer.global_step * self.batch_size,
        )
        return StreamedBatches(DataLoader(stream, batch_size=micro_batch, **self._loading()), self, trainer)

    def teardown(self, stage: str) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    # ------------------------------------------------------- batches and state

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """On the device: what the network sees. All ranks take note of what any of them met, and stop together.

        Raises:
            AgreedError: if `faults` does not bear it.
        """
        train = self.trainer is not None and self.trainer.training
        counts = self.counts["train" if train else "val"]
        strategy = self.trainer.strategy if self.trainer else None
        self.latest = counts.add(batch.pop("findings"), len(batch["label"]), strategy)
        try:
            self.policy.judge(self.latest, counts.faults, counts.samples)
            if not train:
                self._judge_pass(int(batch["position"][0]))
        except UserError as error:
            raise AgreedError(str(error)) from None
        return self.format.finish(batch, train)

    def _judge_pass(self, position: int) -> None:
        """A pass over the validation set in which nothing could be read has no loss to tell."""
        if position < self.batch_size:  # the first batch of a pass
            self._pass_faults = 0
        self._pass_faults += sum(finding.kind != "retried" for finding in self.latest)
        if self._pass_faults >= len(self.indices["val"]):
            raise UserError(f"{self.latest[-1].message}; nor can any other sample of the validation set be read")

    @property
    def left_out(self) -> int:
        """About how many training samples were found damaged when they were indexed."""
        return self.indices["train"].lost() if "train" in self.indices else 0

    def fingerprint(self) -> str:
        """Equal for the same samples in the same order."""
        if self.streams:
            return f"webdataset {self.folder} {self.patterns['train']}"
        index = self.indices["train"]
        if not self.window:
            return index.fingerprint
        return f"{index.fingerprint} {hashlib.sha256(index.starts.astype('<i8').tobytes()).hexdigest()[:16]}"

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        counts = self.counts["train"]
        return {
            "samples": self.trainer.global_step * self.batch_size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "window": self.window,
            "fingerprint": self.fingerprint(),
            "faults": {"counts": dict(counts.counts), "samples": counts.samples},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the run goes on with the stream it began with.

        Raises:
            UserError: naming what differs.
        """
        for key, mine in (("batch_size", self.batch_size), ("seed", self.seed), ("window", self.window)):
            if state.get(key, mine) != mine:
                raise UserError(f"data.{key} = {mine}: the checkpoint was trained with {state[key]}; resume with that")
        if state["fingerprint"] != self.fingerprint():
            raise UserError(f"data.folder = {self.folder}: not the samples that the checkpoint was trained on")
        self._restored_samples = state["samples"]
        if faults := state.get("faults"):
            self.counts["train"] = FaultCounts(Counter(faults["counts"]), faults["samples"])


def start_worker(worker: int, parent: int) -> None:
    """For reading processes: who stops a job signals all of its processes, but the training needs these to the end.

    They end with it; a second signal, such as the loader's own, ends them at once.

    Args:
        parent: the training process; PyTorch's own watch does not notice if it has gone already.
    """
    if os.getppid() != parent:
        os._exit(1)
    signals = 0

    def count(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, count)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class StreamedBatches:
    """Batches of `reader=webdataset`, told their places in the stream; as many as the run has left."""

    def __init__(self, loader: DataLoader, data: ShardDataModule, trainer: L.Trainer) -> None:
        self.loader, self.data, self.trainer = loader, data, trainer

    def __len__(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        trainer, batches = self.trainer, iter(self.loader)
        world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        for step in range(self.data.first_step(), trainer.max_steps):
            for micro in range(accumulate):
                batch = next(batches)
                size = len(batch["label"])
                first = step * self.data.batch_size + (micro * world + trainer.global_rank) * size
                yield batch | {"position": torch.arange(first, first + size)}
