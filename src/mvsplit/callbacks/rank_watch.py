"""Ends a run of several processes when one of them is lost or fails, with one message that names it."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script
from pydantic import PositiveFloat
from torch.distributed import DistError, is_torchelastic_launched

from mvsplit.utils.entry import exit_status
from mvsplit.utils.errors import AgreedError, UserError
from mvsplit.utils.heartbeat import GONE, GRACE_S, LOST, UNWIND_S, Heartbeat, print_error

PARENT = "MVSPLIT_RANK_0_PID"
"""Environment variable that gives the processes that Lightning starts their parent's pid."""
BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "NCCL", "gloo")
"""Parts of the messages of a collective operation's errors when another rank is missing."""
PR_SET_PDEATHSIG = 1
NCCL_PATIENCE = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
"""Environment variable, read with the process group. After an error of NCCL, PyTorch's watchdog sleeps four times as
long before it aborts the process (`ProcessGroupNCCL::Watchdog::runLoop`; 15,000 by default, so a minute)."""
OBSERVER = "_launch_process_observer"
"""Lightning's function that is called with the processes it has just started."""


class RankWatch(Callback):
    """Ends all ranks of a run when one of them ends.

    - A rank that is killed, stopped or cut off is named in one line (rank, host, pid, last known step). The others exit
      with 75 within `timeout_s`, even if they hang in a collective operation.
    - A rank that fails reports its own error. The others end after it with its exit status, without tracebacks of the
      collective operations that broke.
    - No process outlives its launcher: Lightning's rank 0, or torchrun's agent.

    It is a context manager, entered around all work of the trainer (`mvsplit.training.session.run`).

    Args:
        timeout_s: seconds of silence after which a rank is lost. Beats come from a thread of each rank, so that long
            work in its main thread (saving, validation, compiling) is not silence.
    """

    def __init__(self, timeout_s: PositiveFloat = 45.0) -> None:
        self.timeout_s = timeout_s
        self.advice: str | None = None
        """See `Heartbeat`."""
        self._heartbeat: Heartbeat | None = None
        self._trainer: Trainer | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._failed_once = False
        self._set_patience = False

    def __enter__(self) -> None:
        self._set_patience = NCCL_PATIENCE not in os.environ
        if self._set_patience:
            # The longest wait of `_fail` and the heartbeat. An earlier abort would not name the lost rank.
            patience_s = 2 * self.timeout_s + GRACE_S + UNWIND_S + 20
            os.environ[NCCL_PATIENCE] = str(int(min(250 * patience_s, 2**29 - 1)))  # four times it must fit into an int
        parent = os.environ.get(PARENT)
        if parent is not None or is_torchelastic_launched():
            end_with_parent(int(parent) if parent is not None else None)
        else:
            os.environ[PARENT] = str(os.getpid())
        # Lightning's own kills this process without a message when a process that it started fails.
        self._observer = getattr(subprocess_script, OBSERVER)
        setattr(subprocess_script, OBSERVER, self._observe)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        setattr(subprocess_script, OBSERVER, self._observer)
        if self._set_patience:
            os.environ.pop(NCCL_PATIENCE, None)
        if os.environ.get(PARENT) == str(os.getpid()):
            del os.environ[PARENT]
        if error is not None:
            self._fail(error)
        elif self._heartbeat is not None:
            self._heartbeat.leave()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self._heartbeat is not None:
            return
        self._trainer = trainer
        # If rank 0 dies with its machine, the first rank of the next one reports it.
        reports = trainer.global_rank == 1 or (trainer.node_rank == 1 and trainer.local_rank == 0)
        self._heartbeat = Heartbeat(trainer.global_rank, trainer.world_size, self.timeout_s, self._end, reports)
        self._heartbeat.advice = self.advice

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._heartbeat is not None:
            self._heartbeat.step = trainer.global_step

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._fail(exception)

    def _fail(self, error: BaseException) -> None:
        """Announce this rank's failure to the others; does not return if another rank failed first."""
        heartbeat = self._heartbeat
        if heartbeat is None or self._failed_once:
            return
        self._failed_once = True
        if (isinstance(error, AgreedError) and heartbeat.rank != 0) or is_broken_collective(error):
            patience = 2 * self.timeout_s  # for another rank's report
        else:
            # One rank's error can appear as any error in another's collectives; its death, as SIGTERM in its children.
            patience = 0.0 if isinstance(error, UserError | KeyboardInterrupt) else 1.0
        if heartbeat.decided.wait(patience) or not heartbeat.fail(exit_status(error)):
            heartbeat.join()

    def _end(self, status: int) -> None:
        """End this process from a thread, whatever its main thread is doing."""
        finishing = threading.Thread(target=self._finish_logs, daemon=True)
        finishing.start()
        finishing.join(2)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and any(child.poll() is None for child in self._children):
            time.sleep(0.05)
        for child in self._children:
            child.kill()  # a stopped one cannot end by itself
        os._exit(status)

    def _finish_logs(self) -> None:
        for logger in self._trainer.loggers if self._trainer is not None else ():
            logger.finalize("failed")  # writes what is in its queue
        sys.stdout.flush()

    def _observe(self, children: list[subprocess.Popen[bytes]]) -> None:
        self._children = children
        threading.Thread(target=self._await_children, daemon=True).start()

    def _await_children(self) -> None:
        """On a thread: notice the end of a process that this one started, sooner than its silence would show it."""
        while all(child.poll() in (None, 0) for child in self._children):
            time.sleep(0.2)
        local, child = next((n, c) for n, c in enumerate(self._children, start=1) if c.poll())
        heartbeat, status = self._heartbeat, child.returncode
        if heartbeat is None:
            print_error(f"rank {local} (pid {child.pid}) ended before training began; ending this run")
            self._end(status if status > 0 else LOST)
        elif heartbeat.decided.wait(1):  # it had failed, and reported that
            heartbeat.gone.set()
        elif self._trainer is not None and self._trainer.is_global_zero:
            heartbeat.lose(local, GONE)


def is_broken_collective(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank was missing."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in BROKEN)
    )


def end_with_parent(parent: int | None, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal when its parent dies (Linux).

    Args:
        parent: its pid, if known: it may have died already.
        number: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(LOST)
