"""What surrounds a training run: its folder, the checkpoint it resumes from, and the summary at its end.

Callbacks take part by what they offer, whatever their class:

- `summary()`: lines for the end of the run; loggers may have it too.
- `received`: the signal that stopped the run, or None; `requeue(signal)` is called after it.
- A callback that is a context manager is entered around everything the trainer does.
"""

import secrets
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from mvsplit.training.checkpoint_format import Saved, newest
from mvsplit.training.checkpoints import read_config
from mvsplit.training.settings import Group
from mvsplit.utils import locks
from mvsplit.utils.config import to_yaml
from mvsplit.utils.console import info, show_table
from mvsplit.utils.devices import on_gpus
from mvsplit.utils.errors import UserError


@contextmanager
def opened(config: Group) -> Iterator[Path | None]:
    """Lock the run's folder. Yields the verified checkpoint to resume from, None for a new run.

    Raises:
        UserError: if another process is training there, or if the checkpoint is missing or damaged.
    """
    output_dir = Path(config["paths"]["output_dir"])
    _log_machine(config)
    if config["extras"]["ignore_warnings"]:
        warnings.filterwarnings("ignore")
    if config["extras"]["print_config"]:
        rank_zero_only(info)(to_yaml(config))
    with locked(output_dir):
        yield _prepare_resume(config, output_dir)


def run(objects: dict[str, Any], ckpt_path: Path | None) -> dict[str, float]:
    """Train and test the objects of `train.assemble` as the config says, and log the summary. Returns the metrics.

    Raises:
        UserError: if the run only tests and has no checkpoint, and for anything else that the user can fix.
    """
    config, callbacks, loggers = objects["config"], objects["callbacks"], objects["loggers"]
    trainer, module, data = objects["trainer"], objects["module"], objects["datamodule"]
    save_config(config, Path(config["paths"]["output_dir"]))
    for logger in loggers if trainer.is_global_zero else ():
        logger.log_hyperparams(config)
    metrics: dict[str, float] = {}
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, AbstractContextManager):
                stack.enter_context(callback)
        if config["train"]:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
            metrics |= _plain_metrics(trainer)
        if config["test"] and not stop_signal(callbacks):
            if not config["train"] and ckpt_path is None:
                raise UserError("test = true: without training, ckpt_path must name the checkpoint to test")
            # After training, the network has the final weights already.
            tested = None if config["train"] else ckpt_path
            trainer.test(module, datamodule=data, ckpt_path=tested, verbose=False, weights_only=True)
            metrics |= _plain_metrics(trainer)
            if not config["train"]:
                _show_metrics("tested", metrics)
        if config["train"] and not stop_signal(callbacks):
            for logger in loggers:
                if hasattr(logger, "log_finished"):
                    logger.log_finished()
            _show_summary(objects, metrics)
        for logger in loggers:
            logger.finalize("success")
        for callback in callbacks:  # SLURM may kill the job from here on
            if getattr(callback, "received", None) is not None:
                callback.requeue(callback.received)
    return metrics


def stop_signal(callbacks: Sequence[Any]) -> signal.Signals | None:
    """The signal that stopped the run, if any."""
    return next((c.received for c in callbacks if getattr(c, "received", None) is not None), None)


def exit_if_stopped(callbacks: Sequence[Any]) -> None:
    """Exit with 128 + the signal that stopped the run (130, 138, 143), if any."""
    received = stop_signal(callbacks)
    if received is not None:
        sys.exit(128 + received)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which is created if it is missing.

    Raises:
        UserError: if another process is training there.
    """
    if rank_zero_only.rank != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locks.locked(folder / ".lock") as free:
        if not free:
            raise UserError(f"{folder}: another process is training in this folder")
        yield


@rank_zero_only
def save_config(config: Group, output_dir: Path) -> None:
    """Write the resolved config into the run's folder, where sampling and evaluation read it."""
    partial = output_dir / f"config.yaml.{secrets.token_hex(3)}"
    partial.write_text(to_yaml(config))
    partial.replace(output_dir / "config.yaml")


@rank_zero_only
def _log_machine(config: Group) -> None:
    trainer = config["trainer"]
    devices, machines, accelerator = trainer["devices"], trainer["num_nodes"], trainer["accelerator"]
    count = len(devices) if isinstance(devices, list) else devices
    if count == 1 and machines == 1:
        return
    kind = "GPUs" if on_gpus(accelerator) else "CPU processes"
    why = " (no GPU found)" if accelerator == "auto" and not on_gpus(accelerator) else ""
    machine = f" on each of {machines} machines" if machines > 1 else ""
    info(f"running on       {count} {kind}{machine}{why}, precision {trainer['precision']}")


def _prepare_resume(config: Group, output_dir: Path) -> Path | None:
    ckpt_path = config["ckpt_path"]
    if ckpt_path is None:
        return None
    first = rank_zero_only.rank == 0  # verifies every byte, and chooses for all ranks: see `read_checkpoint`
    if ckpt_path == "last":
        path = newest(output_dir / "checkpoints", verify=first)
        if path is None:
            rank_zero_only(info)("ckpt_path=last: no earlier run of this command found; starting a new one")
            return None
        saved = Saved(path)
    else:
        saved = Saved(Path(ckpt_path))
        if first:
            saved.verify()
    path, step = saved.path, saved.step
    rank_zero_only(info)(f"resuming from step {step} of {path}")
    _log_other_end(config, saved)
    end = config["trainer"]["max_steps"]
    if config["train"] and step >= end:
        rank_zero_only(info)(f"nothing left to train: trainer.max_steps = {end} is reached; a higher value extends it")
    for logger in (config["logger"] or {}).values():
        if logger and logger["_target_"].startswith("mvsplit.utils.loggers."):
            logger["purge_step"] = step  # else steps that a killed run logged after this checkpoint appear twice
    return path


@rank_zero_only
def _log_other_end(config: Group, saved: Saved) -> None:
    """One line if the run now ends at another step: that changes a cosine schedule."""
    try:
        before, now = read_config(saved)["trainer"]["max_steps"], config["trainer"]["max_steps"]
    except (UserError, KeyError, TypeError):
        return
    optim = config["optim"]
    if before != now:
        follows = optim.get("schedule") == "cosine" and optim.get("decay_steps") is None
        schedule = f"; the cosine schedule now ends there; optim.decay_steps={before} keeps its old end"
        info(f"trainer.max_steps = {now}, was {before}{schedule if follows else ''}")


def _plain_metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@rank_zero_only
def _show_metrics(title: str, metrics: dict[str, float]) -> None:
    show_table(title, {name: f"{value:.4g}" for name, value in sorted(metrics.items()) if "loss_t_" not in name})


@rank_zero_only
def _show_summary(objects: dict[str, Any], metrics: dict[str, float]) -> None:
    _show_metrics("run finished", metrics)
    _show_faults(objects["datamodule"])
    lines = [line for part in objects["callbacks"] if hasattr(part, "summary") for line in part.summary()]
    lines.append(f"run folder       {objects['config']['paths']['output_dir']}")
    lines += [line for part in objects["loggers"] if hasattr(part, "summary") for line in part.summary()]
    for line in lines:
        info(line)


def _show_faults(data: Any) -> None:
    counts = data.counts
    rows = {f"{name}: {kind}": str(n) for name in counts for kind, n in sorted(counts[name].counts.items())}
    if data.left_out:
        rows["train: left out when indexed"] = f"about {data.left_out}"
    if rows:
        info(f"data faults among {counts['train'].samples} samples read in training")
        show_table("data faults", rows)
