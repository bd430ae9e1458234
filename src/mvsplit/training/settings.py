"""The top-level keys of a training run's config, and checks across them. Does not import PyTorch itself."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mvsplit.utils.config import NOT_SUPPORTED, Seed, to_checked
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT

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
    optimized_direction: Literal["minimize", "maximize"] = field(default="minimize", kw_only=True)
    autoencoder: Group | None = field(default=None, kw_only=True)
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


def checked(cfg: DictConfig) -> Group:
    """The config of a run on this machine, as plain dicts.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    config = to_checked(cfg, TrainConfig)
    check_together(config)
    if HydraConfig.initialized():  # not when it is called from Python
        check_used(config, chosen_parts(HydraConfig.get()))
    check_machine(config)
    folder = config["data"].get("folder")
    if isinstance(folder, str) and "://" not in folder:
        config["data"]["folder"] = str(Path(folder).absolute())  # the run may be used from another folder
    return config


def check_together(config: Group) -> None:
    """Check values that must fit together.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    from mvsplit.training.strategies import allowed_precisions

    trainer, data = config["trainer"], config["data"]
    for group in ("callbacks", "logger"):
        for name, node in (config[group] or {}).items():
            if node is not None and not (isinstance(node, dict) and "_target_" in node):
                raise UserError(f"{group}.{name} = {node}: must be a group with a _target_, or null")
    if (guide := config["sampler"].get("guide")) is not None:
        raise UserError(f"sampler.guide = {guide}: only sample.py and eval.py load a guide; must be null in training")
    strategy, known = trainer.get("strategy", "auto"), ("auto", *StrategyRegistry.available_strategies())
    if isinstance(strategy, str) and strategy not in known:
        raise UserError(f"trainer.strategy = {strategy}: no such strategy; choose trainer=ddp, fsdp or deepspeed")
    for key, other in NOT_SUPPORTED.items():
        value = trainer.get(key.removeprefix("trainer."))
        if value is not None:
            raise UserError(f"{key} = {value}: not supported, since runs are counted in optimiser steps; use {other}")
    if "max_steps" not in trainer:
        raise UserError("trainer.max_steps: missing; runs are counted in optimiser steps")
    precision, allowed = trainer.get("precision"), allowed_precisions(trainer.get("strategy", "auto"))
    if precision is not None and precision not in allowed:
        raise UserError(f"trainer.precision = {precision}: must be one of {', '.join(allowed)} with this strategy")
    accumulate = trainer.get("accumulate_grad_batches", 1)
    if trainer.get("val_check_interval", accumulate) % accumulate:
        raise UserError(
            f"trainer.val_check_interval = {trainer['val_check_interval']}: counts micro-batches and must be"
            f" divisible by accumulate_grad_batches = {accumulate}"
        )
    devices = trainer.get("devices", 1)
    if isinstance(devices, int) and devices > 0 and "batch_size" in data:
        share = devices * trainer.get("num_nodes", 1) * accumulate
        if data["batch_size"] % share:
            raise UserError(
                f"data.batch_size = {data['batch_size']}: must be divisible by devices × num_nodes ×"
                f" accumulate_grad_batches = {share}"
            )
    if config["extras"]["enforce_tags"] and not config["tags"]:
        raise UserError("tags = []: extras.enforce_tags requires at least one, e.g. tags=[dev]")
    check_optimizer(config)


def check_optimizer(config: Group) -> None:
    """Check that the trainer can do what the optimiser needs.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    trainer, optim = config["trainer"], config["optim"]
    strategy, precision = trainer.get("strategy", "auto"), trainer.get("precision")
    kind = str(strategy["_target_"] if isinstance(strategy, dict) else strategy).rpartition(".")[2]
    muon, moments = optim["_target_"].endswith(".Muon"), optim.get("moments", "float32")
    if kind not in ("auto", "DDPStrategy") and not kind.startswith("ddp"):
        if muon:
            raise UserError("optim = muon: needs whole matrices, which no process has; use trainer=ddp or optim=paper")
        if moments != "float32":
            raise UserError(
                f"optim.moments = {moments}: needs whole parameters, which no process has; use trainer=ddp or"
                " optim.moments=float32"
            )
    if muon and precision == "bf16-true":
        raise UserError("optim = muon: would round its steps off bfloat16 weights; use trainer.precision=bf16-mixed")
    if moments != "float32" and precision == "64-true":
        raise UserError(f"optim.moments = {moments}: steps are computed in float32; use trainer.precision=32-true")
    if optim.get("in_backward"):
        _check_in_backward(trainer, config["callbacks"] or {}, alone=kind == "auto")


