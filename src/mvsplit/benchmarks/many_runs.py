"""Many training runs, several at once, each in its own process.

A run's folder is `<folder>/<variant>/seed_<n>/`. Its `result.json` is written last: a run that has one is finished. Any
other is resumed if it saved a checkpoint with the same overrides, else deleted and restarted. A run that stops itself
while it trains, because its loss is not finite or the guard detected a collapse, is a result like any other.
"""

import importlib.metadata
import logging
import math
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from pydantic import PositiveInt

from mvsplit.benchmarks.common import override, write_json
from mvsplit.reports.study_cells import read_result
from mvsplit.training.checkpoint_format import newest
from mvsplit.training.settings import Paths
from mvsplit.utils.config import Seed
from mvsplit.utils.console import info, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import parse_json, read_small
from mvsplit.utils.processes import serve_parent
from mvsplit.utils.run_dirs import PROJECT_ROOT

Compose = Callable[[Sequence[str], int, dict[str, str]], dict[str, Any]]
"""The checked config of a run, from its overrides, seed and paths."""
Train = Callable[[dict[str, Any]], dict[str, float]]
"""Trains and returns the final metrics. Must be importable by name: it is called in other processes."""


@dataclass
class RunsConfig:
    """Top-level keys of every command that trains many runs."""

    task_name: str
    folder: str
    seeds: Annotated[list[Seed], MinLen(1)]
    processes: PositiveInt | None
    only: list[str] | None
    overrides: list[str]
    paths: Paths


@dataclass(frozen=True)
class VariantRun:
    """A variant with a seed."""

    variant: str
    overrides: tuple[str, ...]
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant}/seed_{self.seed}"

    def result(self) -> dict[str, Any] | None:
        """The contents of `result.json`; None if the run is not finished.

        Raises:
            UserError: if it is damaged.
        """
        return read_result(self.folder) if (self.folder / "result.json").exists() else None


def unfinished(runs: list[VariantRun]) -> list[VariantRun]:
    """The runs without a result.

    Raises:
        UserError: if a result was made with other settings.
    """
    left = []
    for run in runs:
        result = run.result()
        if result is None:
            left.append(run)
        elif result["overrides"] != list(run.overrides):
            differing = [o for o in run.overrides if o not in result["overrides"]]
            differing += [f"not {o}" for o in result["overrides"] if o not in run.overrides]
            raise UserError(
                f"{run.folder}: has the result of other settings (now {', '.join(differing) or 'in another order'});"
                " set folder=… for new runs, or delete that folder to repeat this one"
            )
    return left


def create(folder: Path) -> None:
    """Create the folder of many runs.

    Raises:
        UserError: if it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder = {folder}: cannot be created ({error.strerror})") from None


def paths_of(run: VariantRun, paths: dict[str, str]) -> dict[str, str]:
    """The group `paths` of a run's config."""
    return paths | {"output_dir": str(run.folder)}


def at_once(processes: int | None) -> int:
    """How many runs to train at once; None is one for each CPU core."""
    return processes or len(os.sched_getaffinity(0))


@contextmanager
def resumable(folder: Path, report: str = "report.py") -> Iterator[None]:
    """On Ctrl-C, report how to resume, and which script reports on what is there."""
    try:
        yield
    except KeyboardInterrupt:
        info(f"interrupted; repeat the command to resume. `python src/{report} {folder}` reports on finished runs")
        raise


