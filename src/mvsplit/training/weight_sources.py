"""Saved weights, wherever they are: in a run's checkpoint, in a converted file, or in a folder for a model hub."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from mvsplit import __version__
from mvsplit.training.checkpoint_format import Saved
from mvsplit.training.checkpoints import NETWORK, RAW, choose, latents_of, read_config, text_of
from mvsplit.training.hub_folder import HubFolder
from mvsplit.training.saved_config import parse_config, portable
from mvsplit.training.tensor_files import SafetensorsFile, Stored, TensorFile
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import MAX_REASON, parse_json
from mvsplit.utils.run_dirs import is_hub_folder


@dataclass
class Source:
    """Saved weights, of which only names, types and shapes have been read.

    Args:
        step: optimiser steps done.
        config: of the run, unchecked; perhaps only its portable part.
        latents: what the network's latents are, unchecked; None if it is trained on images, or by an earlier version.
        text: how its captions were encoded, unchecked; None for a network of classes.
        sizes: type and shape of each tensor, by the network's names.
        verify: compares checksums, if there are any.
        read: (name, type) → the tensor, in memory of its own; None for the type that is stored.
        data: what the data module recorded, unchecked; None if it is not known.
    """

    step: int
    config: dict[str, Any]
    latents: Any
    text: Any
    sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    verify: Callable[[], object]
    read: Callable[[str, torch.dtype | None], Tensor]
    data: Any = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.sizes.items()}

    @property
    def about(self) -> dict[str, str]:
        """What a file of these weights says of them."""
        about = {"mvsplit": __version__, "step": str(self.step), "config": yaml.safe_dump(portable(self.config))}
        records = {"latents": self.latents, "text": self.text}
        return about | {key: json.dumps(value) for key, value in records.items() if value is not None}


def open_source(path: Path, weights: str) -> Source:
    """The averaged (`ema`) or trained (`raw`) weights at a path.

    Raises:
        UserError: if there are none, or something is damaged.
    """
    if path.is_file():
        return _open_file(path, weights)
    return _open_hub(path, weights) if is_hub_folder(path) else _open_checkpoint(path, weights)


def open_sources(path: Path, weights: Sequence[str]) -> dict[str, Source]:
    """Likewise, by the prefix that their names have in a file."""
    return {RAW if which == "raw" else "": open_source(path, which) for which in weights}


def _open_checkpoint(path: Path, weights: str) -> Source:
    saved = Saved(path)
    chosen = choose(saved, weights)
    return Source(
        saved.step,
        read_config(saved),
        latents_of(saved),
        text_of(saved),
        {name: (found.dtypes[NETWORK + name], found.shapes[NETWORK + name]) for name, (_, found) in chosen.items()},
        verify=lambda: saved.verify(*{kind for kind, _ in chosen.values()}),
        read=lambda name, dtype: chosen[name][1].whole(NETWORK + name, dtype),
        data=saved.manifest.get("data"),
    )


def _open_file(path: Path, weights: str) -> Source:
    try:
        with path.open("rb") as raw:
            if raw.read(4) == b"PK\x03\x04":
                raise UserError(
                    f"ckpt_path = {path}: not a checkpoint of this project, but a file of torch.save; src/convert.py"
                    " release=… reads released weights"
                )
        file = SafetensorsFile(path)
        about = file.metadata
        if not about.keys() >= {"mvsplit", "step", "config"}:
            raise UserError(f"ckpt_path = {path}: not written by this project's src/convert.py")
        step = int(about["step"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"ckpt_path = {path}: damaged, or not a checkpoint of this project ({str(error)[:MAX_REASON]})"
        ) from None
    latents, text = (parse_json(about[key], str(path)) if key in about else None for key in ("latents", "text"))
    tensors = {name: (file, stored) for name, stored in file.tensors.items()}
    return _chosen(path, weights, step, parse_config(about["config"], str(path)), (latents, text), tensors)


def _open_hub(path: Path, weights: str) -> Source:
    folder = HubFolder(path)
    records = folder.about.get("latents"), folder.about.get("text")
    return _chosen(path, weights, folder.step, folder.config, records, folder.tensors)


def _chosen(
    path: Path,
    weights: str,
    step: int,
    config: dict[str, Any],
    records: tuple[Any, Any],
    tensors: Mapping[str, tuple[TensorFile, Stored]],
) -> Source:
    prefix = RAW if weights == "raw" else ""
    chosen = {name.removeprefix(RAW): place for name, place in tensors.items() if name.startswith(RAW) == bool(prefix)}
    if not chosen:
        other = "raw" if weights == "ema" else "ema"
        raise UserError(f"weights = {weights}: {path} does not contain them; use {other}")

    def read(name: str, dtype: torch.dtype | None) -> Tensor:
        file, stored = chosen[name]
        return file.read(stored, dtype)

    sizes = {name: (stored.dtype, stored.shape) for name, (_, stored) in chosen.items()}
    return Source(step, config, *records, sizes, verify=lambda: None, read=read)
