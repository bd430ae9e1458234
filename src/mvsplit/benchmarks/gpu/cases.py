"""What a case of `src/bench.py gpu` is, and what it can ask for."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvsplit.benchmarks.gpu.commands import CaseError, Command, Run
from mvsplit.utils.runs import PROJECT_ROOT

PACKAGE = "mvsplit.benchmarks.gpu"


class SkipError(Exception):
    """The case cannot be tried here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """Figures of a case, and what had to hold. A case without checks is a measurement, which passes."""

    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def make_empty(place: Path) -> None:
    """Make a folder of ours, without what an earlier try left in it. place: an absolute path.

    Raises:
        CaseError: if a link leads elsewhere.
    """
    if place.resolve() != place:
        raise CaseError(f"{place} is a link, or in one")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)


@dataclass
class Bench:
    """What cases know: the checked config, the machine (see `child.machine`), the folder of all results."""

    config: dict[str, Any]
    machine: dict[str, Any]
    folder: Path
    deadline: float = math.inf
    """On the clock `time.monotonic`; of the case that is running."""
    commands: list[Command] = field(default_factory=list)
    """That this case has started."""
    done: set[str] = field(default_factory=set)
    """Paths of the cases that have passed, with the present key."""
    made: dict[str, Run] = field(default_factory=dict)
    """Runs that cases needed of others which have not passed; by name, made once in this process."""

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`."""
        return self.machine["kind"]

    def of(self, section: str) -> Any:
        """What the config says about a section on this kind of device."""
        return self.config[section][self.kind]

    def child(self, place: Path, function: str, **arguments: Any) -> dict[str, Any]:
        """Call a function of `child.py` in a process of its own.

        Raises:
            CaseError: with the last line that it said.
        """
        out = place / f"{function}.json"
        job = self.start(["-m", f"{PACKAGE}.child", function, json.dumps(arguments), str(out)], place, function)
        if job.wait():
            raise CaseError(f"{function}: {job.last_line()}")
        return json.loads(out.read_text())

    def train(
        self, folder: Path, overrides: Sequence[str], name: str = "train", changed: bool = False, **env: str
    ) -> Command:
        """Start `src/train.py` with this output folder; its log is `<name>.log` there.

        Args:
            changed: with the callbacks of `callbacks.py` (see `run.py`).
        """
        script = ["-m", f"{PACKAGE}.run"] if changed else [str(PROJECT_ROOT / "src" / "train.py")]
        paths = [f"paths.data_dir={self.config['paths']['data_dir']}", f"paths.log_dir={folder}"]
        own = [f"seed={self.config['seed']}", "logger=many_loggers", f"hydra.run.dir={folder}", *paths]
        return self.start([*script, *self.of("training"), *overrides, *own], folder, name, **env)

    def script(self, script: str, folder: Path, overrides: Sequence[str]) -> Command:
        """Start another of the scripts with this output folder."""
        own = [f"paths.log_dir={folder}", f"hydra.run.dir={folder}"]
        return self.start([str(PROJECT_ROOT / "src" / script), *overrides, *own], folder, Path(script).stem)

    def start(self, arguments: Sequence[str], folder: Path, name: str, **env: str) -> Command:
        """A Python command that ends with this case at the latest."""
        # On CPUs networks are small: more threads would only wait for one another.
        threads = {} if self.kind == "cuda" or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        self.commands.append(Command(arguments, folder, self.deadline, name, **(threads | env)))
        return self.commands[-1]

    def run_of(self, section: str, name: str, overrides: Sequence[str]) -> Run:
        """The run of a case that has passed; if it has not, or was not asked for, one made for the others.

        Raises:
            CaseError: if that fails.
        """
        path = f"{section}/{name}"
        if path in self.done:
            return Run(self.folder / section / name)
        if path not in self.made:
            place = self.folder / "made" / path
            make_empty(place)
            self.made[path] = self.train(place, overrides, f"{section}_{place.name}").succeed()
        return self.made[path]


@dataclass(frozen=True)
class Case:
    """One thing to try. `run(bench, place)` gets an empty folder of its own."""

    section: str
    name: str
    run: Callable[[Bench, Path], Outcome]
    needs_gpu: bool = False

    @property
    def path(self) -> str:
        return f"{self.section}/{self.name}"
