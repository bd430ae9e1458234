"""Stops a run on Ctrl-C or a signal, after saving, and requeues its SLURM job."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.utils.console import info
from mvsplit.utils.errors import AgreedError

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that stop a run. If ranks received different ones, the later in this list counts."""


class StopOnSignal(Callback):
    """Stops a run on SIGINT (Ctrl-C), SIGTERM or SIGUSR1 (SLURM's notice of a time limit or pre-emption) to any rank.

    The signal only sets a flag. At the end of the running step, or of the running validation, all ranks agree, save
    together (`CheckpointSaver`) and stop. Before the first step and in a test, when there is nothing to save, the run
    ends at once. (Lightning's own handlers act inside the signal: with several ranks they can deadlock, and Ctrl-C
    loses the steps since the last save.) A second Ctrl-C stops at once.

    Args:
        requeue: whether a stopped SLURM job is requeued: `auto` after SIGUSR1 (after a SIGTERM for pre-emption SLURM
            does so itself, and `scancel` means the end), `any` after SIGTERM too, or `never`.

    Raises:
        AgreedError: if there is no `CheckpointSaver`.
    """

    def __init__(self, requeue: Literal["auto", "any", "never"] = "auto") -> None:
        after: dict[str, set[int]] = {"any": {signal.SIGUSR1, signal.SIGTERM}, "auto": {signal.SIGUSR1}}
        self.requeue_after = after.get(requeue, set())
        self.received: signal.Signals | None = None
        """The signal that stopped the run, on every rank, if one did."""
        self._flag = 0
        self._process = 0
        self._training = False
        self._previous: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        savers = [callback for callback in trainer.callbacks if isinstance(callback, CheckpointSaver)]
        if not savers:
            raise AgreedError(
                "callbacks.stop_signals: callbacks.checkpoint is missing, so a stopped run could not save; use"
                " callbacks.stop_signals=null"
            )
        self._saver = savers[0]
        self.received, self._flag, self._training = None, 0, False
        self._process = os.getpid()
        # Lightning's handlers would be registered later and would call ours after their own work.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._training = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked process, such as a data worker, inherits the handler but must not stop the run
        if not self._training:
            self._leave(self.received or number)
        if self._flag == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._flag = self._flag or number  # the first is the reason; SLURM's SIGTERM follows its notice

    def _leave(self, number: int) -> NoReturn:
        self.requeue(number)
        sys.exit(128 + number)

    def requeue(self, number: int) -> None:
        """Requeue the SLURM job, on rank 0, if this signal calls for it."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None or number not in self.requeue_after or rank_zero_only.rank != 0:
            return
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            failure = done.stderr.strip() or f"status {done.returncode}" if done.returncode else None
        except OSError as error:
            failure = str(error)
        info(f"job {job} is requeued" if failure is None else f"job {job} could not be requeued: {failure}")

    def _agree(self, trainer: Trainer) -> bool:
        """Whether any rank received a signal; then all know which one."""
        place = SIGNALS.index(signal.Signals(self._flag)) + 1 if self._flag else 0
        places = torch.tensor(place, device=trainer.strategy.root_device)
        place = int(trainer.strategy.reduce(places, reduce_op="max"))
        self.received = SIGNALS[place - 1] if place else None
        return place > 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate() and self._agree(trainer):
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._agree(trainer):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        assert self.received is not None
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # else Lightning would validate before it stops
        self._saver.requested = True  # it comes later: Lightning puts `Checkpoint` callbacks last
        if trainer.is_global_zero:
            step = trainer.global_step
            info(f"{self.received.name}: saving step {step} and stopping; resume with ckpt_path=last")

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.received is None:  # during the last step or save: the test that follows is left out
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
