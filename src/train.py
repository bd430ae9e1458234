"""Train: `python src/train.py [experiment=NAME] [key=value …]`. Every config key is explained in `configs/`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from omegaconf import DictConfig

from mvsplit.training import run
from mvsplit.training.strategies import FolderCheckpoints
from mvsplit.utils import entry
from mvsplit.utils.config import build, build_each, check_config, to_plain
from mvsplit.utils.errors import UserError
from mvsplit.utils.loggers import TensorBoard


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Build what the config says, train it, test it.

    Returns:
        The final metrics, and the objects: `config` (plain dict), `datamodule`, `module`, `callbacks`, `loggers`,
        `trainer`.

    Raises:
        UserError: for whatever the user can mend.
    """
    config = to_plain(cfg)
    check_config(config, run.TrainConfig)
    run.check_together(config)
    run.check_machine(config)
    run.say_machine(config)
    run.apply_extras(config)
    output_dir = Path(config["paths"]["output_dir"])
    with run.locked(output_dir):
        return _train(config, output_dir)


def _train(config: dict[str, Any], output_dir: Path) -> tuple[dict[str, float], dict[str, Any]]:
    ckpt_path = run.prepare_resume(config, output_dir)
    datamodule = build(config["data"])
    module = build(config["module"])
    callbacks = build_each(config["callbacks"])
    loggers = build_each(config["logger"])
    settings = {
        "callbacks": callbacks,
        "logger": loggers or False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),  # ours, or none
        "plugins": [FolderCheckpoints()],
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
    }
    trainer: L.Trainer = build(config["trainer"] | settings)
    objects = {
        "config": config,
        "datamodule": datamodule,
        "module": module,
        "callbacks": callbacks,
        "loggers": loggers,
        "trainer": trainer,
    }
    run.save_config(config, output_dir)
    for logger in loggers:
        if isinstance(logger, TensorBoard):
            logger.log_config(run.to_yaml(config), trainer.global_step)

    metrics: dict[str, float] = {}
    with run.watched(callbacks):
        if config["train"]:
            trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
            metrics |= run.plain_metrics(trainer)
        if config["test"] and not run.stop_signal(callbacks):
            if not config["train"] and ckpt_path is None:
                raise UserError("test = true: without training, ckpt_path must name the checkpoint to test")
            # The weights at hand are the last, or, without training, those of the checkpoint.
            resumed = None if config["train"] else ckpt_path
            trainer.test(module, datamodule=datamodule, ckpt_path=resumed, verbose=False, weights_only=True)
            metrics |= run.plain_metrics(trainer)
            if not config["train"]:
                run.show_metrics("tested", metrics)
        if config["train"] and not run.stop_signal(callbacks):
            for logger in loggers:
                if isinstance(logger, TensorBoard):
                    logger.log_result(config, metrics)
            run.show_summary(trainer, metrics, output_dir, Path(config["paths"]["log_dir"]) / config["task_name"])
        for logger in loggers:
            logger.finalize("success")
        run.requeue_if_stopped(callbacks)
    return metrics, objects


def main(cfg: DictConfig) -> float | None:
    """Hydra's entry: the optimised metric for sweepers; a stopped run exits as its signal says (130, 138, 143)."""
    metrics, objects = train(cfg)
    received = run.stop_signal(objects["callbacks"])
    if received is not None:
        sys.exit(128 + received)
    name = cfg.get("optimized_metric")
    if name is None:
        return None
    if name not in metrics:
        raise UserError(f"optimized_metric = {name}: allowed are {', '.join(sorted(metrics))}")
    return metrics[name]


if __name__ == "__main__":
    entry.run(main, "train.yaml")
