"""`src/train.py` with a callback that disturbs one rank at a known moment; run like it, by the tests of this folder."""

import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lightning import Callback, Trainer
from torch import Tensor

import train
from mvsplit.utils import config, entry
from mvsplit.utils.errors import UserError

handles: list[Any] = []


def spoil(output: Tensor) -> None:
    handles.pop().remove()  # once
    output.register_hook(lambda gradient: gradient * math.nan)


class Disturb(Callback):
    """Does `what` on a rank in a hook, once `step` optimiser steps are done.

    Args:
        what: `defect`, `mistake`, `spoil` (a NaN in the gradient of this batch, not in its loss), or names of signals,
            sent one after the other.
        when: `start` (of training), `train`, `validation`, `test` (a batch starts there) or `save`.
        rank: -1 means all of them. readers: signals go to the rank's reading processes, not to itself.
    """

    def __init__(self, what: str, when: str, rank: int, step: int = 7, readers: bool = False) -> None:
        self.what, self.when, self.rank, self.step, self.readers = what, when, rank, step, readers
        self.done = False

    def disturb(self, trainer: Trainer, when: str) -> None:
        if self.done or when != self.when or trainer.global_step < self.step:
            return
        if self.rank not in (-1, trainer.global_rank):
            return
        self.done = True
        if self.what == "defect":
            raise ZeroDivisionError("disturbed by a defect")
        if self.what == "mistake":
            raise UserError("disturbed by a mistake")
        if self.what == "spoil":
            network: Any = trainer.lightning_module.network
            handle = network.register_forward_hook(lambda module, inputs, output: spoil(output))
            handles.append(handle)
            return
        pids = [child.pid or 0 for child in multiprocessing.active_children()] if self.readers else [os.getpid()]
        assert pids
        for name in self.what.split("+"):
            for pid in pids:
                os.kill(pid, signal.Signals[name])

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.disturb(trainer, "start")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.disturb(trainer, "train")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.disturb(trainer, "validation")

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.disturb(trainer, "test")

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.disturb(trainer, "save")


if __name__ == "__main__":
    config.PACKAGES += ("disturbed_train.",)
    entry.run(train.main, "train.yaml")
