"""The one DataModule: tar shards in, batches of the endless training stream out."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader

from mvsplit.data.index import ShardIndex, find_shards, load_index
from mvsplit.data.order import StreamBatches, StreamOrder
from mvsplit.data.reader import ShardReader, Transform
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Seed


class StreamLoader(DataLoader):
    """A loader whose place is the trainer's step count: it has nothing of its own to save."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StreamBatches.first_step` knows."""


class ShardDataModule(L.LightningDataModule):
    """WebDataset tar shards of images with class labels (see `data/shards.py` for what a shard holds).

    Batches: `image` (B, C, height, width) in [−1, 1], `label` (B,), `index` (B,) sample numbers, `position` (B,)
    places in the training stream, `weight` (B,) 0 for the padding that evens out ranks in validation, else 1.

    Args:
        folder: where the shards lie. train, val: patterns of the two sets' file names.
        image_size: [height, width] that `transform` gives. channels: 1 (grey) or 3 (RGB). num_classes: labels are
            0 … num_classes − 1.
        batch_size: samples per optimiser step, over all devices and accumulated micro-batches.
        transform: of training pictures; val_transform: of the others, by default the same.
        seed: of the order of samples. num_workers: reading processes per rank.
        prepare: called with the folder if it holds no training shards, to put some there.
        overfit_samples: train and validate on only the first so many training samples; 0 takes all.

    Raises:
        UserError: for missing or damaged shards, labels out of range and batch sizes that cannot be shared out.
    """

    def __init__(
        self,
        folder: str,
        image_size: Annotated[list[PositiveInt], Len(2, 2)],
        channels: PositiveInt,
        num_classes: PositiveInt,
        batch_size: PositiveInt,
        transform: Transform,
        val_transform: Transform | None = None,
        train: str = "train-*.tar",
        val: str = "val-*.tar",
        seed: Seed = 0,
        num_workers: NonNegativeInt = 0,
        pin_memory: bool = False,
        prepare: Callable[[Path], None] | None = None,
        overfit_samples: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.folder, self.patterns, self.prepare = Path(folder), {"train": train, "val": val}, prepare
        self.image_size, self.channels, self.num_classes = list(image_size), channels, num_classes
        self.batch_size, self.seed = batch_size, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.transform, self.val_transform = transform, val_transform or transform
        self.overfit_samples = overfit_samples
        self.indices: dict[str, ShardIndex] = {}
        self._restored_samples: int | None = None

    @staticmethod
    def check(channels: int) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        if channels not in (1, 3):
            raise ValueError(f"data.channels = {channels}: allowed are 1 (grey) and 3 (RGB)")

    def prepare_data(self) -> None:
        """On one process: put the shards in place if this data set can, and index them."""
        if self.prepare is not None and not list(self.folder.glob(self.patterns["train"])):
            # The folder appears when it is whole; of two processes that start at once, one is the first.
            partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
            self.prepare(partial)
            try:
                partial.rename(self.folder)
            except OSError:
                shutil.rmtree(partial)
        for pattern in self.patterns.values():
            load_index(find_shards(self.folder, pattern))

    def setup(self, stage: str | None = None) -> None:
        for name, pattern in self.patterns.items():
            if name not in self.indices:
                self.indices[name] = self._load(pattern)
        if self.overfit_samples:
            few = self.indices["train"]
            few = ShardIndex(few.shards, few.rows[: self.overfit_samples])
            self.indices = {"train": few, "val": few}

    def _load(self, pattern: str) -> ShardIndex:
        index = load_index(find_shards(self.folder, pattern))
        highest = int(index.rows["label"].max())
        if highest >= self.num_classes:
            shard = index.shards[index.rows["shard"][index.rows["label"].argmax()]]
            raise UserError(
                f"data.num_classes = {self.num_classes}: {shard} holds class {highest}, so > {highest} is needed"
            )
        return index

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

    def train_dataloader(self) -> StreamLoader:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("train_dataloader needs a trainer: the stream is as long as its max_steps")

        def first_step() -> int:
            step = trainer.global_step
            done = self._restored_samples
            assert done in (None, step * self.batch_size), f"data state {done} does not fit step {step}"
            self._restored_samples = None
            return step

        order = StreamOrder(len(self.indices["train"]), self.seed)
        micro_batch = self.micro_batch(trainer.accumulate_grad_batches)
        reader = ShardReader(self.indices["train"], self.channels, self.transform)
        return self._loader(reader, order, micro_batch, trainer.max_steps, first_step)

    def val_dataloader(self) -> StreamLoader:
        num_samples = len(self.indices["val"])
        order = StreamOrder(num_samples, self.seed, shuffle=False)
        # One pass over the set in global batches; the last is filled up with samples of weight 0, because under
        # sharded strategies every rank must run equally many forward passes.
        return self._loader(self.reader("val"), order, self.micro_batch(1), -(-num_samples // self.batch_size))

    test_dataloader = val_dataloader

    def reader(self, name: Literal["train", "val"]) -> ShardReader:
        """The pictures of one set, as validation sees them."""
        return ShardReader(self.indices[name], self.channels, self.val_transform, once=True)

    def _loader(
        self,
        reader: ShardReader,
        order: StreamOrder,
        micro_batch: int,
        num_steps: int,
        first_step: Callable[[], int] = lambda: 0,
    ) -> StreamLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = StreamBatches(order, self.batch_size, micro_batch, rank, world, num_steps, first_step)
        return StreamLoader(
            reader,
            batch_sampler=batches,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "samples": self.trainer.global_step * self.batch_size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "fingerprint": self.indices["train"].fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the run goes on with the stream it began with.

        Raises:
            UserError: naming what differs.
        """
        for key, mine in (("batch_size", self.batch_size), ("seed", self.seed)):
            if state[key] != mine:
                raise UserError(f"data.{key} = {mine}: the checkpoint was trained with {state[key]}; resume with that")
        if state["fingerprint"] != self.indices["train"].fingerprint:
            raise UserError(f"data.folder = {self.folder}: not the samples that the checkpoint was trained on")
        self._restored_samples = state["samples"]
