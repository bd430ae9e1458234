"""Many small training runs that answer questions, several at once, each in a process of its own.

`<folder>/<variant>/seed_<n>/` is a run's folder. Its `result.json` is written last: what has one is done, what has
none is removed and started anew. A run that stops itself, because its loss is no longer finite or a guard saw it
collapse, is a result like any other.
"""

import fnmatch
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import torch
from annotated_types import MinLen
from pydantic import PositiveInt

from mvsplit.training.run import Paths, locked
from mvsplit.utils.config import build
from mvsplit.utils.console import progress, say, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.processes import serve_parent
from mvsplit.utils.rng import Seed
from mvsplit.utils.runs import PROJECT_ROOT

Questions = dict[str, dict[str, list[str]]]
"""Question -> variant -> overrides."""
Compose = Callable[[list[str], int, dict[str, str]], dict[str, Any]]
"""The checked config of a run from its overrides, seed and paths."""
Train = Callable[[dict[str, Any]], dict[str, float]]
"""Train and return the final metrics; importable by name, it is called in other processes."""


@dataclass
class Config:
    """Top-level keys of `ablate.yaml`."""

    task_name: str
    folder: str
    seeds: Annotated[list[Seed], MinLen(1)]
    processes: PositiveInt | None
    only: list[str] | None
    overrides: list[str]
    questions: Questions
    paths: Paths


