"""The checkpoint that a run resumes from: every N steps, at the end, and when somebody stops the run."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import PositiveInt

from mvsplit.training.folder import remove
from mvsplit.utils.console import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LastCheckpoint(Checkpoint):
    """Writes `<folder>/last-<step>.ckpt` and points `last.ckpt` at it, atomically; then removes all but some before.

    A run killed at any moment leaves a whole checkpoint behind; should the newest be damaged later, there is another.
    Ctrl-C and SIGTERM only raise a flag; at the end of the running step all ranks agree, save together and stop.
    (Lightning's own handlers act inside the signal: with several ranks they can deadlock, and Ctrl-C loses the steps
    since the last save.) A second Ctrl-C stops at once.

    Args:
        folder: of the checkpoints. every_n_steps: optimiser steps between two saves. keep: the last so many.
    """

    def __init__(self, folder: str, every_n_steps: PositiveInt = 100, keep: PositiveInt = 2) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self.received: signal.Signals | None = None
        """The signal that stopped the run, on every rank, if one did."""
        self._flag = 0
        self._saved_step = -1
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.received, self._flag, self._saved_step = None, 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # Here, because the trainer has just installed its own.
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._flag == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._flag = number

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        if trainer.strategy.reduce_boolean_decision(bool(self._flag), all=False):
            # Ranks that got no signal themselves report SIGTERM: somebody stopped the job, not them.
            self.received = signal.Signals(self._flag or signal.SIGTERM)
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # or Lightning would validate first: whoever stops a run wants it now
            if trainer.is_global_zero:
                say(f"{self.received.name}: saving step {step} and stopping; go on with ckpt_path=last")
            self.save(trainer)
        elif step % self.every_n_steps == 0 and not self._validation_follows(trainer):
            self.save(trainer)

    @staticmethod
    def _validation_follows(trainer: Trainer) -> bool:
        # A state saved before it would, after a kill, go on behind it: that validation would be lost.
        done = trainer.fit_loop.total_batch_idx + 1
        interval = trainer.val_check_batch
        return bool(trainer.enable_validation and interval and done % interval == 0)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if trainer.state.fn == TrainerFn.FITTING and step % self.every_n_steps == 0 and step > self._saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step > max(self._saved_step, 0):
            self.save(trainer)
        if self._flag:  # after the last step: what is left is not done
            self.received = signal.Signals(self._flag)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def save(self, trainer: Trainer) -> None:
        """Write the state and make it the one that `last.ckpt` means."""
        if trainer.fast_dev_run:
            return
        path = self.folder / f"last-{trainer.global_step:08d}.ckpt"
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(path)  # all ranks: each writes what it holds
        if trainer.is_global_zero:
            link = self.folder / "last.ckpt"
            fresh = self.folder / "last.ckpt.new"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.name)
            os.replace(fresh, link)
            for old in sorted(self.folder.glob("last-*.ckpt"))[: -self.keep]:
                remove(old)
        trainer.strategy.barrier("last_checkpoint")
