"""Compare ways to train: `python src/ablate.py [only=[…]] [key=value …]`, see `configs/ablate.yaml`.

Repeating the command resumes an interrupted ablation; finished runs are not repeated.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

import report
import train
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import entry
from mvsplit.utils.config import to_checked


def train_here(config: dict[str, Any]) -> dict[str, float]:
    """Train in this process and return the final metrics."""
    metrics, objects = train.train(OmegaConf.create(config))
    from mvsplit.training import session

    session.exit_if_stopped(objects["callbacks"])
    return metrics


@lru_cache(maxsize=1000)
def composed(*overrides: str) -> DictConfig:
    """Cached for all seeds: composing takes a quarter of a second."""
    return compose("train.yaml", entry.plain_overrides(overrides))


def compose_run(overrides: Sequence[str], seed: int, paths: dict[str, str]) -> dict[str, Any]:
    """The checked config of one run.

    Raises:
        UserError: if it is invalid.
    """
    cfg = composed(*overrides).copy()
    cfg.seed = seed
    cfg.paths = paths
    config = settings.checked(cfg)
    settings.check_used(config, overrides)
    return config


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The benchmark's own config as plain dicts."""
    from mvsplit.benchmarks import ablation

    return to_checked(cfg, ablation.Config)


def ablate(cfg: DictConfig) -> None:
    """Train all unfinished runs, then write the report; exits with 1 if a run failed."""
    config = checked(cfg)
    from mvsplit.benchmarks import ablation

    runs = ablation.all_runs(config)
    failed = ablation.run_all(config, runs, compose_run, train_here)
    if len(failed) < len(runs):
        report.main([config["folder"]])
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    entry.run(ablate, "ablate.yaml", checked, RESOLVERS)
