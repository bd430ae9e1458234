"""Folders of runs: `logs/<task_name>/runs/<time>_<id>_<overrides>/`, one for all ranks and for all resumes of a run."""

import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from mvsplit.utils.errors import UserError
from mvsplit.utils.launch import agreed, is_slurm_step
from mvsplit.utils.limits import parse_yaml, read_small
from mvsplit.utils.locks import locked

PROJECT_ROOT = Path(__file__).resolve().parents[3]

MAY_CHANGE = (
    # how long, and on which machine
    *("trainer", "trainer.max_steps", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.accumulate_grad_batches"),
    *("data.num_workers", "data.pin_memory", "data.storage", "paths.data_dir"),
    # what is logged and kept
    *("trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.limit_val_batches", "trainer.profiler"),
    *("trainer.limit_test_batches", "trainer.num_sanity_val_steps", "trainer.detect_anomaly", "test", "tags", "extras"),
    *("trainer.enable_model_summary", "logger", "optimized_metric", "optimized_direction"),
    *(f"callbacks.{name}" for name in ("checkpoint", "stop_signals", "monitor.board", "progress", "rank_watch")),
    *("callbacks.sample_grid", "callbacks.throughput", "callbacks.data_faults", "callbacks.metrics", "autoencoder"),
    *(f"callbacks.{name}" for name in ("best", "every", "last", "stability_board")),  # of earlier versions
)
"""Keys and groups, with all keys below them, that `ckpt_path=last` ignores when it looks for the run to resume.

Any strategy and number of processes trains the same steps. The entry `trainer` stands for the choice of a file in that
group; its other keys (`precision`, `gradient_clip_val`) must stay the same.
"""

HUB_CONFIG = "config.json"
"""The file that makes a folder one for a model hub."""

WANDB_LOG = "wandb/*/logs/debug-core.log"
"""A link that W&B makes to a log of its own; each start has another folder, so that no later one writes through it."""


@lru_cache
def run_name() -> str:
    """`<time>_<id>`, or under SLURM `slurm_<job>_<step>`, which a requeued job finds again."""
    if is_slurm_step():
        return f"slurm_{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_STEP_ID']}"
    return new_name()


def new_name() -> str:
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"


def _with_overrides(name: str, overrides: Iterable[str]) -> str:
    """A folder's name with overrides appended, as TensorBoard shows it: `0_residual-post_norm_depth-100`.

    Without `=`, which would have to be quoted where the path is given in an override.
    """
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        more = re.sub(r"[^\w.+-]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")
        if len(name) + len(more) < 100:
            name = f"{name}_{more}"
    return name


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _is_sweep(override: str) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except OverrideParseException:
        return False


def _without_ckpt(overrides: Iterable[str]) -> list[str]:
    return sorted(o for o in overrides if not o.startswith("ckpt_path="))


def lasting(overrides: Iterable[str]) -> list[str]:
    """Overrides that must stay the same when a run is resumed; those that a sweep varies always must."""

    def may_change(key: str) -> bool:
        return any(key == one or (one != "trainer" and key.startswith(f"{one}.")) for one in MAY_CHANGE)

    return [o for o in _without_ckpt(overrides) if not may_change(key_of(o)) or _is_sweep(o)]


def _earlier(
    folders: Iterable[Path], record: Callable[[Path], list[str] | None], given: tuple[str, ...]
) -> Path | None:
    """The newest folder made by the same command, or else by one that differs in `MAY_CHANGE` only.

    In the second case folders in use are left out: they belong to another command, which is still running.
    """
    made = [
        (folder, overrides)
        for folder in folders
        if (overrides := record(folder)) is not None and not _links_out(folder)
    ]
    for folder, overrides in made:
        if _without_ckpt(overrides) == _without_ckpt(given):
            return folder
    return next((f for f, overrides in made if lasting(overrides) == lasting(given) and not in_use(f)), None)


def _links_out(run: Path) -> bool:
    """Whether a link in a run's folder leads out of it: resuming would write and delete files there."""
    for parent, below, files in os.walk(run):
        for path in (Path(parent, name) for name in below + files):
            if path.relative_to(run).match(WANDB_LOG):
                continue
            if path.is_symlink() and path.resolve().parent != Path(parent).resolve():
                print(f"skipped: {path} points outside the run's folder", file=sys.stderr)
                return True
    return False


def in_use(run: Path) -> bool:
    """Whether a process trains in this run's folder."""
    try:
        with locked(run / ".lock") as free:
            return not free
    except OSError:
        return False


@lru_cache
def run_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...]) -> str:
    """Folder of a run: a new one, or with `ckpt_path=last` the one that this command resumes, see `_earlier`."""
    runs = Path(log_dir) / task_name / "runs"

    def choose() -> str:
        earlier = None
        if ckpt_path == "last":
            earlier = _earlier(newest_first(runs), lambda run: _overrides(run / ".hydra" / "overrides.yaml"), overrides)
        return str(earlier or runs / _with_overrides(run_name(), _distinctive(overrides)))

    return agreed(f"run {overrides}", choose)


