"""Settings of a run: the top-level keys of its config, what must fit together, and what is told at its end."""

import secrets
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from pydantic import NonNegativeInt

from mvsplit.callbacks.last_checkpoint import LastCheckpoint
from mvsplit.callbacks.sample_grid import SampleGrid
from mvsplit.training.checkpoints import read_checkpoint
from mvsplit.utils.console import say, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.loggers import TensorBoard
from mvsplit.utils.runs import last_checkpoint

Group = dict[str, Any]


@dataclass
class TrainConfig:
    """Top-level keys of `train.yaml`; the groups are checked against the classes they name."""

    task_name: str
    tags: list[str]
    train: bool
    test: bool
    ckpt_path: str | None
    seed: NonNegativeInt
    optimized_metric: str | None
    data: Group
    residual: Group
    model: Group
    flow: Group
    sampler: Group
    optim: Group
    module: Group
    trainer: Group
    callbacks: Group | None
    logger: Group | None
    extras: Group
    paths: Group


def check_together(config: Group) -> None:
    """Check what no single class can see.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    trainer, data = config["trainer"], config["data"]
    for key, instead in (("max_epochs", "trainer.max_steps"), ("overfit_batches", "data.overfit_samples")):
        if trainer.get(key):
            raise UserError(f"trainer.{key} = {trainer[key]}: not supported, use {instead}")
    steps = trainer.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"trainer.max_steps = {steps}: must be an integer greater than 0")
    accumulate = trainer.get("accumulate_grad_batches", 1)
    devices = trainer.get("devices", 1)
    if isinstance(devices, int) and devices > 0 and "batch_size" in data:
        share = devices * trainer.get("num_nodes", 1) * accumulate
        if data["batch_size"] % share:
            raise UserError(
                f"data.batch_size = {data['batch_size']}: must be divisible by devices × num_nodes ×"
                f" accumulate_grad_batches = {share}"
            )


def check_machine(config: Group) -> None:
    """Check that this machine has what the config asks for.

    Raises:
        UserError: if it asks for a GPU and there is none.
    """
    accelerator = config["trainer"].get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator = {accelerator}: this machine has no usable GPU; allowed here is cpu")


def apply_extras(config: Group) -> None:
    """The conveniences of the group `extras`.

    Raises:
        UserError: if tags are enforced and there are none.
    """
    extras = config["extras"]
    if extras["ignore_warnings"]:
        warnings.filterwarnings("ignore")
    if extras["enforce_tags"] and not config["tags"]:
        raise UserError("tags = []: extras.enforce_tags asks for at least one, e.g. tags=[dev]")
    if extras["print_config"]:
        rank_zero_only(say)(to_yaml(config))


def to_yaml(config: Group) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def prepare_resume(config: Group, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, if any, checked; `ckpt_path=last` means the same command's own newest run.

    Raises:
        UserError: if the checkpoint is missing, damaged or not one of ours.
    """
    ckpt_path = config["ckpt_path"]
    if ckpt_path is None:
        return None
    path = last_checkpoint(output_dir) if ckpt_path == "last" else Path(ckpt_path)
    if ckpt_path == "last" and not path.exists():
        rank_zero_only(say)("ckpt_path=last: this command has no earlier run to go on with; a new one begins")
        return None
    if path.is_dir():
        return path.resolve()  # sharded: the strategy reads and checks it
    step = read_checkpoint(path)["global_step"]
    rank_zero_only(say)(f"going on from step {step} of {path}")
    for logger in (config["logger"] or {}).values():
        if logger and logger["_target_"].endswith(".TensorBoard"):
            logger["purge_step"] = step  # what a killed run logged after this checkpoint is drawn once
    return path.resolve()


def plain_metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def stop_signal(callbacks: list[Any]) -> signal.Signals | None:
    """The signal that stopped the run, if one did."""
    return next((c.received for c in callbacks if isinstance(c, LastCheckpoint) and c.received), None)


@rank_zero_only
def save_config(config: Group, output_dir: Path) -> None:
    """Write the resolved config beside the run's results, where sampling and evaluation find it."""
    partial = output_dir / f"config.yaml.{secrets.token_hex(3)}"
    partial.write_text(to_yaml(config))
    partial.replace(output_dir / "config.yaml")


@rank_zero_only
def show_summary(trainer: Trainer, metrics: dict[str, float], output_dir: Path, log_dir: Path) -> None:
    """The table at the end of a run: metrics, where everything is, and the command that shows the log."""
    rows = {name: f"{value:.4g}" for name, value in sorted(metrics.items()) if "loss_t_" not in name}
    show_table("run finished", rows)
    for callback in trainer.callbacks:
        if isinstance(callback, LastCheckpoint) and (callback.folder / "last.ckpt").exists():
            say(f"last checkpoint  {callback.folder / 'last.ckpt'}")
        elif getattr(callback, "best_model_path", ""):
            say(f"best checkpoint  {callback.best_model_path}")
        elif isinstance(callback, SampleGrid) and callback.latest:
            say(f"pictures         {callback.latest}")
    say(f"run folder       {output_dir}")
    if any(isinstance(logger, TensorBoard) for logger in trainer.loggers):
        say(f"watch            tensorboard --logdir {log_dir}")
