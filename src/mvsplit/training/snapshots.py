"""A copy in host memory of this process's weights, optimiser state and averages, to roll back to."""

import copy
from collections.abc import Mapping

from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from mvsplit.training.checkpoint_format import LocalTensors
from mvsplit.training.local_state import (
    clear_optimizer,
    fill,
    load_optimizer,
    load_weights,
    local_optimizer,
    local_weights,
    slices_of,
)


class Snapshot:
    """The state before a step. Each process copies and restores its own part; nothing is communicated.

    Args:
        step: optimiser steps done.
        module: whose weights are copied.
        optimizer: whose state is copied.
        averages: of the weights, as in `EMA.shadow`; empty without an EMA.
    """

    def __init__(
        self, step: int, module: LightningModule, optimizer: Optimizer, averages: Mapping[str, Tensor]
    ) -> None:
        self.step = step
        self._weights = LocalTensors(local_weights(module))
        settings, slices = local_optimizer(module, optimizer)
        self._settings, self._optimizer = copy.deepcopy(settings), LocalTensors(slices)
        self._averages = LocalTensors(slices_of(module, dict(averages)))

    def restore(self, module: LightningModule, optimizer: Optimizer, averages: Mapping[str, Tensor]) -> None:
        """Restore all of it bit for bit, including the optimiser's settings such as its learning rate."""
        load_weights(module, self._weights)
        if not len(self._optimizer):  # taken before the first step
            clear_optimizer(module, optimizer)
        load_optimizer(module, optimizer, self._settings, self._optimizer)
        fill(module, self._averages, dict(averages))
