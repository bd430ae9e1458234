"""Settings of a run: the top-level keys of its config, what must fit together, and what is told at its end."""

import fcntl
import secrets
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from mvsplit.callbacks.last_checkpoint import LastCheckpoint
from mvsplit.callbacks.rank_watch import RankWatch
from mvsplit.callbacks.sample_grid import SampleGrid
from mvsplit.training.folder import Saved, newest
from mvsplit.training.strategies import allowed_precisions
from mvsplit.utils.config import check_value
from mvsplit.utils.console import say, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.loggers import TensorBoard
from mvsplit.utils.rng import Seed
from mvsplit.utils.runs import on_gpus

Group = dict[str, Any]


@dataclass
class Extras:
    """Keys of the group `extras`."""

    ignore_warnings: bool
    enforce_tags: bool
    print_config: bool


@dataclass
class Paths:
    """Keys of the group `paths`."""

    root_dir: str
    data_dir: str
    log_dir: str
    output_dir: str


TRAINER_LIMITS: dict[str, Any] = {
    "max_steps": PositiveInt,
    "devices": PositiveInt | list[NonNegativeInt] | Literal["auto"],
    "num_nodes": PositiveInt,
    "accumulate_grad_batches": PositiveInt,
    "val_check_interval": PositiveInt,
    "log_every_n_steps": PositiveInt,
    "gradient_clip_val": NonNegativeFloat | None,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": Literal[False],
}
"""Where we are stricter than Lightning's own types."""


@dataclass
class TrainConfig:
    """Top-level keys of `train.yaml`; the groups are checked against the classes they name."""

    task_name: str
    tags: list[str]
    train: bool
    test: bool
    ckpt_path: str | None
    seed: Seed
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
    extras: Extras
    paths: Paths


def check_together(config: Group) -> None:
    """Check what no single class can see.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    trainer, data = config["trainer"], config["data"]
    instead = {"max_epochs": "trainer.max_steps", "limit_train_batches": "trainer.max_steps"}
    for key, other in (instead | {"overfit_batches": "data.overfit_samples"}).items():
        if trainer.get(key) is not None:
            raise UserError(f"trainer.{key} = {trainer[key]}: not supported, use {other}")
    if "max_steps" not in trainer:
        raise UserError("trainer.max_steps: missing, runs are counted in optimiser steps")
    for key, hint in TRAINER_LIMITS.items():
        if key in trainer:
            check_value(f"trainer.{key}", trainer[key], hint)
    precision, allowed = trainer.get("precision"), allowed_precisions(trainer.get("strategy", "auto"))
    if precision is not None and precision not in allowed:
        raise UserError(f"trainer.precision = {precision}: allowed with this strategy are {', '.join(allowed)}")
    accumulate = trainer.get("accumulate_grad_batches", 1)
    if trainer.get("val_check_interval", accumulate) % accumulate:
        raise UserError(
            f"trainer.val_check_interval = {trainer['val_check_interval']}: micro-batches, must be divisible by"
            f" accumulate_grad_batches = {accumulate}"
        )
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


@rank_zero_only
def say_machine(config: Group) -> None:
    """What the run uses of this machine, if it was left to us or is more than one process: one line."""
    trainer = config["trainer"]
    devices, machines, accelerator = trainer["devices"], trainer["num_nodes"], trainer["accelerator"]
    count = len(devices) if isinstance(devices, list) else devices
    if count == 1 and machines == 1:
        return
    kind = "GPUs" if on_gpus(accelerator) else "CPU processes"
    why = " (no GPU found)" if accelerator == "auto" and not on_gpus(accelerator) else ""
    machine = f" on each of {machines} machines" if machines > 1 else ""
    say(f"running on       {count} {kind}{machine}{why}, precision {trainer['precision']}")


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
    first = rank_zero_only.rank == 0  # looks at every byte, and decides for all: see `read_checkpoint`
    if ckpt_path == "last":
        path = newest(output_dir / "checkpoints", verify=first)
        if path is None:
            rank_zero_only(say)("ckpt_path=last: this command has no earlier run to go on with; a new one begins")
            return None
        saved = Saved(path)
    else:
        saved = Saved(Path(ckpt_path))
        if first:
            saved.verify()
    path, step = saved.path, saved.step
    rank_zero_only(say)(f"going on from step {step} of {path}")
    for logger in (config["logger"] or {}).values():
        if logger and logger["_target_"].endswith(".TensorBoard"):
            logger["purge_step"] = step  # what a killed run logged after this checkpoint is drawn once
    return path


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keep other processes out of this run's folder.

    Raises:
        UserError: if another one is training there already.
    """
    if rank_zero_only.rank != 0:
        yield
        return
    with (output_dir / ".lock").open("w") as file:  # released with the process, however it ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{output_dir}: another process is training in this folder") from None
        yield


@contextmanager
def watched(callbacks: list[Any]) -> Iterator[None]:
    """While the trainer works, see to it that all ranks end when one does, if such a callback is there."""
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, RankWatch):
                stack.enter_context(callback)
        yield


def show_faults(trainer: Trainer) -> None:
    """What was wrong with the data, by kind, if anything was."""
    data: Any = trainer.datamodule
    counts = data.counts
    rows = {f"{name}: {kind}": str(n) for name in counts for kind, n in sorted(counts[name].counts.items())}
    if data.left_out:
        rows["train: left out when indexed"] = f"about {data.left_out}"
    if rows:
        say(f"data faults, among {counts['train'].samples} samples read in training")
        show_table("data faults", rows)


def plain_metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def stop_signal(callbacks: list[Any]) -> signal.Signals | None:
    """The signal that stopped the run, if one did."""
    return next((c.received for c in callbacks if isinstance(c, LastCheckpoint) and c.received), None)


def requeue_if_stopped(callbacks: list[Any]) -> None:
    """After a signal, put the SLURM job into the queue again if that is asked for: it may be killed from here on."""
    for callback in callbacks:
        if isinstance(callback, LastCheckpoint) and callback.received is not None:
            callback.requeue(callback.received)


@rank_zero_only
def save_config(config: Group, output_dir: Path) -> None:
    """Write the resolved config beside the run's results, where sampling and evaluation find it."""
    partial = output_dir / f"config.yaml.{secrets.token_hex(3)}"
    partial.write_text(to_yaml(config))
    partial.replace(output_dir / "config.yaml")


@rank_zero_only
def show_metrics(title: str, metrics: dict[str, float]) -> None:
    """A table of them, but for those by time."""
    show_table(title, {name: f"{value:.4g}" for name, value in sorted(metrics.items()) if "loss_t_" not in name})


@rank_zero_only
def show_summary(trainer: Trainer, metrics: dict[str, float], output_dir: Path, log_dir: Path) -> None:
    """The table at the end of a run: metrics, where everything is, and the command that shows the log."""
    show_metrics("run finished", metrics)
    show_faults(trainer)
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
