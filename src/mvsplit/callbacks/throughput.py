"""Speed of a run, its time spent waiting for data, its memory."""

import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs means since its last log, every `trainer.log_every_n_steps` steps. Validation and saving do not count.

    `time/images_per_s` over all devices, `time/steps_per_s`, `time/data_wait_share` (of the time between two batches),
    `memory/host_peak_gib` and, on a GPU, `memory/device_peak_gib`.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._wait = self._busy = 0.0
        self._batches = 0
        self._ready: float | None = None  # when the loop began to wait for a batch

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()
        if self._ready is not None:
            self._wait += self._start - self._ready

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if trainer.strategy.root_device.type == "cuda" and trainer.global_step % trainer.log_every_n_steps == 0:
            torch.cuda.synchronize()
        self._ready = time.perf_counter()
        self._busy += self._ready - self._start
        self._batches += 1
        if trainer.global_step % trainer.log_every_n_steps == 0 and not trainer.fit_loop._should_accumulate():
            images = self._batches * len(batch["image"]) * trainer.world_size
            elapsed = self._busy + self._wait
            metrics = {
                "time/images_per_s": images / elapsed,
                "time/steps_per_s": self._batches / trainer.accumulate_grad_batches / elapsed,
                "time/data_wait_share": self._wait / elapsed,
                "memory/host_peak_gib": host_peak_gib(),
            }
            if trainer.strategy.root_device.type == "cuda":
                metrics["memory/device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step - 1)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
            self._wait = self._busy = 0.0
            self._batches = 0

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._ready = None


def host_peak_gib() -> float:
    """Peak memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
