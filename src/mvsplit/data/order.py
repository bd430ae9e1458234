"""Which sample comes when: one endless stream, the same for any number of ranks, workers and micro-batches.

Place p of the stream is place p mod N of epoch p // N, whose order is a counter-based permutation of (seed, epoch).
Global batch b is the places [b·G, (b + 1)·G); ranks and micro-batches take equal slices of it. So the loader's whole
state is one number, the optimiser steps done, and no sample is lost or repeated by a resume; to seek is to divide.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mvsplit.utils.rng import Stream, bits, permutation


class StreamOrder:
    """Sample numbers along the stream; keeps the permutations of the latest two epochs.

    Args:
        num_samples: N. seed: of the permutations. shuffle: False gives 0 … N − 1 again and again.
        shard_of: number of each sample's shard, ascending. window: shards mixed at a time; 0 mixes all samples. A
            window keeps few shards open at once, for sets that are fetched: the shards' own order is shuffled too.
    """

    def __init__(
        self, num_samples: int, seed: int, shuffle: bool = True, shard_of: NDArray | None = None, window: int = 0
    ) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self.shard_of, self.window = shard_of, window
        self._epochs: dict[int, NDArray] = {}

    def epoch(self, epoch: int) -> NDArray:
        """The order of one pass: a permutation of range(N), (N,) int64."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        if self.window and self.shard_of is not None:
            return windowed_permutation(self.seed, epoch, self.shard_of, self.window)
        return permutation(self.seed, epoch, self.num_samples).numpy()

    def take(self, first: int, count: int) -> list[int]:
        """Sample numbers at `count` places from `first` on."""
        taken: list[int] = []
        while count:
            epoch, place = divmod(first, self.num_samples)
            if epoch not in self._epochs:
                while len(self._epochs) > 1:
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = self.epoch(epoch)
            part = self._epochs[epoch][place : place + count].tolist()
            taken += part
            first, count = first + len(part), count - len(part)
        return taken

    def shards_ahead(self, first: int, count: int) -> list[int]:
        """Shards that the next `count` places need, in the order of their first use."""
        assert self.shard_of is not None
        return list(dict.fromkeys(self.shard_of[self.take(first, count)].tolist()))


def windowed_permutation(seed: int, epoch: int, shard_of: NDArray, window: int) -> NDArray:
    """Shards in random order, cut into windows of so many; within a window all samples in random order.

    Args:
        shard_of: number of each sample's shard, (N,) ascending from 0.

    Returns:
        (N,) int64, a permutation of range(N).
    """
    num_shards = int(shard_of[-1]) + 1
    shards = torch.arange(num_shards) + epoch * num_shards
    rank = np.empty(num_shards, dtype=np.int64)
    rank[bits(seed, Stream.SHARD_SHUFFLE, shards, 1)[:, 0].argsort(stable=True).numpy()] = np.arange(num_shards)
    mixed = permutation(seed, epoch, len(shard_of)).numpy()
    return mixed[np.argsort(rank[shard_of[mixed]] // window, kind="stable")]


class StreamBatches:
    """Batch sampler of one rank: lists of (place in the stream, sample number).

    Args:
        order: see above. batch_size: G, over all ranks and accumulated micro-batches.
        micro_batch: samples per rank and forward pass. rank, world_size: of this process.
        num_steps: optimiser steps of the whole run, from its very beginning.
        first_step: asked when iteration starts: optimiser steps already done.
        ahead: told the place of each global batch when it is handed out, well before it is read.
    """

    def __init__(
        self,
        order: StreamOrder,
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
