"""The end of a sweep (`-m`): a table of its jobs and the best of them, on the console and as `results.csv`.

Each job leaves its result in its folder, where the sweep finds it if another process ran the job.
"""

import csv
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from traceback import walk_tb

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pydantic import TypeAdapter
from rich.table import Table
from rich.text import Text

from mvsplit.utils import run_dirs
from mvsplit.utils.console import info, print_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file
from mvsplit.utils.limits import read_small

RESULT = Path(".hydra", "result.json")
"""A job's result, relative to its folder."""


@dataclass
class SweepJob:
    """One run of a sweep.

    Args:
        number: its place in the sweep.
        overrides: those that the sweep varies.
        folder: of the run.
        began: seconds since 1970.
        seconds: it took.
        status: `running`, `finished`, `failed` or `stopped`.
        metric: by which jobs are compared.
        direction: `minimize` or `maximize`.
        value: of the metric; NaN without one.
    """

    number: int
    overrides: list[str]
    folder: Path
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    status: str = "running"
    metric: str = ""
    direction: str = "minimize"
    value: float = math.nan


_jobs: list[SweepJob] = []
"""Jobs that this process ran."""


def is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def job() -> Iterator[None]:
    """Run a job of a sweep. A user's mistake in it has been reported, and does not end the sweep."""
    if not is_sweep():
        yield
        return
    hydra = HydraConfig.get()
    one = SweepJob(hydra.job.num, run_dirs.job_overrides(), Path(hydra.runtime.output_dir))
    _jobs.append(one)
    status = "failed"
    try:
        yield
        status = "finished"
    except SystemExit as stop:
        import torch.distributed  # here: a script that only plans needs no torch

        if stop.code != 2 or torch.distributed.is_initialized():  # a signal, or a run of several ranks
            status = "failed" if stop.code in (1, 2) else "stopped"
            raise
    finally:
        one.status, one.seconds = status, time.time() - one.began
        _write(one)


def record(metrics: dict[str, float], metric: str | None, direction: str) -> None:
    """Record the result of the current job.

    Args:
        metrics: of the run.
        metric: by which jobs are compared; `val/loss` if None.
        direction: `minimize` or `maximize`.
    """
    if _jobs and is_sweep():
        name = metric or "val/loss"
        _jobs[-1].metric, _jobs[-1].direction, _jobs[-1].value = name, direction, metrics.get(name, math.nan)


def best_of(jobs: list[SweepJob]) -> SweepJob | None:
    """The finished job with the best finite value."""
    rated = [one for one in jobs if one.status == "finished" and math.isfinite(one.value)]
    sign = -1 if jobs and jobs[0].direction == "maximize" else 1
    return min(rated, key=lambda one: sign * one.value, default=None)


@contextmanager
def table_at_end() -> Iterator[None]:
    """However the sweep inside ends, show the results of its jobs; exit with 2 if one of them failed."""
    began, ended_by = time.time(), ""
    try:
        yield
    except Exception as error:
        if not _raised_in(error).startswith(("submitit.", "optuna.")):
            raise
        ended_by = str(error).strip().partition("\n")[0]
    finally:
        jobs = _jobs or _read(began)
        if jobs:
            from lightning.pytorch.utilities import rank_zero_only  # here: a mistake is reported before it is imported

            if getattr(rank_zero_only, "rank", 0) == 0:
                _show(jobs)
    if ended_by:
        raise UserError(f"the sweep did not finish: {ended_by}")
    if any(one.status == "failed" for one in jobs):
        raise SystemExit(2)


def _raised_in(error: Exception) -> str:
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", ""))


def _write(one: SweepJob) -> None:
    with suppress(OSError), whole_file(one.folder / RESULT) as file:
        file.write(json.dumps(asdict(one), default=str).encode())


def _read(began: float) -> list[SweepJob]:
    """Results of this sweep's jobs since a moment, where other processes ran them; none if this is no sweep."""
    folders = [folder for folder, _ in run_dirs.sweeps.values()]
    files = [file for folder in folders[-1:] for file in Path(folder).glob(f"*/{RESULT}")]
    found = [(TypeAdapter(SweepJob).validate_json(read_small(file)), file) for file in files]
    jobs = [replace(one, folder=file.parents[1]) for one, file in found if one.began >= began]
    return sorted(jobs, key=lambda one: one.number)


def _show(jobs: list[SweepJob]) -> None:
    """The table, `results.csv` in the sweep's folder, and one line about the best."""
    best = best_of(jobs)
    metric = next((one.metric for one in jobs if one.metric), "")
    given = [dict(o.lstrip("+~").partition("=")[::2] for o in one.overrides) for one in jobs]
    keys = list(dict.fromkeys(key for overrides in given for key in overrides))
    header = ["job", *keys, metric or "metric", "seconds", "status"]
    rows = [
        [str(one.number), *(overrides.get(key, "") for key in keys),
         "" if math.isnan(one.value) else f"{one.value:.5g}", f"{one.seconds:.0f}", one.status]
        for one, overrides in zip(jobs, given, strict=True)
    ]  # fmt: skip
    table = Table(title="sweep", title_justify="left")
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for one, row in zip(jobs, rows, strict=True):
        table.add_row(*map(Text, row), style="bold" if one is best else None)
    print_table(table)
    file = jobs[0].folder.parent / "results.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*header, "best", "folder"])
        writer.writerows([*row, int(one is best), one.folder] for one, row in zip(jobs, rows, strict=True))
    if best is not None:
        info(f"best             {' '.join(best.overrides)}: {metric} = {best.value:.5g}, {best.folder}")
    info(f"table            {file}")
