"""The checkpoint that a run resumes from: every N steps, at the end, and when somebody stops the run."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from pydantic import PositiveInt

from mvsplit.training.folder import remove
from mvsplit.utils.console import say

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Those that stop a run. If ranks got different ones, the later in this row counts."""


class LastCheckpoint(Checkpoint):
    """Writes `<folder>/last-<step>.ckpt` and points `last.ckpt` at it, atomically; then removes all but some before.

    A run killed at any moment leaves a whole checkpoint behind; should the newest be damaged later, there is another.
    Ctrl-C, SIGTERM and SIGUSR1 (SLURM's notice of a time limit or pre-emption) to any rank only raise a flag; at the
    end of the running step, or of the running validation, all ranks agree, save together and stop. Before the first
    step and in a test, when there is nothing to save, they end the run at once. (Lightning's own handlers act inside
    the signal: with several ranks they can deadlock, and Ctrl-C loses the steps since the last save.) A second Ctrl-C
    stops at once.

    Args:
        folder: of the checkpoints. every_n_steps: optimiser steps between two saves. keep: the last so many.
        requeue: whether a stopped SLURM job is put into the queue again: `auto` after SIGUSR1 (after a SIGTERM that
            means pre-emption SLURM does it itself, and `scancel` means the end), `any` after SIGTERM too, or `never`.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: PositiveInt = 100,
        keep: PositiveInt = 2,
        requeue: Literal["auto", "any", "never"] = "auto",
    ) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        asking: dict[str, set[int]] = {"any": {signal.SIGUSR1, signal.SIGTERM}, "auto": {signal.SIGUSR1}}
        self.requeue_after = asking.get(requeue, set())
        self.received: signal.Signals | None = None
        """The signal that stopped the run, on every rank, if one did."""
        self._flag = 0
        self._process = 0
        self._training = False
        self._saved_step = -1
        self._previous: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.received, self._flag, self._training = None, 0, False
        self._process = os.getpid()
        # Lightning's would come later and call ours after their own doing.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_step, self._training = trainer.global_step, True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # forked, as reading processes are: they inherit the handler, and whether to stop is not for them
        if not self._training:
            self._leave(self.received or number)
        if self._flag == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._flag = self._flag or number  # the first says why; SLURM's SIGTERM follows its notice

    def _leave(self, number: int) -> NoReturn:
        self.requeue(number)
        sys.exit(128 + number)

    def requeue(self, number: int) -> None:
        """Put the SLURM job into the queue again, if that is asked for after this signal; rank 0 does."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None or number not in self.requeue_after or rank_zero_only.rank != 0:
            return
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            failure = done.stderr.strip() or f"status {done.returncode}" if done.returncode else None
        except OSError as error:
            failure = str(error)
        say(f"job {job} is queued again" if failure is None else f"job {job} is not queued again: {failure}")

    def _agree(self, trainer: Trainer) -> bool:
        """Whether any rank was told to stop; then all know by which signal."""
        place = SIGNALS.index(signal.Signals(self._flag)) + 1 if self._flag else 0
        told = torch.tensor(place, device=trainer.strategy.root_device)
        place = int(trainer.strategy.reduce(told, reduce_op="max"))
        self.received = SIGNALS[place - 1] if place else None
        return place > 0

    def _stop(self, trainer: Trainer) -> None:
        assert self.received is not None
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # or Lightning would validate first: whoever stops a run wants it now
        if trainer.is_global_zero:
            say(f"{self.received.name}: saving step {trainer.global_step} and stopping; go on with ckpt_path=last")
        self.save(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        if self._agree(trainer):
            self._stop(trainer)
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
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._agree(trainer):
            self._stop(trainer)
        elif step % self.every_n_steps == 0 and step > self._saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step > max(self._saved_step, 0):
            self.save(trainer)
        if self.received is None:  # after the last step: what is left is not done
            self._agree(trainer)
        self._training = False
        if self._flag and self.received is None:  # while the ranks agreed
            self._leave(self._flag)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous, self._training = {}, False

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
