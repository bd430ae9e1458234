"""Read checkpoints: only tensors and plain containers are ever loaded, never code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from mvsplit.utils.config import build, check_config
from mvsplit.utils.errors import UserError

MARK = "mvsplit"
"""Key that says the checkpoint is ours; its value is the version that wrote it."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors mapped from the file.

    Raises:
        UserError: if the file is missing, damaged, or not one of ours.
    """
    if path.is_dir():
        raise UserError(
            f"ckpt_path = {path}: a sharded checkpoint can be resumed, but not read by one process; give another"
        )
    if not path.is_file():
        raise UserError(f"ckpt_path = {path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save wrote
            if (record := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{record} fails its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"ckpt_path = {path}: damaged, or not a checkpoint of tensors ({reason})") from None
    needed = {MARK, "global_step", "state_dict", "callbacks", "loops"}
    if not isinstance(content, dict) or not content.keys() >= needed or not isinstance(content["global_step"], int):
        raise UserError(f"ckpt_path = {path}: not a checkpoint of this project")
    return content


def check_fits(state: dict[str, Tensor], network: dict[str, Tensor]) -> None:
    """Check that saved weights fit the network.

    Raises:
        UserError: naming the first parameter that does not.
    """
    for name in sorted(state.keys() | network.keys()):
        if name not in state or name not in network:
            where = "the checkpoint" if name not in state else "the network of this config"
            raise UserError(f"ckpt_path: the checkpoint belongs to another network; {where} has no '{name}'")
        if state[name].shape != network[name].shape:
            raise UserError(
                f"ckpt_path: the checkpoint belongs to another network; '{name}' is {tuple(state[name].shape)} there"
                f" and {tuple(network[name].shape)} here"
            )


def set_micro_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let the trainer's count of micro-batches follow from the optimiser steps done.

    It is saved as it was with the accumulation of then; with another one the trainer would step and validate at the
    wrong micro-batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for key in counts:
            counts[key] = checkpoint["global_step"] * accumulate


class SavedRun:
    """A trained network with the config it was trained by.

    Args:
        path: a checkpoint inside a run folder, whose `config.yaml` is read and checked like any other config.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        schema: of the run's config.

    Attributes:
        config: plain dict. network: on the CPU, in eval mode. step: optimiser steps done.

    Raises:
        UserError: if something is missing, damaged or does not fit.
    """

    def __init__(self, path: Path, weights: Literal["ema", "raw"], schema: type) -> None:
        content = read_checkpoint(path)
        self.run = path.parent.parent
        file = self.run / "config.yaml"
        if not file.is_file():
            raise UserError(f"ckpt_path = {path}: {file} is missing; the checkpoint must lie in its run folder")
        try:
            config = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{file}: not the config of a run")
        self.config: dict[str, Any] = config
        check_config(self.config, schema)
        self.step: int = content["global_step"]
        network: nn.Module = build(self.config["model"])()
        state = {k.removeprefix("network."): v for k, v in content["state_dict"].items() if k.startswith("network.")}
        if weights == "ema":
            shadows = [c["shadow"] for c in content["callbacks"].values() if isinstance(c, dict) and "shadow" in c]
            if not shadows:
                raise UserError(f"weights = ema: {path} holds no averaged weights; allowed is raw")
            state |= shadows[0]
        check_fits(state, network.state_dict())
        network.load_state_dict(state)
        self.network: Any = network.eval()
