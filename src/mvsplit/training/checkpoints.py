"""Uses of a checkpoint (format: `checkpoint_format.py`): fit it to a network, choose weights from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mvsplit.training.checkpoint_format import Saved, Tensors, is_checkpoint_in
from mvsplit.training.saved_config import parse_config
from mvsplit.utils.console import info
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import read_small

NETWORK = "network."
"""Prefix of the network's weights in a checkpoint, which holds those of the whole module."""
RAW = "raw."
"""Prefix of the trained weights in a converted file."""


def check_fits(saved: Mapping[str, Sequence[int]], network: Mapping[str, Sequence[int]]) -> None:
    """Check that the shapes of saved weights match the network's.

    Raises:
        UserError: naming the first parameter that does not match.
    """
    for name in sorted(saved.keys() | network.keys()):
        if name not in saved or name not in network:
            where = "the checkpoint" if name not in saved else "the network of this config"
            raise UserError(f"ckpt_path: the checkpoint belongs to another network; {where} has no {name[:100]!r}")
        if tuple(saved[name]) != tuple(network[name]):
            raise UserError(
                f"ckpt_path: the checkpoint belongs to another network; {name[:100]!r} has shape"
                f" {tuple(saved[name])} there and {tuple(network[name])} here"
            )


def set_micro_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Derive the trainer's count of micro-batches, and the step that it logs at, from the optimiser steps done.

    The saved count belongs to the accumulation of the saved run; with another one the trainer would step and validate
    at the wrong micro-batches. The step is saved before it is incremented.
    """
    loops, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    progress = loops["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for key in counts:
            counts[key] = step * accumulate


def keep_own_checkpoints(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Drop the saved state of a Lightning `ModelCheckpoint` that names anything but checkpoints of this run's folder.

    A state can name any folder. Lightning removes those that are no longer among the best, and reports the best.
    """
    states: dict[str, Any] = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:
        if not isinstance(callback, ModelCheckpoint) or not isinstance(state := states.get(callback.state_key), dict):
            continue
        scores = state.get("best_k_models") or {}
        paths = [*scores, *(state.get(f"{kind}_model_path") or "" for kind in ("best", "kth_best", "last"))]
        own = all(not path or is_checkpoint_in(Path(path), Path(callback.dirpath or "")) for path in paths)
        own = own and all(isinstance(score, Tensor) and score.numel() == 1 for score in scores.values())
        # The first process decides: if two saw different files, one would save and wait for the other for ever.
        if trainer.strategy.broadcast(own):
            state["dirpath"] = callback.dirpath
        else:
            del states[callback.state_key]
            about = ", ".join(dict.fromkeys(str(path) for path in paths if path))[:200]
            rank_zero_only(info)(f"ignored these saved paths, not all of them checkpoints of this run: {about}")


def choose(saved: Saved, weights: str) -> dict[str, tuple[str, Tensors]]:
    """Where the averaged or the trained weights are stored: the network's name → kind, and the tensors of that kind.

    Buffers and frozen weights have no average.
    """
    chosen: dict[str, tuple[str, Tensors]] = {}
    for kind in weight_kinds(saved, weights):
        tensors = saved.tensors(kind)
        chosen |= {name.removeprefix(NETWORK): (kind, tensors) for name in tensors if name.startswith(NETWORK)}
    return chosen


def weight_kinds(saved: Saved, weights: str) -> list[str]:
    """Kinds of tensors to read for the averaged or the trained weights; later ones replace earlier ones."""
    if weights == "ema" and not len(saved.tensors("ema")):
        raise UserError(f"weights = ema: {saved.path} contains no averaged weights; use raw")
    return ["weights", "ema"] if weights == "ema" else ["weights"]


def read_config(saved: Saved) -> dict[str, Any]:
    """The config in the run folder that contains the checkpoint, unchecked."""
    file = saved.path.parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"ckpt_path = {saved.path}: {file} is missing; the checkpoint must be in its run folder")
    return parse_config(read_small(file), str(file))


def latents_of(saved: Saved) -> Any:
    """What the data module recorded of the set's latents, unchecked; None for images."""
    data = saved.manifest.get("data")
    return data.get("latents") if isinstance(data, dict) else None


def text_of(saved: Saved) -> Any:
    """What the data module recorded of the captions' encoder, unchecked; None for a network of classes."""
    data = saved.manifest.get("data")
    return data.get("text") if isinstance(data, dict) else None
