"""`src/train.py` with callbacks that disturb one rank at a known moment; run like it, by the tests."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lightning import Callback, Trainer
from torch import Tensor

import train
from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import checkpoint_writer, settings
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
        when: `start` of training; the start of a batch in `train`, `validation` or `test`; or `save`.
        rank: of the process; -1 for all.
        step: optimiser steps before.
        readers: send signals to the rank's worker processes instead.
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


class DisturbWrites(Callback):
    """Slows down the background writes of checkpoints, and kills this process in one of them.

    Args:
        seconds: added to each point of a write.
        kill: the point, counted from the start of the process, at which it gets SIGKILL.
    """

    def __init__(self, seconds: float = 0.0, kill: int = -1) -> None:
        self.seconds, self.kill, self.points = seconds, kill, 0

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._before(checkpoint_writer.HashedFile, "write")
        self._before(checkpoint_writer.HashedFile, "__exit__")
        self._before(checkpoint_writer.CheckpointWriter, "_finish")
        self._before(CheckpointSaver, "_link")

    def _before(self, kind: type, name: str) -> None:
        original = getattr(kind, name)

        def disturbed(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.points += 1
                if self.points == self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(self.seconds)
            return original(*args)

        setattr(kind, name, disturbed)


if __name__ == "__main__":
    config.PACKAGES += ("disturbed_train.",)
    entry.run(train.main, "train.yaml", settings.checked, RESOLVERS)
