"""The Lightning data module: shards in, batches of the endless training stream out."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt

from mvsplit.data.captions import CaptionStates, check_resumed
from mvsplit.data.faults import FaultCounts, FaultPolicy, Finding
from mvsplit.data.folder_scan import load_folder_index
from mvsplit.data.folders import class_folders
from mvsplit.data.formats import Batch, Format
from mvsplit.data.index import Index, ShardIndex, lost_samples
from mvsplit.data.indexing import check_classes, load_index
from mvsplit.data.latent_space import LatentSpace
from mvsplit.data.order import StreamBatches, StreamOrder
from mvsplit.data.reader import NO_TRAINER, LateLoader, ShardReader, StreamLoader, loader_options
from mvsplit.data.remote import is_remote
from mvsplit.data.shard_set import ShardSet, read_captions
from mvsplit.data.shard_writer import write_if_missing
from mvsplit.data.storage import Storage
from mvsplit.data.streaming import Reader, training_source
from mvsplit.data.text_encoder import Padding
from mvsplit.utils.config import Seed
from mvsplit.utils.console import info_once
from mvsplit.utils.errors import AgreedError, UserError

REMOTE_WINDOW = 16
"""Default number of shards of a remote set that are shuffled together."""


class ShardDataModule(L.LightningDataModule):
    """Samples with class labels or captions, from local or remote tar shards, or from image folders.

    Batches: `image` (B, C, height, width) float32 as the network sees it, `label` (B,) if there are classes, `index`
    (B,) sample numbers, `position` (B,) places in the training stream, `weight` (B,) 0 for what validation must not
    count, else 1, and `caption` (a list of B strings) if the set has captions. With `text` also `condition` (B, S, W)
    and `null_condition` (S_max, W), states of the captions and of the empty one in the dtype in which they are stored.

    Args:
        folder: of the shards: a path, or an https, s3 or gs address.
        format: what a sample is (`data/formats.py`).
        storage: how remote shards are cached (`data/storage.py`).
        image_size: [height, width] of a sample.
        channels: of a sample.
        num_classes: labels are 0 … num_classes − 1; 0: samples have no classes.
        batch_size: samples per optimiser step, over all devices and accumulated micro-batches.
        faults: what damage means for the run (`data/faults.py`).
        train: pattern of the training shards' names, with * (not https) or {000..146}; with `layout=folders`, the name
            of the folder of class folders.
        val: the same of the validation set.
        layout: `shards` or `folders` (<folder>/<train>/<class>/<image>).
        reader: `index` reads any sample directly; `webdataset` streams sets too large to index, with fewer guarantees.
        seed: of the order of samples.
        num_workers: worker processes per rank.
        pin_memory: for faster copies to a GPU.
        window: shards shuffled at a time; 0 shuffles all samples. Null is 0 for local sets and 16 for remote ones.
            Remote shards are downloaded and indexed window by window; with 0 all of them are before the first step.
        prepare: called with the folder if it contains no training shards, to write some.
        overfit_samples: train and validate on only the first so many training samples; 0 uses all.
        samples_per_shard: of `reader=webdataset` (`data/streaming.py`).
        shuffle_buffer: of `reader=webdataset`.
        text: padding of captions' states; null: they are not read. `longest`: to the longest of this process's
            micro-batch; padding is not masked, so results depend on its size. `fixed`: to all stored tokens.

    Raises:
        UserError: for missing or damaged shards, labels out of range and batch sizes that cannot be divided evenly.
    """

    def __init__(
        self,
        folder: str,
        format: Format,
        storage: Storage,
        image_size: Annotated[list[PositiveInt], Len(2, 2)],
        channels: PositiveInt,
        num_classes: NonNegativeInt,
        batch_size: PositiveInt,
        faults: FaultPolicy | None = None,
        train: str = "train-*.tar",
        val: str = "val-*.tar",
        layout: Literal["shards", "folders"] = "shards",
        reader: Reader = "index",
        seed: Seed = 0,
        num_workers: NonNegativeInt = 0,
        pin_memory: bool = False,
        window: NonNegativeInt | None = None,
        prepare: Callable[[Path], None] | None = None,
        overfit_samples: NonNegativeInt = 0,
        samples_per_shard: PositiveInt = 1000,
        shuffle_buffer: PositiveInt = 1000,
        text: Padding | None = None,
    ) -> None:
        super().__init__()
        self.text = format.text = CaptionStates(text) if text else None
        format.labelled = num_classes > 0
        patterns = {"train": train, "val": val}
        self.shards = {name: ShardSet(storage, folder, pattern, format) for name, pattern in patterns.items()}
        self.folder, self.layout, self.prepare = self.shards["train"].folder, layout, prepare
        self.format, self.storage, self.policy = format, storage, faults or FaultPolicy()
        self.image_size, self.channels, self.num_classes = list(image_size), channels, num_classes
        self.batch_size, self.seed, self.overfit_samples = batch_size, seed, overfit_samples
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.window = window if window is not None else REMOTE_WINDOW * is_remote(folder)
        if overfit_samples:
            self.window = 0  # only a few samples: shuffle all
        common = self.shards["train"], self.policy, num_classes, batch_size, seed, self.window
        self.source = training_source(reader, common, samples_per_shard, shuffle_buffer)
        self.indices: dict[str, Index] = {}
        self.counts = {"train": FaultCounts(), "val": FaultCounts()}
        self.latest: list[Finding] = []  # of the current batch, from all ranks
        self._pass_faults = 0
        self._restored_samples: int | None = None
        self._restored_space: dict[str, Any] | None = None

    @staticmethod
    def check(train: str, val: str, reader: str, overfit_samples: int, layout: str, num_classes: int) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        if layout == "folders" and not num_classes:
            raise ValueError("data.num_classes = 0: must be at least 1 with data.layout=folders: folders are classes")
        if overfit_samples and reader != "index":
            raise ValueError(f"data.overfit_samples = {overfit_samples}: needs data.reader=index")
        for key, pattern in (("train", train), ("val", val)):
            if pattern.startswith("pipe:"):
                raise ValueError(f"data.{key} = {pattern}: must be names of shards; commands are never run")

    def prepare_data(self) -> None:
        """On one process per machine: write the shards if this data set can, and index what is needed at once."""
        self.provide()
        self._index_at_start()

    def provide(self) -> None:
        """Write the shards if they are missing and this data set can."""
        if self.prepare is not None:
            write_if_missing(self.shards["train"], self.prepare)

    def _index_at_start(self) -> None:
        """Index the sets that must be known before the first step, unless this process has."""
        remote = is_remote(self.folder)
        if self.overfit_samples:
            if not self.indices:
                few = self.source.first(self.overfit_samples, None if remote else self.load("train"))
                self.indices = {"train": few, "val": few}
            return
        for name, needed in (("train", self.source.indexed_at_start), ("val", not remote)):
            if needed and name not in self.indices:
                self.indices[name] = self.load(name)

    def setup(self, stage: str | None = None) -> None:
        self._index_at_start()
        whole = self.indices.get("train")
        self.source.setup(whole if isinstance(whole, ShardIndex) else None)
        if self.source.index is not None:
            self.indices["train"] = self.source.index
        if self.text is not None:
            sets = [self.shards[name] for name in ("train", "val")[: 1 if self.overfit_samples else 2]]
            read_captions(self.text, sets, (index.parts for index in self.indices.values()))
        if parts := next((index.parts for index in self.indices.values() if index.parts), None):
            self.format.bind(parts, self.shards["train"].manifest)

    def validation_index(self) -> ShardIndex:
        """The whole validation set, indexed now if necessary: by one process per machine before the others."""
        if "val" not in self.indices:
            if self.trainer is not None and self.trainer.local_rank:
                self.trainer.strategy.barrier("validation index")
            self.indices["val"] = self.load("val")
            if self.trainer is not None and not self.trainer.local_rank:
                self.trainer.strategy.barrier("validation index")
            self.format.bind(self.indices["val"].parts, self.shards["train"].manifest)
        index = self.indices["val"]
        assert isinstance(index, ShardIndex)
        return index

    def load(self, name: str) -> ShardIndex:
        """The index of one set, brought up to date, its classes checked."""
        shards = self.shards[name]
        if self.layout == "shards":
            index = load_index(shards, self.policy)
        else:  # the validation set's classes have the numbers of the training set's
            root = Path(self.folder, self.shards["train"].pattern)
            classes = [path.name for path in class_folders(root)] if name == "val" and root.is_dir() else None
            index = load_folder_index(shards, self.policy, classes)
            if name == "train" and len(index.shards) < self.num_classes:
                info_once(f"data: {self.folder} has {len(index.shards)} classes, data.num_classes = {self.num_classes}")
        check_classes(index.columns["label"], self.num_classes, index.location)
        return index

    def micro_batch(self, accumulate: int) -> int:
        """Samples per rank and forward pass.

        Raises:
            UserError: if `batch_size` cannot be divided evenly.
        """
        world = (self.trainer or NO_TRAINER).world_size
        if self.batch_size % (world * accumulate):
            raise UserError(
                f"data.batch_size = {self.batch_size}: must be divisible by devices × accumulate_grad_batches"
                f" = {world} × {accumulate}"
            )
        return self.batch_size // (world * accumulate)

    def train_dataloader(self) -> Any:
        """Batches of this rank up to the trainer's last step; without a trainer whole ones, without end."""
        trainer = self.trainer or NO_TRAINER
        micro_batch = self.micro_batch(trainer.accumulate_grad_batches)
        return self.source.loader(trainer, micro_batch, self.first_step, loader_options(self))

    def first_step(self) -> int:
        """Optimiser steps already done, when the loader starts.

        Raises:
            UserError: if the data's saved state does not agree.
        """
        step, done = (self.trainer or NO_TRAINER).global_step, self._restored_samples
        if done not in (None, step * self.batch_size):
            raise UserError(
                f"ckpt_path: the data state ({done} samples) does not match step {step} × data.batch_size"
                f" {self.batch_size}"
            )
        self._restored_samples = None
        if self._restored_space not in (None, self.space.plain() if self.space else None):
            raise UserError("ckpt_path: the set's latents are normalised otherwise, or made by another autoencoder")
        return step

    def val_dataloader(self) -> Any:
        share = self.trainer.limit_val_batches if self.trainer is not None else 1.0
        if "val" in self.indices or (isinstance(share, float) and share < 1):  # a share of a number that must be known
            return self._whole_validation()
        return LateLoader(self._whole_validation)

    def _whole_validation(self) -> StreamLoader:
        reader, micro_batch = self.reader("val", text=True), self.micro_batch(1)
        order = StreamOrder(len(reader), self.seed, shuffle=False)
        # One pass over the set in global batches; the last is filled up with samples of weight 0, because under
        # sharded strategies every rank must run equally many forward passes.
        trainer, num_steps = self.trainer or NO_TRAINER, -(-len(reader) // self.batch_size)
        batches = StreamBatches(order, self.batch_size, micro_batch, trainer.global_rank, trainer.world_size, num_steps)
        return StreamLoader(reader, batch_sampler=batches, **loader_options(self))

    test_dataloader = val_dataloader

    def reader(self, name: Literal["train", "val"], train: bool = False, text: bool = False) -> ShardReader:
        """The samples of one set, by default as validation sees them; with `text` also their captions' states."""
        index = self.validation_index() if name == "val" else self.indices[name]
        return ShardReader(index, self.storage, self.format, self.policy, train, self.seed, self.text if text else None)

    def teardown(self, stage: str) -> None:
        self.source.close()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """On the device, `finish`: all ranks count the faults of all, and stop together."""
        return self.finish(batch, self.trainer is not None and self.trainer.training)

    def batches(self, name: Literal["train", "val"] = "train") -> Iterator[Batch]:
        """Without a trainer: the batches of a set as the network sees them, those of the training set without end."""
        self.prepare_data()
        self.setup()
        for batch in self.train_dataloader() if name == "train" else self.val_dataloader():
            yield self.finish(batch, name == "train")

    def finish(self, batch: Batch, train: bool) -> Batch:
        """Convert a loader's batch to what the network sees.

        Raises:
            AgreedError: if the policy does not tolerate its faults.
        """
        counts = self.counts["train" if train else "val"]
        strategy = self.trainer.strategy if self.trainer else None
        self.latest = counts.add(batch.pop("findings"), len(batch["weight"]), strategy)
        try:
            self.policy.enforce(self.latest, counts.checkable, counts.samples)
            if not train:
                self._check_pass(int(batch["position"][0]))
        except UserError as error:
            raise AgreedError(str(error)) from None
        if self.text is not None:
            batch["null_condition"] = self.text.null(batch["condition"].device)
        return self.format.finish(batch, train)

    def _check_pass(self, position: int) -> None:
        """A pass over the validation set in which nothing could be read has no loss to report."""
        if position < self.batch_size:  # the first batch of a pass
            self._pass_faults = 0
        self._pass_faults += sum(finding.kind != "retried" for finding in self.latest)
        if self._pass_faults >= len(self.validation_index()):
            raise UserError(f"{self.latest[-1].message}; no other sample of the validation set can be read either")

    @property
    def space(self) -> LatentSpace | None:
        """How samples become images; None if they are. Windowed sets are bound later, so the manifest is read here."""
        return self.format.space or self.format.space_of(self.shards["train"].manifest)

    @property
    def left_out(self) -> int:
        """About how many training samples were found damaged when they were indexed."""
        return lost_samples(self.indices["train"].scanned) if "train" in self.indices else 0

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        counts, samples = self.counts["train"], self.trainer.global_step * self.batch_size
        faults = {"counts": dict(counts.counts), "samples": counts.samples}
        parts = {"latents": self.space, "text": self.text}
        known = {name: part.plain() for name, part in parts.items() if part is not None}
        return {"samples": samples, **self.source.state(), "faults": faults, **known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the run continues the stream it began with.

        Raises:
            UserError: naming what differs.
        """
        self.source.restore(state)
        check_resumed(self.text, state.get("text"))
        self._restored_samples, self._restored_space = state["samples"], state.get("latents")
        if faults := state.get("faults"):
            self.counts["train"] = FaultCounts(Counter(faults["counts"]), faults["samples"])
