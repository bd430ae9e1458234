"""A copy in host memory of what this process holds of weights, optimiser and averages, to go back to."""

import copy
from collections.abc import Mapping

from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from mvsplit.training.folder import HeldTensors
from mvsplit.training.shards import (
    clear_optimizer,
    fill,
    held_optimizer,
    held_weights,
    load_optimizer,
    load_weights,
    slices_of,
)


class Snapshot:
    """The state before a step. Each process copies and restores its own part; nothing is communicated.

    Args:
        step: optimiser steps done. averages: of the weights, as `EMA.shadow` holds them; empty without an EMA.
    """

    def __init__(
        self, step: int, module: LightningModule, optimizer: Optimizer, averages: Mapping[str, Tensor]
    ) -> None:
        self.step = step
        self._weights = HeldTensors(held_weights(module))
        settings, slices = held_optimizer(module, optimizer)
        self._settings, self._optimizer = copy.deepcopy(settings), HeldTensors(slices)
        self._averages = HeldTensors(slices_of(module, dict(averages)))

    def restore(self, module: LightningModule, optimizer: Optimizer, averages: Mapping[str, Tensor]) -> None:
        """Put it back, to the bit; the optimiser's settings, learning rate included, too."""
        load_weights(module, self._weights)
        if not len(self._optimizer):  # from before the first step
            clear_optimizer(module, optimizer)
        load_optimizer(module, optimizer, self._settings, self._optimizer)
        fill(module, self._averages, dict(averages))