def train_runs(
    ready: Callable[[], list[VariantRun]],
    config_of: Callable[[VariantRun], dict[str, Any]],
    processes: int,
    train: Train,
    advance: Callable[[], None],
) -> list[VariantRun]:
    """Train all runs that are ready, several at once, until none is left; an exception here kills them.

    Each thread waits for the process of one run. That process is forked from a server which has only imported modules:
    it starts at once, and no run can leave anything behind (memory, compiled code, handlers) for the next.

    Args:
        ready: the runs that can be trained now. Called again after each run, whose result may make others ready.
        config_of: the checked config of a run.
        processes: runs at once.
        train: see `Train`.
        advance: called after each run.

    Returns:
        The runs that failed.
    """
    # For the server, before it starts: one thread per small network; `train` is a module beside this package.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "mvsplit.benchmarks.many_runs", "mvsplit.utils.entry"])
    started: list[ForkServerProcess] = []

    def train_one(run: VariantRun, config: dict[str, Any]) -> int | None:
        if can_resume(run):
            config = config | {"ckpt_path": "last"}
        else:
            shutil.rmtree(run.folder, ignore_errors=True)
            run.folder.mkdir(parents=True)
            write_json(run.folder / "started.json", {"overrides": list(run.overrides)})
        process = context.Process(target=_work, args=(run, config, train))  # not a daemon: it may start processes
        process.start()
        started.append(process)
        process.join()
        return process.exitcode

    failed: list[VariantRun] = []
    running: dict[Future[int | None], VariantRun] = {}
    seen: set[VariantRun] = set()
    with ThreadPoolExecutor(processes) as pool:
        try:
            while True:
                for run in (run for run in ready() if run not in seen):
                    seen.add(run)
                    running[pool.submit(train_one, run, config_of(run))] = run
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, status = running.pop(future), future.result()
                    if run.result() is None:
                        failed.append(run)
                    _report_end(run, status)
                    advance()
        finally:  # without an exception, nothing is left to end
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):
                for process in started:
                    process.kill()
                time.sleep(0.01)
    if failed:
        show_table("failed; repeat the command to retry", {run.name: str(run.folder / "log.txt") for run in failed})
    return failed


def can_resume(run: VariantRun) -> bool:
    """Whether an unfinished run has a checkpoint, and was started with the same overrides."""
    started = run.folder / "started.json"
    try:
        same = started.is_file() and parse_json(read_small(started), str(started)) == {"overrides": list(run.overrides)}
        return bool(same) and newest(run.folder / "checkpoints", verify=True) is not None
    except UserError:  # damaged: there is nothing to resume from
        return False


def _report_end(run: VariantRun, status: int | None) -> None:
    result = run.result()
    if result is None:
        why = f"killed (exit status {status}); out of memory?"
        if status == 1:
            why = ["no output", *(run.folder / "log.txt").read_text(errors="replace").strip().splitlines()][-1]
        info(f"FAILED           {run.name}: {why}")
    elif result["status"] == "stopped":
        info(f"stopped          {run.name}: {result['why']}")
    else:
        info(f"finished         {run.name}: train/loss {result['metrics'].get('train/loss', math.nan):.3f}")


def has_trained(folder: Path) -> bool:
    """Whether a run has taken a step, or had one whose loss or gradient was not finite."""
    trace = folder / "stability" / "trace.csv"
    steps = trace.read_text().count("\n") - 1 if trace.is_file() else 0
    return steps > 0 or any(folder.glob("stability/nonfinite_step_*.json"))


def _work(run: VariantRun, config: dict[str, Any], train: Train) -> None:
    """One run, from its empty folder to its result."""
    serve_parent()
    multiprocessing.set_start_method(None, force=True)  # for data workers: as in a new process
    log = (run.folder / "log.txt").open("a", buffering=1)  # after what was there before an interruption
    os.dup2(log.fileno(), 1)  # for the output of compilers and libraries
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=log, force=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    # What Lightning starts as further ranks, if the run has several.
    places = [override(f"paths.{name}", config["paths"][name]) for name in ("data_dir", "log_dir")]
    places.append(override("hydra.run.dir", run.folder))
    places += ["ckpt_path=last"] * (config["ckpt_path"] == "last")
    sys.argv = [str(PROJECT_ROOT / "src" / "train.py"), *run.overrides, f"seed={run.seed}", *places]
    began = time.monotonic()
    result: dict[str, Any] = {"status": "finished", "why": "reached its last step", "metrics": {}}
    try:
        result["metrics"] = train(config)
    except UserError as error:
        info(f"stopped: {error}")
        if not has_trained(run.folder):  # what is missing or wrong on this machine says nothing about the method
            sys.exit(1)
        result |= {"status": "stopped", "why": " ".join(str(error).split())}
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    result |= {"seconds": round(time.monotonic() - began, 1), "versions": versions, "overrides": run.overrides}
    write_json(run.folder / "result.json", result)
