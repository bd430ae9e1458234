"""A case of `src/bench.py gpu`, and what it can use: training runs and other processes, and runs of other cases.

Only the processes use a GPU: this one creates no CUDA context.
"""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mvsplit.benchmarks.common import override
from mvsplit.callbacks.rank_watch import end_with_parent
from mvsplit.training.checkpoint_format import COMPLETE
from mvsplit.utils.run_dirs import PROJECT_ROOT

PACKAGE = "mvsplit.benchmarks.gpu"
LOSS_TOLERANCE = 0.01
LEFT_AFTER_S, KILLED_WITHIN_S = 60.0, 30.0
"""How long other processes of a command may outlive the first one; how long killing may take."""


class CaseError(Exception):
    """The case failed; the message gives the reason."""


class SkipError(Exception):
    """The case cannot run here; the message gives the reason."""


class DeadlineError(Exception):
    """A process exceeded its time limit."""


@dataclass(frozen=True)
class Outcome:
    """Figures of a case and the conditions that must hold. A case without checks is a measurement, which passes."""

    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainedRun:
    """The folder of a training run."""

    folder: Path

    def saved_step(self) -> int:
        """Optimiser steps of the newest complete checkpoint; 0 without one."""
        names = [mark.parent.stem for mark in self.folder.glob(f"checkpoints/step-*.ckpt/{COMPLETE}")]
        return max((int(name.rpartition("-")[2]) for name in names), default=0)

    def metric(self, name: str) -> float:
        """Its last value, resumes included."""
        values: list[str] = []
        for file in sorted(self.folder.glob("csv/version_*/metrics.csv"), key=os.path.getmtime):
            values += [row[name] for row in csv.DictReader(file.open()) if row.get(name)]
        if not values:
            raise CaseError(f"{self.folder.name}: no {name} was logged")
        return float(values[-1])

    def test_loss(self) -> float:
        return self.metric("test/loss")

    def checkpoint(self, step: int | None = None) -> Path:
        """The run's last checkpoint, or the permanent one of this step."""
        return self.folder / "checkpoints" / ("last.ckpt" if step is None else f"step-{step:08d}.ckpt")


