"""Records how long building and each step took: the figures of `src/bench.py depth`."""

import json
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mvsplit.callbacks.throughput import host_peak_gib


class StepTimes(Callback):
    """Writes `step_times.json` when training ends: seconds and memory of rank 0.

    `build_s`: from the trainer's start to the first step: network, sharding, optimiser, first data. `steps_s`: of each
    optimiser step with all of its micro-batches, loading and callbacks included. `peak_gib`: most memory held.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "step_times.json"
        self.steps: list[float] = []

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begun = time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._last = time.perf_counter()
        self._build_s = self._last - self._begun

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self._last = now

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            record = {"build_s": self._build_s, "steps_s": self.steps, "peak_gib": host_peak_gib()}
            self.path.write_text(json.dumps(record, indent=1))