def _check_in_backward(trainer: Group, callbacks: Group, alone: bool) -> None:
    """Raise `UserError` for what must see the whole gradient before a step is taken."""
    monitor: Group = next(
        (node for node in callbacks.values() if node and node["_target_"].endswith(".StepMonitor")), {}
    )
    clip, accumulate = trainer.get("gradient_clip_val"), trainer.get("accumulate_grad_batches", 1)
    guard = (monitor.get("guard") or {}).get("action", "warn")
    processes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    contradictions = {
        "only one process can take its steps there; use trainer=gpu or trainer=cpu": not alone or processes != (1, 1),
        f"trainer.gradient_clip_val = {clip} needs the whole gradient first; use null": clip,
        f"trainer.accumulate_grad_batches = {accumulate} adds up gradients first; use 1": accumulate != 1,
        "callbacks.monitor.probe measures gradients after the backward pass; use null": monitor.get("probe"),
        f"callbacks.monitor.guard.action = {guard} would come too late; use warn": guard != "warn",
    }
    for why, found in contradictions.items():
        if found:
            raise UserError(f"optim.in_backward = true: {why}")


PARTS = {"residual": "model", "flow": "module", "sampler": "module"}
"""Groups that not every network or task uses, and the group whose choice decides. Their defaults are always present."""


def check_used(config: Group, chosen: Iterable[str]) -> None:
    """Check that what was chosen is part of the module that is trained.

    Args:
        config: of the run.
        chosen: overrides; only those of `PARTS` count.

    Raises:
        UserError: e.g. if the network takes no residual.
    """
    for override in chosen:
        key, _, value = override.lstrip("+").partition("=")
        part = key.partition(".")[0]
        if part in PARTS and not _holds(config["module"], config[part]):
            kind = config[PARTS[part]]["_target_"].rpartition(".")[2]
            raise UserError(f"{key} = {value}: {PARTS[part]} {kind} takes no {part}")


def _holds(node: Any, part: Any) -> bool:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return node == part or any(_holds(child, part) for child in children)


def chosen_parts(hydra: Any) -> list[str]:
    """The overrides of `PARTS` in a command, including an experiment's choices if they are not the defaults.

    Args:
        hydra: Hydra's own node.
    """
    defaults = yaml.safe_load((PROJECT_ROOT / "configs" / "train.yaml").read_text())["defaults"]
    given = [str(override) for override in hydra.overrides.task if override.lstrip("+").startswith(tuple(PARTS))]
    choices = {part: hydra.runtime.choices.get(part) for part in PARTS}
    other = [part for part, choice in choices.items() if choice is not None and {part: choice} not in defaults]
    return [*given, *(f"{part}={choices[part]}" for part in other)]


def check_machine(config: Group) -> None:
    """Check that this machine has what the config needs.

    Raises:
        UserError: if a GPU or a checkpoint is missing.
    """
    ckpt_path = config["ckpt_path"]
    if ckpt_path not in (None, "last") and not Path(ckpt_path).exists():
        raise UserError(f"ckpt_path = {ckpt_path}: no such file or folder")
    import torch  # here, as above: importing this module stays fast

    accelerator = config["trainer"].get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator = {accelerator}: this machine has no usable GPU; use cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator = mps: this machine has no Apple GPU; use cpu")
