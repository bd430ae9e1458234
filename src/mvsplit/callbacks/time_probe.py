"""Can t be read from the tokens? A linear probe, by depth (paper: R² ≈ 0.998)."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from pydantic import PositiveInt
from torch import Tensor

from mvsplit.callbacks.stability_probe import spread_evenly
from mvsplit.stability.measures import time_probe
from mvsplit.stability.tables import TableWriter
from mvsplit.stability.taps import are_tokens, blocks_of, image_tokens, kind_of
from mvsplit.utils.console import info_once


class TimeProbe(Callback):
    """At each validation, fits and tests a linear probe from the image-token mean to t, and writes `time_probe.csv`.

    It uses the forward passes of the validation, with the averaged weights and the samples' fixed times.

    Args:
        folder: of the table.
        blocks: number of blocks whose outputs are probed, spread evenly over the depth.
        samples: number of samples at most, of those that rank 0 validates. Half of them fit the probe, half test it.
    """

    def __init__(self, folder: str, blocks: PositiveInt = 25, samples: PositiveInt = 2048) -> None:
        self.path, self.num_blocks, self.samples = Path(folder) / "time_probe.csv", blocks, samples
        self._means: dict[int, list[Tensor]] = {}  # block → (B, D) of each batch
        self._times: list[Tensor] = []
        self._blocks: list[Any] = []
        self._handles: list[Any] = []

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        timed = hasattr(module, "validation_times")
        self._blocks = blocks_of(module.network) if timed else []
        if not self._blocks and trainer.is_global_zero:
            what = f"{kind_of(module.network)} has no blocks" if timed else f"{type(module).__name__} has no times"
            info_once(f"callbacks.time_probe: off, {what}")
        self._means, self._times = {}, []

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._blocks or not trainer.is_global_zero or sum(map(len, self._times)) >= self.samples:
            return  # the samples of one process are enough
        counted = batch["weight"] > 0  # the last batch is padded
        self._times.append(module.validation_times(batch["index"])[counted])
        for number in spread_evenly(len(self._blocks), self.num_blocks):
            keep = self._means.setdefault(number, [])

            def hook(block: Any, inputs: tuple[Any, ...], x: Any, keep: list[Tensor] = keep) -> None:
                if are_tokens(x):
                    keep.append(image_tokens(module.network, x).mean(1, dtype=torch.float32)[counted])

            self._handles.append(self._blocks[number].register_forward_hook(hook))

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
        step = max(0, trainer.global_step - 1)  # as in the logged curves
        rows = [
            {"step": step, "block": block, "r2": time_probe(torch.cat(means), t)}
            for block, means in self._means.items()
            if sum(map(len, means)) == len(t)  # the block returned tokens, once for each sample
        ]
        if not rows:
            return
        table = TableWriter(self.path, ("step", "block", "r2"), step)
        table.append(rows)
        table.close()