class Command(TrainedRun):
    """A Python command in a session of its own, through which all of its processes can be found.

    It works in its folder and logs to `<name>.log` there. It is killed at the deadline, on the clock `time.monotonic`.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, deadline: float, name: str, **env: str) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.deadline, self.log = deadline, folder / f"{name}.log"
        path = os.pathsep.join([str(PROJECT_ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": path} | env,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=partial(end_with_parent, None, signal.SIGKILL),
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        """The last line of its output, or of its errors."""
        lines = [line for line in self.text.splitlines() if line.strip()] or ["no output"]
        return next((line for line in lines[::-1] if line.startswith("error: ")), lines[-1])

    def family(self) -> dict[int, int]:
        """The running processes of its session, with their parents."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # has ended
                state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state not in "ZX":
                    found[int(stat.parent.name)] = int(parent)
        return found

    def workers(self) -> list[int]:
        """The data loader's workers: forked from the first process, so they have the same command line."""
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.family()}
        first = self.process.pid
        return [pid for pid, parent in self.family().items() if parent == first and lines.get(pid) == lines.get(first)]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition."""
        while not condition():
            if self.process.poll() is not None:
                raise CaseError(f"ended with {self.process.returncode} before {what}: {self.last_line()}")
            self._pause(0.005)  # steps of small networks are short

    def wait(self) -> int:
        """Wait for all of its processes and return the exit status of the first."""
        while self.process.poll() is None:
            self._pause(0.05)
        give_up = time.monotonic() + LEFT_AFTER_S
        while left := self.family():
            if time.monotonic() > give_up:
                raise CaseError(f"{self.log.stem}: {len(left)} processes outlived the first one")
            self._pause(0.05)
        return self.process.returncode

    def succeed(self) -> "Command":
        """Wait until all of its processes have ended successfully."""
        if status := self.wait():
            raise CaseError(f"{self.log.stem} ended with {status}: {self.last_line()}")
        return self

    def _pause(self, seconds: float) -> None:
        if time.monotonic() > self.deadline:
            self.kill()
            raise DeadlineError(self.last_line())
        time.sleep(seconds)

    def kill(self) -> None:
        """Kill its remaining processes; do not wait long for one that hangs in a driver."""
        give_up = time.monotonic() + KILLED_WITHIN_S
        while (family := self.family()) and time.monotonic() < give_up:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)


@dataclass
class Bench:
    """The environment of all cases: checked config, machine (see `on_device.machine`), folder of all results."""

    config: dict[str, Any]
    machine: dict[str, Any]
    folder: Path
    deadline: float = math.inf
    """When the current case ends, on the clock `time.monotonic`."""
    commands: list[Command] = field(default_factory=list)
    """Commands that the current case has started."""
    runs: dict[str, TrainedRun] = field(default_factory=dict)
    """Runs of cases that have passed, or that others need, by path."""

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`."""
        return self.machine["kind"]

    def of(self, section: str) -> Any:
        """A section's config for this kind of device."""
        return self.config[section][self.kind]

    def start(self, arguments: Sequence[str], folder: Path, name: str, **env: str) -> Command:
        """Start a Python command that ends with this case at the latest."""
        # The networks for CPUs are small: more threads would only compete.
        threads = {} if self.kind == "cuda" or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        self.commands.append(Command(arguments, folder, self.deadline, name, **(threads | env)))
        return self.commands[-1]

    def child(self, place: Path, function: str, **arguments: Any) -> dict[str, Any]:
        """Call a function of `on_device.py` in its own process."""
        out = place / f"{function}.json"
        self.start(["-m", f"{PACKAGE}.on_device", function, json.dumps(arguments), str(out)], place, function).succeed()
        return json.loads(out.read_text())

    def train(
        self, folder: Path, overrides: Sequence[str], name: str = "train", probed: bool = False, **env: str
    ) -> Command:
        """Start `src/train.py` with this output folder. probed: allow the callbacks of `probes.py`."""
        script = ["-m", f"{PACKAGE}.train_run"] if probed else [str(PROJECT_ROOT / "src" / "train.py")]
        own = [f"seed={self.config['seed']}", "logger=many_loggers", *self._folders(folder)]
        return self.start([*script, *self.of("training"), *overrides, *own], folder, name, **env)

    def script(self, script: str, folder: Path, overrides: Sequence[str]) -> None:
        """Run another script with this output folder."""
        line = [str(PROJECT_ROOT / "src" / script), *overrides, *self._folders(folder)]
        self.start(line, folder, Path(script).stem).succeed()

    def _folders(self, output: Path) -> list[str]:
        folders = {"paths.data_dir": self.config["paths"]["data_dir"], "paths.log_dir": output, "hydra.run.dir": output}
        return [override(key, folder) for key, folder in folders.items()]

    def run_of(self, path: str, overrides: Sequence[str]) -> TrainedRun:
        """The run of a case that has passed; of any other case, a run made for this purpose, once per process."""
        if path not in self.runs:
            make_empty(self.folder / "made" / path)
            self.runs[path] = self.train(self.folder / "made" / path, overrides).succeed()
        return self.runs[path]


Run = Callable[[Bench, Path], Outcome]
"""A case; it gets an empty folder of its own."""


def make_empty(place: Path) -> None:
    """Create a folder of ours, without the files of an earlier attempt. place: an absolute path."""
    if place.resolve() != place:
        raise CaseError(f"{place} is a link, or inside one")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)


def apart(a: float, b: float) -> float:
    """The distance of a from b as a share of b; infinite if either is not finite."""
    return abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) and b else math.inf


def compare(loss: float, expected: float) -> Outcome:
    """Whether a loss agrees with another one."""
    distance = apart(loss, expected)
    return Outcome({"loss_agrees": distance <= LOSS_TOLERANCE}, {"loss": loss, "apart": distance})
