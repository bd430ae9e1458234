"""A folder for a model hub: weights in safetensors files, what they are in JSON, and a model card.

    config.json                       version, step, the portable part of the run's config, latents, text
    model.safetensors                 the weights; or, if they are large:
    model-00001-of-00012.safetensors  … parts of them, and
    model.safetensors.index.json      the file of each tensor
    README.md                         the model card

It is written under another name and renamed when it is complete. One from elsewhere is only read, and only these files.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mvsplit import __version__
from mvsplit.training.checkpoint_writer import write_safetensors
from mvsplit.training.saved_config import portable
from mvsplit.training.tensor_files import SafetensorsFile, Stored
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import MAX_REASON, parse_json, read_small
from mvsplit.utils.locks import sole_writer
from mvsplit.utils.run_dirs import HUB_CONFIG

WHOLE, INDEX, CARD = "model.safetensors", "model.safetensors.index.json", "README.md"
PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MAX_PARTS = 1000
"""Files of weights in a folder."""
Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class HubFolder:
    """A folder to read from, unchecked beyond the place of its tensors.

    Attributes:
        about: the content of `config.json`.
        step: optimiser steps done.
        config: the portable part of the run's config, unchecked.
        tensors: file and place of each tensor, by name.

    Raises:
        UserError: if a file is missing or damaged, or the index does not describe the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        about = parse_json(read_small(path / HUB_CONFIG), str(path / HUB_CONFIG))
        config = about.get("config") if isinstance(about, dict) else None
        if not isinstance(config, dict) or "mvsplit" not in about or not _is_step(about.get("step")):
            raise UserError(f"ckpt_path = {path}: {HUB_CONFIG} was not written by this project's src/convert.py")
        self.about, self.step, self.config = about, about["step"], portable(config)
        self.tensors: dict[str, tuple[SafetensorsFile, Stored]] = {}
        names = self._names()
        for name in dict.fromkeys([WHOLE] if names is None else names.values()):
            file = self._open(name)
            if names is not None and {key for key, where in names.items() if where == name} != file.tensors.keys():
                raise UserError(f"ckpt_path = {path}: {INDEX} lists other tensors of {name} than it contains")
            self.tensors |= {key: (file, stored) for key, stored in file.tensors.items()}

    def _names(self) -> dict[str, str] | None:
        """The file of each tensor; None if one file has all."""
        index = self.path / INDEX
        if not index.exists():
            return None
        content = parse_json(read_small(index), str(index))
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names:
            raise UserError(f"ckpt_path = {self.path}: {INDEX} has no `weight_map`")
        for name in names.values():
            if not isinstance(name, str) or not PART.fullmatch(name):
                raise UserError(
                    f"ckpt_path = {self.path}: {INDEX} names the file {str(name)[:100]!r}; must be like"
                    " model-00001-of-00012.safetensors"
                )
        if len(set(names.values())) > MAX_PARTS:
            raise UserError(f"ckpt_path = {self.path}: {INDEX} names more than {MAX_PARTS} files")
        return names

    def _open(self, name: str) -> SafetensorsFile:
        try:
            return SafetensorsFile(self.path / name)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"ckpt_path = {self.path}: {name} is missing or damaged ({str(error)[:MAX_REASON]})"
            ) from None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def write_hub_folder(
    output: Path, sizes: Sizes, values: Iterator[Tensor], about: dict[str, Any], metadata: dict[str, str],
    card: str, part_bytes: float,
) -> None:  # fmt: skip
    """Write a folder, whole or not at all.

    Args:
        output: the new folder.
        sizes: type and shape of every tensor.
        values: the tensors, in that order.
        about: step, config, latents, text: for `config.json`.
        metadata: of a single file of weights.
        card: the model card.
        part_bytes: largest size of a file of weights, unless a single tensor is larger.

    Raises:
        UserError: if the folder exists and is not empty, its parent does not exist, or another process is writing it.
    """
    check_hub_output(output)
    with sole_writer(output):
        check_hub_output(output)  # again: another process may just have finished
        _write(output, sizes, values, about, metadata, card, part_bytes)


def check_hub_output(output: Path) -> None:
    """Raises `UserError` if this cannot be a new folder."""
    if output.name in ("", ".."):
        raise UserError(f"output = {output}: must be the name of a new folder")
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"output = {output}: exists; must be a new folder")
    if not output.parent.is_dir():
        raise UserError(f"output = {output}: the folder that is to contain it does not exist")


def _write(
    output: Path, sizes: Sizes, values: Iterator[Tensor], about: dict[str, Any], metadata: dict[str, str],
    card: str, part_bytes: float,
) -> None:  # fmt: skip
    partial = output.with_name(output.name + ".partial")
    _remove_unfinished(partial)
    partial.mkdir()
    try:
        parts = _parts(sizes, part_bytes)
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        names = names if len(parts) > 1 else [WHOLE]
        for name, part in zip(names, parts, strict=True):
            header = metadata if len(parts) == 1 else {}
            write_safetensors(partial / name, part, islice(values, len(part)), header | {"format": "pt"})
        next(values, None)  # ends its progress bar
        if len(parts) > 1:
            index = {
                "metadata": {"total_size": sum(map(_bytes, sizes.values()))},
                "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
            }
            (partial / INDEX).write_text(json.dumps(index, indent=1))
        config = {"library_name": "mvsplit", "mvsplit": __version__, **about}
        (partial / HUB_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        partial.rename(output)
    except BaseException:
        _remove_unfinished(partial)
        raise


def _bytes(size: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return torch.Size(size[1]).numel() * size[0].itemsize


def _parts(sizes: Sizes, limit: float) -> list[Sizes]:
    """Consecutive tensors that fit into a file each."""
    parts: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + _bytes(size) > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = size
        filled += _bytes(size)
    if len(parts) > MAX_PARTS:
        raise UserError(f"shard_gb = {limit / 1e9:g}: gives {len(parts)} files; at most {MAX_PARTS} are allowed")
    return list(parts)


def _remove_unfinished(partial: Path) -> None:
    """Remove what this or a killed process left, if it contains nothing else.

    Raises:
        UserError: if it does.
    """
    if not partial.is_symlink() and not partial.exists():
        return
    ours = (WHOLE, INDEX, CARD, HUB_CONFIG)
    if partial.is_symlink() or not partial.is_dir():
        raise UserError(f"output: {partial} is in the way")
    if not all(file.name in ours or PART.fullmatch(file.name) for file in partial.iterdir()):
        raise UserError(f"output: {partial} is in the way, and contains other files")
    shutil.rmtree(partial)
