"""Where runs live: `logs/<task_name>/runs/<time>_<id>/`, one folder for all ranks of a run and for its resumes."""

import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import OmegaConf
from torch.distributed import DistError, TCPStore, is_torchelastic_launched  # type: ignore[attr-defined]

from mvsplit.utils.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[3]


AGREE_WITHIN = timedelta(minutes=10)
"""How long the processes of a job wait for its first one."""


@lru_cache
def _store() -> tuple[Any, bool] | None:
    """A store that the processes of a job share, and whether this one is the first of them; None for a lone one.

    Lightning hands the folder to the ranks that it starts itself. Where a launcher starts them, they meet where their
    process group will: torchrun's agent keeps a store there, else the first process opens it, and the group uses it
    again.

    Raises:
        UserError: if the launcher's variables do not fit together, or the first process cannot be reached.
    """
    env = os.environ
    environment: ClusterEnvironment
    if is_torchelastic_launched() and int(env["WORLD_SIZE"]) > 1:
        kept = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if kept and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":  # github.com/pytorch/pytorch/issues/135712
            raise UserError(
                "torchrun --max-restarts: its store outlives a restart, whose ranks would then look for those before"
                " it; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --rdzv-backend=c10d or --standalone"
            )
        environment, first = TorchElasticEnvironment(), env["RANK"] == "0"
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set by srun, not by an interactive allocation
        try:
            environment, first, kept = SLURMEnvironment(), env["SLURM_PROCID"] == "0", False
        except RuntimeError as error:
            raise UserError(str(error)) from None
    elif env.keys() >= {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} and "LOCAL_RANK" not in env:
        environment, first, kept = LightningEnvironment(), env["NODE_RANK"] == "0", False  # a command on each machine
    else:
        return None
    host, port = environment.main_address, environment.main_port
    try:
        opens = first and not kept
        # Without waiting for the others, who wait for it; and shared with the process group (multi_tenant).
        store = TCPStore(host, port, None, opens, AGREE_WITHIN, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        raise UserError(f"{host}:{port}: no meeting with the first process there ({error})") from None
    return store, first


def _agreed(question: str, decide: Callable[[], str]) -> str:
    """What the first process of a job decides, in all its processes.

    Each by itself might see other files: one that starts late, or on a machine whose view of the folder is older.
    """
    shared = _store()
    if shared is None:
        return decide()
    store, first = shared
    # A restart by torchrun decides anew: there may be a checkpoint by now.
    key = f"mvsplit {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {question}"
    if first:
        return store.compare_set(key, "", decide()).decode()
    try:
        return store.get(key).decode()
    except DistError as error:
        raise UserError(f"the first process of this job has not said where the run goes ({error})") from None


@lru_cache
def run_name() -> str:
    """`<time>_<id>`, or under SLURM `slurm_<job>_<step>`, which a requeued job finds again."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return f"slurm_{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_STEP_ID']}"
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"


@lru_cache
def _run_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...]) -> str:
    """Folder of a run: a new one, or with `ckpt_path=last` the newest that this very command made."""
    runs = Path(log_dir) / task_name / "runs"

    def choose() -> str:
        if ckpt_path == "last":
            for run in newest_first(runs):
                if _overrides(run / ".hydra" / "overrides.yaml") == _without_ckpt(overrides):
                    return str(run)
        return str(runs / run_name())

    return _agreed(f"run {overrides}", choose)


_sweep_dirs: dict[tuple[str, str, str | None], str] = {}


def _sweep_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...]) -> str:
    """The same for a sweep of runs (`-m`). Asked first for the sweep, then by each job with its own overrides."""
    key = (log_dir, task_name, ckpt_path)
    sweeps = Path(log_dir) / task_name / "multiruns"

    def choose() -> str:
        if ckpt_path == "last":
            for sweep in sorted(sweeps.glob("*"), reverse=True):
                if _overrides(sweep / "multirun.yaml", "hydra.overrides.task") == _without_ckpt(overrides):
                    return str(sweep)
        return str(sweeps / run_name())

    if key not in _sweep_dirs:
        _sweep_dirs[key] = _agreed(f"sweep {overrides}", choose)
    return _sweep_dirs[key]


def _without_ckpt(overrides: Any) -> list[str]:
    return sorted(o for o in overrides if not o.startswith("ckpt_path="))


def _overrides(file: Path, key: str | None = None) -> list[str] | None:
    try:
        content = yaml.safe_load(file.read_text())
        for part in key.split(".") if key else ():
            content = content[part]
        return _without_ckpt(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None  # not, or no longer, the record of a command


def newest_first(runs: Path) -> list[Path]:
    """Run folders that hold a complete checkpoint, the latest first."""
    found = [(_time(mark), run) for run in runs.glob("*") if (mark := _newest_mark(run)) is not None]
    return [run for _, run in sorted(found, reverse=True)]


def _newest_mark(run: Path) -> Path | None:
    """What marks the run's latest checkpoint as complete. Not by its link: a kill can come before that is set."""
    marks = [mark for mark in run.glob("checkpoints/*.ckpt/COMPLETE") if not mark.parent.is_symlink()]
    return max(marks, key=_time, default=None)


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # a run that goes on has just removed this checkpoint
        return 0.0


def last_checkpoint(run: Path) -> Path:
    link, mark = run / "checkpoints" / "last.ckpt", _newest_mark(run)
    return link if link.exists() or mark is None else mark.parent


def find_checkpoint(ckpt_path: str, log_dir: str) -> Path:
    """The checkpoint to sample from or to judge: a path, or `last` for that of the newest training run.

    Raises:
        UserError: if there is none.
    """
    if ckpt_path != "last":
        return Path(ckpt_path)
    tasks = Path(log_dir)
    runs = [*tasks.glob("*/runs"), *tasks.glob("*/multiruns/*")]
    found = [last_checkpoint(run) for folder in runs for run in newest_first(folder)]
    if not found:
        raise UserError(f"ckpt_path = last: no checkpoint in {log_dir}; train first or give a path")
    return max(found, key=_time)


def on_gpus(accelerator: str, planning: bool = False) -> bool:
    """Whether a run with this `trainer.accelerator` uses GPUs on this machine, or if one only plans, on any."""
    import torch  # here: most of what this module does needs no torch, and is done first

    return accelerator not in ("cpu", "mps") and (planning or torch.cuda.is_available())


def devices_here(accelerator: str, planning: bool = False) -> int:
    """All GPUs of this machine, or two CPU processes: the fewest that share work out at all. Plans are for 8 GPUs."""
    import torch

    return (8 if planning else torch.cuda.device_count()) if on_gpus(accelerator, planning) else 2


def precision_here(accelerator: str, planning: bool = False) -> str:
    """What the device is fast at: CPUs emulate bf16."""
    return "bf16-mixed" if on_gpus(accelerator, planning) else "32-true"


def register_resolvers(planning: bool = False) -> None:
    """Resolvers for the configs: `project_root`, `run_dir`, `sweep_dir`, `devices_here` and `precision_here`.

    Args:
        planning: `trainer.accelerator=auto` means GPUs, though there may be none here.
    """
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("devices_here", partial(devices_here, planning=planning), replace=True)
    OmegaConf.register_new_resolver("precision_here", partial(precision_here, planning=planning), replace=True)
    for name, find in (("run_dir", _run_dir), ("sweep_dir", _sweep_dir)):
        OmegaConf.register_new_resolver(
            name, lambda log, task, ckpt, given, find=find: find(log, task, ckpt, tuple(given)), replace=True
        )
