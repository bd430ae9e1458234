"""OmegaConf's resolvers, `${name:arguments}` in the configs."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from mvsplit.utils.devices import devices_here, precision_here
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT, job_dir, run_dir, sweep_dir

ENVIRONMENT = ("HOME", "USER", "TMPDIR", "SCRATCH", "SLURM_JOB_ID", "SLURM_TMPDIR")
"""Variables that a config may read with `${oc.env:NAME}`. It may come from elsewhere, and others hold secrets."""


def _env(name: str, *default: str | None) -> str | None:
    """OmegaConf's `oc.env`, limited to the names above."""
    if name not in ENVIRONMENT:
        raise UserError(f"oc.env:{name}: must be one of {', '.join(ENVIRONMENT)}")
    if name not in os.environ and not default:
        raise UserError(f"oc.env:{name}: not set on this machine")
    return os.environ.get(name, *default)


def _of_command(find: Callable[..., str]) -> Callable[..., str]:
    """A resolver whose fourth argument is OmegaConf's list of overrides, as a function that caches needs it."""
    return lambda log_dir, task, ckpt_path, overrides, *more: find(log_dir, task, ckpt_path, tuple(overrides), *more)


def register_resolvers(of_data: Mapping[str, Callable[..., Any]], planning: bool = False) -> None:
    """Register `project_root`, `run_dir`, `sweep_dir`, `job_dir`, `devices_here`, `precision_here` and our `oc.env`.

    Args:
        of_data: resolvers that read a data set, `mvsplit.data.folders.RESOLVERS`; each reads once per config.
        planning: `trainer.accelerator=auto` means GPUs, though this machine may have none.
    """
    ours: dict[str, Callable[..., Any]] = {
        "oc.env": _env,
        "project_root": lambda: str(PROJECT_ROOT),
        "devices_here": partial(devices_here, planning=planning),
        "precision_here": partial(precision_here, planning=planning),
        "run_dir": _of_command(run_dir),
        "sweep_dir": _of_command(sweep_dir),
        "job_dir": _of_command(job_dir),
    }
    for name, resolver in ours.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    for name, resolver in of_data.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True, use_cache=True)