@dataclass(frozen=True)
class Job:
    """One run: a variant with a seed."""

    variant: str
    overrides: list[str]
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant}/seed_{self.seed}"

    def record(self) -> dict[str, Any] | None:
        """What the run came to, if it is done."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except FileNotFoundError:
            return None


# ------------------------------------------------------------ what to run


def variants(questions: Questions, only: list[str] | None = None) -> dict[str, list[str]]:
    """Overrides of each variant, or of those asked for, in the order in which they are to run.

    Raises:
        UserError: for a name that is no folder's, or stands for two things, or if nothing is asked for.
    """
    chosen: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    for question, members in questions.items():
        for name, overrides in members.items():
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise UserError(f"questions.{question}.{name}: a folder's name is needed, of letters, digits, _ . + -")
            if known.setdefault(name, overrides) != overrides:
                raise UserError(f"questions.{question}.{name}: has other overrides under another question")
            if only is None or any(fnmatch.fnmatchcase(word, p) for p in only for word in (question, name)):
                chosen[name] = overrides
    if not chosen:
        raise UserError(f"only = {only}: no such question or variant; allowed are {', '.join([*questions, *known])}")
    return chosen


def jobs(config: dict[str, Any]) -> list[Job]:
    """All runs: each variant with the first seed, then with the second, …"""
    folder, common = Path(config["folder"]).resolve(), config["overrides"]
    return [
        Job(name, [*common, *overrides], seed, folder / name / f"seed_{seed}")
        for seed in dict.fromkeys(config["seeds"])
        for name, overrides in variants(config["questions"], config["only"]).items()
    ]


def unfinished(all_jobs: list[Job]) -> list[Job]:
    """Those without a result.

    Raises:
        UserError: if there is the result of other settings.
    """
    left = []
    for job in all_jobs:
        record = job.record()
        if record is None:
            left.append(job)
        elif record["overrides"] != job.overrides:
            differing = [o for o in job.overrides if o not in record["overrides"]]
            differing += [f"not {o}" for o in record["overrides"] if o not in job.overrides]
            raise UserError(
                f"{job.folder}: holds the result of other settings (now {', '.join(differing) or 'in another order'});"
                " give folder=… for a new ablation, or remove that folder to run it anew"
            )
    return left


def describe(questions: Questions) -> dict[str, Any]:
    """What stands in `ablation.json`, for the report: all variants, whichever were asked for this time."""
    rows = [(question, name, overrides) for question, all_ in questions.items() for name, overrides in all_.items()]
    return {"variants": [{"name": name, "question": question, "overrides": o} for question, name, o in rows]}


# --------------------------------------------------------------- running


def run_all(config: dict[str, Any], compose: Compose, train: Train) -> list[Job]:
    """Train whatever has no result yet.

    Returns:
        The runs that failed.

    Raises:
        UserError: before anything is trained, for any run's config, or results of other settings; or if another
            process is at work in the folder.
    """
    folder = Path(config["folder"]).resolve()
    all_jobs = jobs(config)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), _terminable():
        left = unfinished(all_jobs)
        configs = [compose(job.overrides, job.seed, config["paths"] | {"output_dir": str(job.folder)}) for job in left]
        _write_json(folder / "ablation.json", describe(config["questions"]))
        processes = max(1, min(config["processes"] or len(os.sched_getaffinity(0)), len(left)))
        say(f"ablation         {len(all_jobs)} runs, {len(all_jobs) - len(left)} of them done; {processes} at once")
        say(f"folder           {folder}")
        if not left:
            return []
        build(configs[0]["data"]).prepare_data()  # once, and what is wrong with the data is no run's result
        try:
            failed = _run(list(zip(left, configs, strict=True)), len(all_jobs), processes, train)
        except (KeyboardInterrupt, SystemExit):
            say(f"interrupted; the same command goes on, `python src/report.py {folder}` reports on what is there")
            raise
    if failed:
        rows = {job.name: f"{_last_line(job)} (see {job.folder / 'log.txt'})" for job in failed}
        show_table("failed; the same command tries them again", rows)
    return failed


def _run(waiting: list[tuple[Job, dict[str, Any]]], total: int, processes: int, train: Train) -> list[Job]:
    """Run them, so many at once; whatever ends this ends all of them.

    Each run's process is forked by a server that has imported what it needs and done nothing else: it starts at once,
    and no run can leave anything behind (memory, compiled code, handlers) for the next.
    """
    # Before the server starts: a small network on one thread each; `train` is found beside this package.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "mvsplit.benchmarks.ablation", "mvsplit.utils.entry"])
    waiting = waiting[::-1]
    busy: dict[int, tuple[ForkServerProcess, Job]] = {}
    failed = []
    try:
        with progress("runs", total, done=total - len(waiting)) as advance:
            while waiting or busy:
                while waiting and len(busy) < processes:
                    job, config = waiting.pop()
                    shutil.rmtree(job.folder, ignore_errors=True)
                    job.folder.mkdir(parents=True)
                    process = context.Process(target=_work, args=(job, config, train), daemon=True)
                    process.start()
                    busy[process.sentinel] = process, job
                for sentinel in wait(list(busy)):
                    process, job = busy.pop(cast(int, sentinel))
                    process.join()
                    if job.record() is None:
                        failed.append(job)
                    _tell(job, process.exitcode)
                    advance(1)
    finally:
        for process, _ in busy.values():
            process.kill()  # at once: its folder has no result yet
            process.join()
    return failed


def _tell(job: Job, status: int | None) -> None:
    record = job.record()
    if record is None:
        why = _last_line(job) if status == 1 else f"ended from outside (status {status}); out of memory?"
        say(f"FAILED           {job.name}: {why}")
    elif record["status"] == "stopped":
        say(f"stopped          {job.name}: {record['why']}")
    else:
        say(f"finished         {job.name}: train/loss {record['metrics'].get('train/loss', math.nan):.3f}")


def _last_line(job: Job) -> str:
    lines = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
    return lines[-1]


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does: with what is left to do on the way out."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------- in a process of its own


def _work(job: Job, config: dict[str, Any], train: Train) -> None:
    """One run, from its empty folder to its result."""
    serve_parent()
    log = (job.folder / "log.txt").open("w", buffering=1)
    os.dup2(log.fileno(), 1)  # what compilers and libraries print goes there too
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=log, force=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    began = time.monotonic()
    result: dict[str, Any] = {"status": "finished", "why": "reached its last step", "metrics": {}}
    try:
        result["metrics"] = train(config)
    except UserError as error:
        result |= {"status": "stopped", "why": " ".join(str(error).split())}
        say(f"stopped: {result['why']}")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    result |= {"seconds": round(time.monotonic() - began, 1), "versions": versions, "overrides": job.overrides}
    _write_json(job.folder / "result.json", result)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically: it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
