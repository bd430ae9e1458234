"""Compare ways to train: `python src/ablate.py [only=[…]] [key=value …]`, see `configs/ablate.yaml`.

The same command goes on where it was interrupted; a run that is done is never done again.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

import report
import train
from mvsplit.benchmarks import ablation
from mvsplit.training import run
from mvsplit.utils import entry
from mvsplit.utils.config import check_config, to_plain


def train_here(config: dict[str, Any]) -> dict[str, float]:
    """Train in this process; the final metrics."""
    metrics, objects = train.train(OmegaConf.create(config))
    received = run.stop_signal(objects["callbacks"])
    if received is not None:  # not at its end
        sys.exit(128 + received)
    return metrics


@lru_cache(maxsize=1000)
def composed(*overrides: str) -> DictConfig:
    """Composed once for all seeds: it takes a quarter of a second."""
    return compose("train.yaml", entry.plain_overrides(overrides))


def compose_run(overrides: list[str], seed: int, paths: dict[str, str]) -> dict[str, Any]:
    """The checked config of one run.

    Raises:
        UserError: if it is none.
    """
    cfg = composed(*overrides).copy()
    cfg.seed = seed
    cfg.paths = paths
    config = to_plain(cfg)
    check_config(config, run.TrainConfig)
    run.check_together(config)
    run.check_machine(config)
    return config


def ablate(cfg: DictConfig) -> None:
    """Train all that is missing, then write the report; exits with 1 if a run failed."""
    config = to_plain(cfg)
    check_config(config, ablation.Config)
    folder = Path(config["folder"])
    failed = ablation.run_all(config, compose_run, train_here)
    report.main([str(folder)])
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    entry.run(ablate, "ablate.yaml")
