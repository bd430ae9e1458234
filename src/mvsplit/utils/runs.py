"""Where runs live: `logs/<task_name>/runs/<time>_<id>/`, one folder for all ranks of a run and for its resumes."""

import os
import secrets
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from mvsplit.utils.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[3]


@lru_cache
def run_name() -> str:
    """`<time>_<id>`, the same in all processes of a job.

    Lightning hands the folder to the ranks it starts itself. Where a launcher starts them, they must agree without
    talking: SLURM's job number is common to all, and torchrun's agent keeps a store that they can ask.
    """
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set by srun, not by an interactive allocation
        return f"slurm_{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_STEP_ID']}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["WORLD_SIZE"]) > 1:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"mvsplit_run_name_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if os.environ["RANK"] == "0":
            store.set(key, name)
        return store.get(key).decode()
    return name


@lru_cache
def _run_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...]) -> str:
    """Folder of a run: a new one, or with `ckpt_path=last` the newest that this very command made."""
    runs = Path(log_dir) / task_name / "runs"
    if ckpt_path == "last":
        for run in newest_first(runs):
            if _overrides(run / ".hydra" / "overrides.yaml") == _without_ckpt(overrides):
                return str(run)
    return str(runs / run_name())


_sweep_dirs: dict[tuple[str, str, str | None], str] = {}


def _sweep_dir(log_dir: str, task_name: str, ckpt_path: str | None, overrides: tuple[str, ...]) -> str:
    """The same for a sweep of runs (`-m`). Asked first for the sweep, then by each job with its own overrides."""
    key = (log_dir, task_name, ckpt_path)
    if key not in _sweep_dirs:
        sweeps = Path(log_dir) / task_name / "multiruns"
        _sweep_dirs[key] = str(sweeps / run_name())
        if ckpt_path == "last":
            for sweep in sorted(sweeps.glob("*"), reverse=True):
                if _overrides(sweep / "multirun.yaml", "hydra.overrides.task") == _without_ckpt(overrides):
                    _sweep_dirs[key] = str(sweep)
                    break
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
    """Run folders that hold a `last` checkpoint, the latest checkpoint first."""
    found = [(link.stat().st_mtime, run) for run in runs.glob("*") if (link := last_checkpoint(run)).exists()]
    return [run for _, run in sorted(found, reverse=True)]


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


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
    return max(found, key=lambda path: path.stat().st_mtime)


def on_gpus(accelerator: str) -> bool:
    """Whether a run with this `trainer.accelerator` uses GPUs on this machine."""
    import torch  # here: most of what this module does needs no torch, and is done first

    return accelerator not in ("cpu", "mps") and torch.cuda.is_available()


def devices_here(accelerator: str) -> int:
    """All GPUs of this machine, or two CPU processes: the fewest that share work out at all."""
    import torch

    return torch.cuda.device_count() if on_gpus(accelerator) else 2


def precision_here(accelerator: str) -> str:
    """What the device is fast at: CPUs emulate bf16."""
    return "bf16-mixed" if on_gpus(accelerator) else "32-true"


def register_resolvers() -> None:
    """Resolvers for the configs: `project_root`, `run_dir`, `sweep_dir`, `devices_here` and `precision_here`."""
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("devices_here", devices_here, replace=True)
    OmegaConf.register_new_resolver("precision_here", precision_here, replace=True)
    for name, find in (("run_dir", _run_dir), ("sweep_dir", _sweep_dir)):
        OmegaConf.register_new_resolver(
            name, lambda log, task, ckpt, given, find=find: find(log, task, ckpt, tuple(given)), replace=True
        )
