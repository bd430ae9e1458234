"""The order of samples: one endless stream, the same for any number of ranks, workers and micro-batches.

Place p of the stream is place p mod N of epoch p // N, whose order is a counter-based permutation of (seed, epoch).
Global batch b is the places [b·G, (b + 1)·G); ranks and micro-batches take equal slices of it. So the loader's whole
state is one number, the optimiser steps done, no sample is lost or repeated by a resume, and seeking is a division.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Stream, bits, permutation

SHARD_BITS = 32
"""If samples are numbered by shard, sample i of shard s has the number s · 2³² + i."""


class Order(ABC):
    """An endless stream of sample numbers."""

    def take(self, first: int, count: int) -> list[int]:
        """Sample numbers at `count` places from `first` on."""
        taken: list[int] = []
        while len(taken) < count:
            taken += self.piece(first + len(taken))[: count - len(taken)].tolist()
        return taken

    @abstractmethod
    def piece(self, place: int) -> NDArray | Tensor:
        """Some sample numbers from this place on, at least one."""

    @abstractmethod
    def shards_ahead(self, place: int) -> list[int]:
        """Shards that are needed next from this place on, in the order of their first use."""


class StreamOrder(Order):
    """All samples shuffled; keeps the permutations of the latest two epochs.

    Args:
        num_samples: N.
        seed: of the permutations.
        shuffle: False gives 0 … N − 1 in every epoch.
        shard_of: number of each sample's shard, ascending; needed only by `shards_ahead`.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True, shard_of: NDArray | None = None) -> None:
        self.num_samples, self.seed, self.shuffle, self.shard_of = num_samples, seed, shuffle, shard_of
        self._epochs: dict[int, NDArray] = {}

    def epoch(self, epoch: int) -> NDArray:
        """The order of one pass: a permutation of range(N), (N,) int64."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        return permutation(self.seed, epoch, self.num_samples).numpy()

    def piece(self, place: int) -> NDArray:
        epoch, place = divmod(place, self.num_samples)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self.epoch(epoch)
        return self._epochs[epoch][place:]

    def shards_ahead(self, place: int) -> list[int]:
        """All shards, in the order in which an epoch from this place on first needs them."""
        assert self.shard_of is not None
        return list(dict.fromkeys(self.shard_of[self.take(place, self.num_samples)].tolist()))


class Window(NamedTuple):
    """Shards whose samples are shuffled together, in one epoch.

    Attributes:
        epoch: number of the pass over the set.
        number: of the window within the epoch.
        start: place of its first sample in the stream.
    """

    epoch: int
    number: int
    start: int


class WindowedOrder(Order):
    """A few shards shuffled at a time: only these need to be stored locally, and nothing need be known of the others.

    In each epoch the shards have another random order, which is cut into windows; within a window all samples are
    shuffled. Where a window begins depends only on the counts of those before it.

    Args:
        num_shards: of the set.
        window: shards per window.
        seed: of both permutations.
        counts: returns the number of samples of each of these shards.
        known: whether `counts` can return at once for these shards.
        open_shards: called before samples of these shards, a window, are used.
    """

    def __init__(
        self,
        num_shards: int,
        window: int,
        seed: int,
        counts: Callable[[list[int]], list[int]],
        known: Callable[[list[int]], bool] = lambda shards: True,
        open_shards: Callable[[list[int]], None] = lambda shards: None,
    ) -> None:
        self.num_shards, self.window, self.seed = num_shards, window, seed
        self.counts, self.known, self.open_shards = counts, known, open_shards
        self.num_windows = -(-num_shards // window)
        self._opened: list[tuple[Window, Tensor]] = []  # the latest two, with their samples in order
        self._permutation: tuple[int, list[int]] = (-1, [])

    def shards(self, window: Window) -> list[int]:
        """The shards of a window."""
        if self._permutation[0] != window.epoch:
            counters = torch.arange(self.num_shards) + window.epoch * self.num_shards
            draws = bits(self.seed, Stream.SHARD_SHUFFLE, counters, 1)[:, 0]
            self._permutation = window.epoch, draws.argsort(stable=True).tolist()
        return self._permutation[1][window.number * self.window : (window.number + 1) * self.window]

    def piece(self, place: int) -> Tensor:
        window, samples = self._open(place)
        return samples[place - window.start :]

    def shards_ahead(self, place: int) -> list[int]:
        """Shards of the window at this place, and of the next."""
        window = self.find(place, learn=False)
        return self.shards(window) + self.shards(self._after(window, 0))

    def find(self, place: int, learn: bool = True) -> Window:
        """The window that contains a place; without `learn`, one with unknown counts is assumed to contain it."""
        window = Window(0, 0, 0)
        for opened, samples in self._opened:
            end = opened.start + len(samples)
            if opened.start <= place < end:
                return opened
            if end <= place:
                window = self._after(opened, end)
        while True:
            if window.epoch and not window.number:
                total = window.start // window.epoch  # each epoch is as long as the first
                if not total:
                    raise UserError("data: the training shards contain no samples")
                passes = (place - window.start) // total
                window = Window(window.epoch + passes, 0, window.start + passes * total)
            shards = self.shards(window)
            if not learn and not self.known(shards):
                return window
            end = window.start + sum(self.counts(shards))
            if place < end:
                return window
            window = self._after(window, end)

    def _open(self, place: int) -> tuple[Window, Tensor]:
        window = self.find(place)
        for opened, samples in self._opened:
            if opened == window:
                return opened, samples
        shards = self.shards(window)
        self.open_shards(shards)
        counts = zip(shards, self.counts(shards), strict=True)
        numbers = torch.cat([(shard << SHARD_BITS) + torch.arange(count) for shard, count in counts])
        counters = numbers + (window.epoch * self.num_shards << SHARD_BITS)  # a different one for each sample and epoch
        mixed = numbers[bits(self.seed, Stream.SHUFFLE, counters, 1)[:, 0].argsort(stable=True)]
        self._opened = [*self._opened[-1:], (window, mixed)]
        return self._opened[-1]

    def _after(self, window: Window, start: int) -> Window:
        last = window.number == self.num_windows - 1
        return Window(window.epoch + last, 0 if last else window.number + 1, start)


class StreamBatches:
    """Batch sampler of one rank: lists of (place in the stream, sample number).

    Args:
        batch_size: G, over all ranks and accumulated micro-batches.
        micro_batch: samples per rank and forward pass.
        num_steps: optimiser steps of the whole run, counted from its very beginning.
        first_step: called when iteration starts; returns the optimiser steps already done.
        ahead: called with the place of each global batch when it is scheduled, well before it is read.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_steps: int,
        first_step: Callable[[], int] = lambda: 0,
        ahead: Callable[[int], None] = lambda place: None,
    ) -> None:
        assert batch_size % (micro_batch * world_size) == 0, "checked with the config"
        self.order, self.global_batch, self.batch_size = order, batch_size, micro_batch
        self.rank, self.world_size = rank, world_size
        self.num_steps, self.first_step, self.ahead = num_steps, first_step, ahead
        self.accumulate = batch_size // (micro_batch * world_size)

    def __len__(self) -> int:
        # Of the whole run, also after a resume: Lightning counts the batches fetched before the interruption.
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step(), self.num_steps):
            self.ahead(step * self.global_batch)
            for micro in range(self.accumulate):
                first = step * self.global_batch + (micro * self.world_size + self.rank) * self.batch_size
                yield list(enumerate(self.order.take(first, self.batch_size), first))
