"""Where training samples come from and in which order: a set indexed as a whole, or window by window.

`ShardDataModule` has one of these; `data/streaming.py` has a third. So nothing else depends on the way of reading.
"""

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from mvsplit.data.faults import DataFault, FaultPolicy
from mvsplit.data.index import Index, Part, ShardIndex, merge, split
from mvsplit.data.indexing import PartFiles, stored_index
from mvsplit.data.order import Order, StreamBatches, StreamOrder, WindowedOrder
from mvsplit.data.reader import ShardReader, StreamLoader
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.storage import CONNECTIONS, Storage
from mvsplit.data.windows import WindowedIndex
from mvsplit.utils.console import progress
from mvsplit.utils.errors import UserError


class TrainingSource(ABC):
    """The training set, ready to read.

    Attributes:
        numbered: samples have numbers.
        index: of the set; None if there is none yet.
        indexed_at_start: the whole set is indexed before the first step.
    """

    numbered: ClassVar[bool] = True

    def __init__(
        self, shards: ShardSet, policy: FaultPolicy, num_classes: int, batch_size: int, seed: int, window: int = 0
    ) -> None:
        self.shards, self.policy, self.num_classes = shards, policy, num_classes
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.index: Index | None = None
        self.indexed_at_start = not (shards.remote and window)

    def setup(self, whole: ShardIndex | None) -> None:
        """Prepare the index; `whole` is that of all samples if they are indexed at the start."""
        self.index = whole

    def first(self, count: int, whole: ShardIndex | None) -> ShardIndex:
        """The first `count` samples; if the whole is not known, only the shards that contain them are indexed."""
        if whole is not None:
            return whole.first(count)
        index, parts = self._windowed_index(), list[Part]()
        for number in range(len(index.names)):
            index.open([number])
            parts.append(index.part(number))
            if sum(shard.samples for shard, _ in parts) >= count:
                break
        return merge(index.folder, parts).first(count)

    def _windowed_index(self, whole: ShardIndex | None = None) -> WindowedIndex:
        """An index whose shards are scanned when they are needed, if the whole is not known."""
        shards = self.shards
        if whole is not None:
            names, known = [shard.name for shard in whole.shards], {part[0].name: part for part in split(whole)}
            return WindowedIndex(shards.folder, names, known.__getitem__, known, {}, self.policy, self.num_classes)
        stored, get = stored_index(shards), PartFiles(shards).get
        return WindowedIndex(
            shards.folder, stored.names, get, stored.valid, shards.published, self.policy, self.num_classes
        )

    @abstractmethod
    def loader(self, trainer: Any, micro_batch: int, first_step: Callable[[], int], options: dict[str, Any]) -> Any:
        """Batches of this rank up to the trainer's last step.

        Args:
            first_step: returns the optimiser steps done when iteration starts.
            options: further arguments of PyTorch's loader.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for the same samples in the same order."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must store besides the step."""
        own = {"batch_size": self.batch_size, "seed": self.seed, "window": self.window}
        return own | {"fingerprint": self.fingerprint(), "shards": None}

    def restore(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint's state is of this stream.

        Raises:
            UserError: naming what differs.
        """
        for key, mine in (("batch_size", self.batch_size), ("seed", self.seed), ("window", self.window)):
            if state.get(key, mine) != mine:
                raise UserError(f"data.{key} = {mine}: the checkpoint was trained with {state[key]}; resume with that")
        if state["fingerprint"] != self.fingerprint():
            raise UserError(f"data.folder = {self.shards.folder}: the checkpoint was trained on other samples")

    def close(self) -> None:  # noqa: B027 (few have any)
        """End processes that download ahead."""


class Prefetcher:
    """Downloads the shards that will be needed soon, in a separate process.

    Not in threads: the loader's workers are forked, and a fork of a process with busy threads can hang.
    Errors are not reported from here: the reader that needs the shard has the same error, and reports it.
    """

    def __init__(self, storage: Storage, index: Index) -> None:
        context = multiprocessing.get_context("fork")
        requests, self._requests = context.Pipe(duplex=False)
        self._requested: set[int] = set()
        self._process = context.Process(target=_fetch, args=(storage, index, requests, os.getpid()), daemon=True)
        self._process.start()

    def request(self, shards: list[int]) -> None:
        """Download these shards, in this order; those that were in the previous list are not requested again."""
        with suppress(OSError):  # the process was killed: readers download what they need themselves
            for shard in shards:
                if shard not in self._requested:
                    self._requests.send(shard)
        self._requested = set(shards)

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # a partial download has no final name yet, and its lock ends with the process
        self._process.join()


def _fetch(storage: Storage, index: Index, requests: Connection, parent: int) -> None:
    # The training process's handlers were inherited by the fork.
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to all processes of a job, whose readers still need this one
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fetch(number: int) -> None:
        with suppress(DataFault, ValueError):
            shard = index.shard(number)  # indexes it if necessary
            storage.local(f"{index.folder}/{shard.name}", shard.size, shard.sha256)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        while os.getppid() == parent:  # a killed parent cannot close the connection
            if requests.poll(timeout=2):
                pool.submit(fetch, requests.recv())
        os._exit(0)


class IndexedSource(TrainingSource):
    """All samples shuffled together: every shard is indexed before the first step."""

    _prefetcher: Prefetcher | None = None
    _requested = False

    def loader(self, trainer: Any, micro_batch: int, first_step: Callable[[], int], options: dict[str, Any]) -> Any:
        index, shards = self.index, self.shards
        assert index is not None
        if shards.remote and not trainer.local_rank:  # one process per machine
            self._prefetcher = Prefetcher(shards.storage, index)
        order = self.order(trainer)
        rank, world_size = trainer.global_rank, trainer.world_size
        ahead, self._requested = partial(self._ahead, order), False
        batches = StreamBatches(
            order, self.batch_size, micro_batch, rank, world_size, trainer.max_steps, first_step, ahead
        )
        form = shards.form
        reader = ShardReader(index, shards.storage, form, self.policy, train=True, seed=self.seed, text=form.text)
        return StreamLoader(reader, batch_sampler=batches, **options)

    def order(self, trainer: Any) -> Order:
        """The order of samples. Subclasses also prepare the first batch here."""
        index = self.index
        assert isinstance(index, ShardIndex)
        return StreamOrder(len(index), self.seed, shard_of=index.shard_of)

    def _ahead(self, order: Order, place: int) -> None:
        """Called with the place of each global batch, so that its shards are downloaded in time."""
        if self._prefetcher is not None and (isinstance(order, WindowedOrder) or not self._requested):
            self._prefetcher.request(order.shards_ahead(place))  # without windows all shards, once
        self._requested = True

    def fingerprint(self) -> str:
        assert self.index is not None
        return self.index.fingerprint

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


class WindowedSource(IndexedSource):
    """A window of shards shuffled at a time: those of a remote set are downloaded and indexed when they are needed."""

    def setup(self, whole: ShardIndex | None) -> None:
        if not isinstance(self.index, WindowedIndex):
            self.index = self._windowed_index(whole)

    def order(self, trainer: Any) -> WindowedOrder:
        index = self.index
        assert isinstance(index, WindowedIndex)
        # The counts of unreachable shards come from here: the same on all ranks, whatever each could download.
        index.published = trainer.strategy.broadcast(index.published)
        order = WindowedOrder(
            len(index.names), self.window, self.seed, index.counts_of, index.known, open_shards=index.open
        )
        # Download and index the window that the run begins in.
        place = trainer.global_step * self.batch_size
        if self._prefetcher is not None:
            self._prefetcher.request(order.shards_ahead(place))
        shards, limit = order.shards(order.find(place, learn=False)), self.shards.storage.limit
        bar = progress(f"indexing {index.folder}, shards of the first window", len(shards))
        with bar if trainer.is_global_zero else nullcontext(lambda count: None) as advance:
            for shard in shards:
                index.open([shard])
                # Of the present window and of the next.
                needed = min(2 * self.window, len(index.names)) * index.shard(shard).size
                if self.shards.remote and needed > limit:
                    raise UserError(
                        f"data.storage.cache_gib = {limit / 2**30:.3g}: two windows of data.window = {self.window}"
                        f" shards need at least {needed / 2**30:.2g}"
                    )
                advance(1)
        index.settle_parts(shards)
        self.shards.form.bind(index.parts, self.shards.manifest)
        return order

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} in windows"

    def state(self) -> dict[str, Any]:
        shards = self.index.state() if isinstance(self.index, WindowedIndex) else None
        return super().state() | {"shards": shards}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        assert isinstance(self.index, WindowedIndex)
        self.index.restore(state.get("shards"))
