"""Where runs live: `logs/<task_name>/runs/<time>_<id>/`, one folder for all ranks of a run and for its resumes."""

import os
import secrets
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    if "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm_{os.environ['SLURM_JOB_ID']}_{os.environ.get('SLURM_STEP_ID', '0')}"
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
    runs = Path(log_dir) / task_name / "runs"
    if ckpt_path == "last":
        for run in newest_first(runs):
            if _overrides(run) == _without_ckpt(overrides):
                return str(run)
    return str(runs / run_name())


def _without_ckpt(overrides: Any) -> list[str]:
    return sorted(o for o in overrides if not o.startswith("ckpt_path="))


def _overrides(run: Path) -> list[str] | None:
    try:
        return _without_ckpt(OmegaConf.load(run / ".hydra" / "overrides.yaml"))
    except OSError:
        return None


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
    runs = newest_first(Path(log_dir) / "train" / "runs")
    if not runs:
        raise UserError(f"ckpt_path = last: no checkpoint in {log_dir}/train/runs; train first or give a path")
    return last_checkpoint(runs[0])


def register_resolvers() -> None:
    """`${project_root:}`, `${run_name:}` and `${run_dir:log_dir,task_name,ckpt_path,overrides}` for the configs."""
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver(
        "run_dir", lambda log, task, ckpt, overrides: _run_dir(log, task, ckpt, tuple(overrides)), replace=True
    )
