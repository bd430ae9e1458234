"""Processes of one job before they have a process group: which is the first, and what it decides for all.

Lightning passes the run's folder to the ranks that it starts itself. Ranks that a launcher starts (torchrun, srun, or
one command per machine) agree on it over a store at the address where their process group will meet.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

from mvsplit.utils.errors import UserError

AGREE_WITHIN = timedelta(minutes=10)
"""How long the processes of a job wait for the first one."""


def is_slurm_step() -> bool:
    """Whether srun started several tasks. (An interactive allocation does not set this variable.)"""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _is_per_machine() -> bool:
    """Whether this command was started on each of several machines, and starts the ranks of its machine itself."""
    return os.environ.keys() >= {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} and "LOCAL_RANK" not in os.environ


def set_rank() -> None:
    """Set Lightning's rank on later machines: without a trainer it assumes that each command is the first process."""
    if _is_per_machine() and os.environ["NODE_RANK"] != "0":
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = int(os.environ["NODE_RANK"])  # type: ignore[attr-defined]


def is_first_process() -> bool:
    """Whether this is a job's first process, also before there is a process group."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


@lru_cache
def _store() -> tuple[Any, bool] | None:
    """The store that the processes of a job share, and whether this one is the first; None if it is alone.

    torchrun's agent hosts a store. Otherwise the first process opens one, which the process group reuses.

    Raises:
        UserError: if the launcher's variables do not fit together, or the first process cannot be reached.
    """
    # Imported here, so that a mistake in a config is reported first.
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from torch.distributed import DistError, TCPStore, is_torchelastic_launched  # type: ignore[attr-defined]

    env = os.environ
    environment: ClusterEnvironment
    if is_torchelastic_launched() and int(env["WORLD_SIZE"]) > 1:
        hosted = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if hosted and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":  # github.com/pytorch/pytorch/issues/135712
            raise UserError(
                "torchrun --max-restarts: its store outlives a restart, so new ranks would look for the old ones;"
                " set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --rdzv-backend=c10d or --standalone"
            )
        environment, first = TorchElasticEnvironment(), env["RANK"] == "0"
    elif is_slurm_step():
        try:
            environment, first, hosted = SLURMEnvironment(), env["SLURM_PROCID"] == "0", False
        except RuntimeError as error:
            raise UserError(str(error)) from None
    elif _is_per_machine():
        environment, first, hosted = LightningEnvironment(), env["NODE_RANK"] == "0", False
    else:
        return None
    host, port = environment.main_address, environment.main_port
    try:
        opens = first and not hosted
        # Does not wait for the others, who wait for it; shared with the process group (multi_tenant).
        store = TCPStore(host, port, None, opens, AGREE_WITHIN, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        raise UserError(f"{host}:{port}: cannot reach the first process of this job ({error})") from None
    return store, first


def agreed(question: str, decide: Callable[[], str]) -> str:
    """The decision of a job's first process, in all its processes.

    They cannot decide separately: one that starts late, or on another machine, may see other files.

    Args:
        question: a name for the decision, the same in all processes.
        decide: called in the first process only.

    Raises:
        UserError: if the first process does not answer.
    """
    shared = _store()
    if shared is None:
        return decide()
    from torch.distributed import DistError

    store, first = shared
    # A restart by torchrun decides again: there may be a checkpoint by now.
    key = f"mvsplit {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {question}"
    if first:
        return store.compare_set(key, "", decide()).decode()
    try:
        return store.get(key).decode()
    except DistError as error:
        raise UserError(f"the first process of this job did not answer: {question} ({error})") from None
