"""Ends a run of several processes when one of them is lost or fails, with one message that names it."""

import ctypes
import os
import signal
import socket
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
from mvsplit.utils.rank_lines import GRACE_S, LOST, UNWIND_S, Hub, Line, Member, Spoke, complain

PARENT = "MVSPLIT_RANK_0_PID"
"""Environment variable by which processes that Lightning starts know who started them."""
BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "NCCL", "gloo")
"""What the error of a collective operation says when another rank is missing."""
PR_SET_PDEATHSIG = 1
NCCL_PATIENCE = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
"""Environment variable: four times as long PyTorch's watchdog sleeps, once NCCL has an error, before it aborts the
process (`ProcessGroupNCCL::Watchdog::runLoop`; 15,000, so a minute, if it is not set). Read with the process group."""
OBSERVER = "_launch_process_observer"
"""Lightning's function that is called with the processes it has just started."""


class RankWatch(Callback):
    """With more than one rank, sees to it that all of them end when one does.

    - A rank that was killed, is stopped or cut off is named by one line (rank, host, pid, step last seen), and every
      other process exits with 75 within `timeout_s`, though it may hang in a collective operation.
    - A rank that fails tells its error itself; the others end after it, with its exit status and without tracebacks of
      the collectives that this broke.
    - Nobody outlives the process that started him: Lightning's first rank, or torchrun's agent.

    It is a context, entered around everything the trainer does (`mvsplit.training.run.watched`).

    Args:
        timeout_s: seconds of silence after which a rank is lost. Beats come from a thread of each rank, so that long
            work in its main thread (saving, validation, compiling) is not silence.
    """

    def __init__(self, timeout_s: PositiveFloat = 45.0) -> None:
        self.timeout_s = timeout_s
        self._line: Line | None = None
        self._trainer: Trainer | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._failed_once = False
        self._set_patience = False

    def __enter__(self) -> None:
        self._set_patience = NCCL_PATIENCE not in os.environ
        if self._set_patience:
            # What `_fail` and the line wait at most; an abort before would be neither status 75 nor name the lost rank.
            patience_s = 2 * self.timeout_s + GRACE_S + UNWIND_S + 20
            os.environ[NCCL_PATIENCE] = str(int(min(250 * patience_s, 2**29 - 1)))  # × 4 it must fit into an int
        parent = os.environ.get(PARENT)
        if parent is not None or is_torchelastic_launched():
            end_with_parent(int(parent) if parent is not None else None)
        else:
            os.environ[PARENT] = str(os.getpid())
        # Lightning's own kills this process without a word, when a process that it started fails.
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
        elif self._line is not None:
            self._line.leave()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self._line is not None:
            return
        self._trainer = trainer
        me = Member(trainer.global_rank, socket.gethostname(), os.getpid())
        address = trainer.strategy.cluster_environment.main_address
        if trainer.is_global_zero:
            local = trainer.num_nodes == 1
            hub = Hub(me, self.timeout_s, self._end, trainer.world_size, local)
            self._line = hub
            trainer.strategy.broadcast(("127.0.0.1" if local else address, hub.port, hub.token, me.host, me.pid))
        else:
            told: Any = trainer.strategy.broadcast(None)
            host, port, token, name, pid = told
            # Rank 0 may have died with its machine: then the next machine's first rank tells.
            speaks = trainer.global_rank == 1 or (trainer.node_rank == 1 and trainer.local_rank == 0)
            self._line = Spoke(me, self.timeout_s, self._end, Member(0, name, pid), (host, port), token, speaks)
        self._line.start()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._line is not None:
            self._line.me.step = trainer.global_step

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._fail(exception)

    def _fail(self, error: BaseException) -> None:
        """Tell the others; does not return if it is another rank that failed first."""
        line = self._line
        if line is None or self._failed_once:
            return
        self._failed_once = True
        if (isinstance(error, AgreedError) and line.me.rank != 0) or is_broken_collective(error):
            patience = 2 * self.timeout_s  # somebody else's to tell
        else:
            # One rank's error can look like anything in another's collectives.
            patience = 0.0 if isinstance(error, UserError | KeyboardInterrupt | SystemExit) else 1.0
        if line.decided.wait(patience) or not line.fail(exit_status(error)):
            line.join()

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
            logger.finalize("failed")  # what is in its queue would be lost
        sys.stdout.flush()

    def _observe(self, children: list[subprocess.Popen[bytes]]) -> None:
        self._children = children
        threading.Thread(target=self._await_children, daemon=True).start()

    def _await_children(self) -> None:
        """Until the ranks are connected, a process that ends is seen by the one that started it."""
        while self._line is None:
            for rank, child in enumerate(self._children, start=1):
                if status := child.poll():
                    complain(f"rank {rank} (pid {child.pid}) ended before training began; this run ends")
                    self._end(status if status > 0 else LOST)
            time.sleep(0.2)


def is_broken_collective(error: BaseException) -> bool:
    """Whether the error says that a collective operation missed another rank."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in BROKEN)
    )


def end_with_parent(parent: int | None, number: signal.Signals = signal.SIGTERM) -> None:
    """Have this process sent a signal when the one that started it dies (Linux).

    Args:
        parent: its pid, if it is known: it may have died already. number: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(LOST)
