"""Which sample comes when: one endless stream, the same for any number of ranks, workers and micro-batches.

Place p of the stream is place p mod N of epoch p // N, whose order is a counter-based permutation of (seed, epoch).
Global batch b is the places [b·G, (b + 1)·G); ranks and micro-batches take equal slices of it. So the loader's whole
state is one number, the optimiser steps done, and no sample is lost or repeated by a resume.
"""

from collections.abc import Callable, Iterator

from mvsplit.utils.rng import permutation


class StreamOrder:
    """Sample numbers along the stream; keeps the permutations of the latest two epochs.

    Args:
        num_samples: N. seed: of the permutations. shuffle: False gives 0 … N − 1 again and again.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return place
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = permutation(self.seed, epoch, self.num_samples).tolist()
        return self._epochs[epoch][place]


class StreamBatches:
    """Batch sampler of one rank: lists of (place in the stream, sample number).

    Args:
        order: see above. batch_size: G, over all ranks and accumulated micro-batches.
        micro_batch: samples per rank and forward pass. rank, world_size: of this process.
        num_steps: optimiser steps of the whole run, from its very beginning.
        first_step: asked when iteration starts: optimiser steps already done.
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
    ) -> None:
        assert batch_size % (micro_batch * world_size) == 0, "checked with the config"
        self.order, self.global_batch, self.batch_size = order, batch_size, micro_batch
        self.rank, self.world_size = rank, world_size
        self.num_steps, self.first_step = num_steps, first_step
        self.accumulate = batch_size // (micro_batch * world_size)

    def __len__(self) -> int:
        # Of the whole run, also after a resume: Lightning counts the batches fetched before the interruption.
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step(), self.num_steps):
            for micro in range(self.accumulate):
                first = step * self.global_batch + (micro * self.world_size + self.rank) * self.batch_size
                yield [(p, self.order[p]) for p in range(first, first + self.batch_size)]
