"""Whether the network knows what time it is: a linear probe on its tokens, by depth (paper: R² ≈ 0.998)."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from pydantic import PositiveInt
from torch import Tensor

from mvsplit.callbacks.stability import spread_evenly
from mvsplit.stability.measures import time_probe
from mvsplit.stability.traces import TableWriter
from mvsplit.utils.errors import UserError


class TimeProbe(Callback):
    """At each validation, fits and judges a linear probe from the image-token mean to t; leaves `time_probe.csv`.

    It looks on while validation runs, with the averaged weights, at the samples' fixed times.

    Args:
        folder: where the table goes. blocks: whose outputs are probed, spread evenly over the depth.
        samples: used at most, of those that the first process validates; half fit the probe, half judge it.
    """

    def __init__(self, folder: str, blocks: PositiveInt = 25, samples: PositiveInt = 2048) -> None:
        self.path, self.num_blocks, self.samples = Path(folder) / "time_probe.csv", blocks, samples
        self._means: dict[int, list[Tensor]] = {}  # block → (B, D) of each batch
        self._times: list[Tensor] = []
        self._handles: list[Any] = []

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        if not hasattr(module.network, "blocks"):
            raise UserError("callbacks.time_probe: this network has no blocks to look at; allowed is null")
        self._means, self._times = {}, []

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.is_global_zero or sum(map(len, self._times)) >= self.samples:
            return  # one process's share will do
        counted = batch["weight"] > 0  # the last batch is filled up
        self._times.append(module.validation_times(batch["index"])[counted])
        for number in spread_evenly(len(module.network.blocks), self.num_blocks):
            keep = self._means.setdefault(number, [])

            def hook(block: Any, inputs: tuple[Any, ...], x: Tensor, keep: list[Tensor] = keep) -> None:
                keep.append(x[counted, : inputs[3][0]].float().mean(1))

            self._handles.append(module.network.blocks[number].register_forward_hook(hook))

    def on_validation_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or sum(map(len, self._times)) < 4:
            return
        t = torch.cat(self._times)
        step = max(0, trainer.global_step - 1)  # where curves have it
        rows = [
            {"step": step, "block": block, "r2": time_probe(torch.cat(means), t)}
            for block, means in self._means.items()
        ]
        table = TableWriter(self.path, ("step", "block", "r2"), step)
        table.append(rows)
        table.close()
