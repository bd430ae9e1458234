"""Processes that cases start: watched, limited in time, ended as a whole; and what a training run leaves in its folder.

Nothing here makes a CUDA context: whatever touches a GPU is a process of its own.
"""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from mvsplit.callbacks.rank_watch import end_with_parent
from mvsplit.training.folder import COMPLETE, Saved
from mvsplit.utils.runs import PROJECT_ROOT

LEFT_AFTER_S = 60.0
"""How long the other processes of a run may take to end once its first one has."""
KILLED_WITHIN_S = 30.0


class CaseError(Exception):
    """The case failed before it had figures; the message says why, in one line."""


class DeadlineError(Exception):
    """A process took longer than it may."""


class Run:
    """What a training run has left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def saved_step(self) -> int:
        """Optimiser steps of the newest complete checkpoint; 0 without one."""
        names = [mark.parent.name for mark in self.folder.glob(f"checkpoints/last-*.ckpt/{COMPLETE}")]
        return max((int(name.removesuffix(".ckpt").rpartition("-")[2]) for name in names), default=0)

    def metrics(self) -> dict[str, float]:
        """The last value of each metric, resumes included."""
        values: dict[str, float] = {}
        versions = self.folder.glob("csv/version_*/metrics.csv")
        for file in sorted(versions, key=lambda path: int(path.parent.name.removeprefix("version_"))):
            for row in csv.DictReader(file.open()):
                values |= {name: float(value) for name, value in row.items() if value and name}
        return values

    def test_loss(self) -> float:
        """Of the final test.

        Raises:
            CaseError: if there was none.
        """
        loss = self.metrics().get("test/loss")
        if loss is None:
            raise CaseError(f"{self.folder.name}: no test/loss was told")
        return loss

    def checkpoint(self, step: int | None = None) -> Path:
        """The run's last checkpoint, or the one kept for good at this step."""
        name = "last.ckpt" if step is None else f"step-{step:08d}.ckpt"
        return self.folder / "checkpoints" / name


class Command(Run):
    """A Python command that runs in a session of its own, so that all of its processes are known.

    Args:
        arguments: of the Python interpreter. folder: the working directory, and where `<name>.log` goes.
        deadline: on the clock `time.monotonic`. env: more variables.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, deadline: float, name: str, **env: str) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.deadline, self.log = deadline, folder / f"{name}.log"
        path = os.pathsep.join([str(PROJECT_ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        variables = os.environ | {"PYTHONPATH": path} | env
        self.began = time.monotonic()
        self.left: list[int] = []
        """Processes that outlived the first one by too long, and were killed."""
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=variables, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=partial(end_with_parent, None, signal.SIGKILL),
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_line(self) -> str:
        lines = [line for line in self.text.splitlines() if line.strip()] or ["no output"]
        return next((line for line in lines[::-1] if line.startswith("error: ")), lines[-1])

    def family(self) -> dict[int, int]:
        """The living processes of its session and their parents."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue  # has ended meanwhile
            if int(session) == self.process.pid and state not in "ZX":
                found[int(stat.parent.name)] = int(parent)
        return found

    def readers(self) -> list[int]:
        """The reading processes of the first one: forked from it, so the command line is its own."""

        def command(pid: int) -> bytes:
            try:
                return Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return b""

        first = self.process.pid
        return [p for p, parent in self.family().items() if parent == first and command(p) == command(first)]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something to happen.

        Raises:
            CaseError: if the command ends before. DeadlineError: at the case's deadline.
        """
        while not condition():
            if self.ended:
                raise CaseError(f"ended with {self.process.returncode} before {what}: {self.last_line()}")
            self._check_time()
            time.sleep(0.005)  # steps of small networks are short

    def wait(self) -> int:
        """The exit status, once all of its processes have ended.

        Raises:
            DeadlineError: at the case's deadline; all of its processes are killed then.
        """
        ended = math.inf
        while (status := self.process.poll()) is None or self.family():
            if status is not None:
                ended = min(ended, time.monotonic())
            if time.monotonic() > ended + LEFT_AFTER_S:
                self.left = list(self.family())
                self.kill()
                break
            self._check_time()
            time.sleep(0.05)
        assert self.process.returncode is not None
        return self.process.returncode

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            self.kill()
            raise DeadlineError(self.last_line())

    def kill(self) -> None:
        """End all of its processes at once; one that hangs in a driver may stay, and must not keep us."""
        give_up = time.monotonic() + KILLED_WITHIN_S
        while (family := self.family()) and time.monotonic() < give_up:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)

    def end(self) -> None:
        """Kill what is left of it, if anything is."""
        if not self.ended or self.family():
            self.kill()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def succeed(self) -> "Command":
        """Wait for a good end.

        Raises:
            CaseError: with its last line, if it ends otherwise.
        """
        status = self.wait()
        if status:
            raise CaseError(f"{self.log.stem} ended with {status}: {self.last_line()}")
        if self.left:
            raise CaseError(f"{self.log.stem}: {len(self.left)} processes outlived the first one")
        return self

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def apart(a: float, b: float) -> float:
    """How far a is from b, as a share of b; infinite if either is no number."""
    return abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) and b else math.inf


def states_apart(a: Saved, b: Saved) -> dict[str, float]:
    """How far two checkpoints are apart: weights, the optimiser's tensors and averages, as shares of their norms."""
    result = {}
    for kind in ("weights", "optimizer", "ema"):
        ours, theirs = a.tensors(kind), b.tensors(kind)
        if set(ours) != set(theirs):
            raise CaseError(f"the checkpoints hold different {kind}")
        pairs = [(ours.whole(name).double(), theirs.whole(name).double()) for name in ours]
        norm = math.sqrt(sum(float(y.square().sum()) for _, y in pairs))
        distance = math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs))
        result[kind] = distance / norm if norm else distance
    return result
