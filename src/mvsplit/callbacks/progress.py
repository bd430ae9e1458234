"""Progress of a run in optimiser steps, with the time left."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from pydantic import PositiveFloat
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mvsplit.utils.console import console, info


class StepProgress(ProgressBar):
    """A rich progress bar over the run's steps; if the output is not a terminal, a line at intervals.

    Args:
        line_every_s: seconds between two lines if the output is not a terminal.
    """

    def __init__(self, line_every_s: PositiveFloat = 15.0) -> None:
        super().__init__()
        self.line_every_s = line_every_s
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._first_step, self._began, self._last_line = trainer.global_step, time.monotonic(), 0.0
        out = console()
        if self._enabled and out.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=out,
            )
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, metrics="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if done == 1:
            self._began = now  # the first step may compile: it is not typical
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, metrics=self._metrics(trainer, module))
        elif (
            done > 3 and now - self._last_line > self.line_every_s
        ):  # the first line early: it estimates the total time
            self._last_line = now
            left = (now - self._began) / (done - 1) * (trainer.max_steps - trainer.global_step)
            metrics = self._metrics(trainer, module)
            info(f"step {trainer.global_step}/{trainer.max_steps}  {metrics}  about {left:.0f} s left")

    def _metrics(self, trainer: Trainer, module: LightningModule) -> str:
        metrics = self.get_metrics(trainer, module)
        return "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k != "v_num" and isinstance(v, float))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