sweeps: dict[tuple[str, str, str | None], tuple[str, tuple[str, ...]]] = {}
"""Folder and overrides of each sweep of this process, by log folder, task and `ckpt_path`."""


def sweep_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...]) -> str:
    """Folder of a sweep (`-m`). Called first for the sweep, then by each job with the job's own overrides."""
    key = (log_dir, task_name, ckpt_path)
    folder = Path(log_dir) / task_name / "multiruns"

    def choose() -> str:
        earlier = None
        if ckpt_path == "last":
            made = sorted(folder.glob("*"), reverse=True)
            earlier = _earlier(made, lambda one: _overrides(one / "multirun.yaml", "hydra.overrides.task"), overrides)
        return str(earlier or folder / run_name())

    if key not in sweeps:
        sweeps[key] = (agreed(f"sweep {overrides}", choose), overrides)
    return sweeps[key][0]


def job_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...], number: int) -> str:
    """Folder of a job below its sweep's, named by its number and by what the sweep varies."""
    sweep, given = sweeps[log_dir, task_name, ckpt_path]
    if (Path(sweep) / str(number)).is_dir():  # made by an earlier version
        return str(number)
    return _with_overrides(str(number), varied(overrides, given))


def varied(overrides: Iterable[str], sweep: Iterable[str]) -> list[str]:
    """Overrides of a job that the other jobs of its sweep do not share."""
    shared = {key_of(o) for o in sweep if not _is_sweep(o)}
    return [o for o in overrides if key_of(o) not in shared]


def _distinctive(overrides: Iterable[str]) -> list[str]:
    """Overrides that tell one run from another: not its folders, nor its machine."""
    return [
        o for o in overrides if o in lasting(overrides) and not key_of(o).startswith(("paths.", "task_name", "hydra"))
    ]


def distinctive_overrides() -> list[str]:
    """Overrides that tell the current run from others, those varied by its sweep first; none without a command line."""
    if not HydraConfig.initialized():
        return []
    return list(dict.fromkeys([*job_overrides(), *_distinctive(HydraConfig.get().overrides.task)]))


def job_overrides() -> list[str]:
    """What the sweep varies in the current job; empty outside of a sweep."""
    given = list(sweeps.values())[-1:]
    return varied(HydraConfig.get().overrides.task, given[0][1]) if given else []


def group_choices() -> dict[str, str]:
    """The chosen file of each config group; empty without a command line."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {str(group): str(name) for group, name in choices.items() if name is not None}


def _overrides(file: Path, key: str | None = None) -> list[str] | None:
    """The overrides recorded in a file; None if it is not, or no longer, such a record."""
    try:
        content = parse_yaml(read_small(file), str(file))
        for part in key.split(".") if key else ():
            content = content[part]
        return _without_ckpt(content)
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def newest_first(runs: Path) -> list[Path]:
    """Run folders with a complete checkpoint, the latest first."""
    found = [(_time(mark), run) for run in runs.glob("*") if (mark := _newest_mark(run)) is not None]
    return [run for _, run in sorted(found, reverse=True)]


def _newest_mark(run: Path) -> Path | None:
    """The file that marks the run's latest checkpoint as complete. A kill can come before its link is set."""
    marks = [mark for mark in run.glob("checkpoints/*.ckpt/COMPLETE") if not mark.parent.is_symlink()]
    return max(marks, key=_time, default=None)


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # a running process has just removed this checkpoint
        return 0.0


def last_checkpoint(run: Path) -> Path:
    link, mark = run / "checkpoints" / "last.ckpt", _newest_mark(run)
    return link if link.exists() or mark is None else mark.parent


def is_hub_folder(path: Path) -> bool:
    """Whether this is a folder for a model hub, as `src/convert.py hub=true` writes it."""
    return (path / HUB_CONFIG).is_file() and not (path / "COMPLETE").exists()


def find_checkpoint(ckpt_path: str, log_dir: str) -> Path:
    """A checkpoint to sample from or to evaluate.

    Args:
        ckpt_path: of a checkpoint, a run's folder (its last checkpoint), a converted file, a folder from a model hub,
            or `last` for the newest run's.
        log_dir: folder with all runs.

    Raises:
        UserError: if there is none.
    """
    if ckpt_path != "last":
        path = Path(ckpt_path)
        return last_checkpoint(path) if (path / "checkpoints").is_dir() and not is_hub_folder(path) else path
    tasks = Path(log_dir)
    runs = [*tasks.glob("*/runs"), *tasks.glob("*/multiruns/*")]
    found = [last_checkpoint(run) for folder in runs for run in newest_first(folder)]
    if not found:
        raise UserError(f"ckpt_path = last: no checkpoint in {log_dir}; train first or give a path")
    return max(found, key=_time)
