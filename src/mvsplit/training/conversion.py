"""Writes saved weights in other forms: one file, the layout of the released weights, or a folder for a model hub.

One tensor is in memory at a time. What is written appears whole or not at all.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.training.checkpoint_format import COMPLETE, PARTIAL
from mvsplit.training.checkpoint_writer import write_safetensors
from mvsplit.training.hub_folder import check_hub_output, write_hub_folder
from mvsplit.training.model_card import model_card, without_places
from mvsplit.training.release_file import write_release
from mvsplit.training.release_layout import ASSUMED, exported, value_at
from mvsplit.training.saved_config import check_saved_config, portable
from mvsplit.training.weight_sources import Source, open_sources
from mvsplit.utils.console import info, track
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file
from mvsplit.utils.limits import MAX_REASON, parse_json, read_small
from mvsplit.utils.locks import sole_writer

Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Sources = Mapping[str, Source]
"""Weights to be written, by the prefix of their names."""


def convert(path: Path, output: Path, weights: Sequence[str], dtype: torch.dtype | None) -> int:
    """Write a checkpoint's weights, and the part of its config that describes them, into one safetensors file.

    Args:
        path: of the checkpoint.
        output: the new file.
        weights: `raw`, `ema` or both; averaged weights have the network's names, trained ones `raw.…`.
        dtype: of floating-point tensors; None keeps their types.

    Returns:
        Number of tensors written.

    Raises:
        UserError: if the checkpoint is damaged or has no averaged weights, or if `output` cannot be written.
    """
    _check_file(output, ".safetensors")
    return write_file(open_sources(path, weights), output, dtype)


def write_file(sources: Sources, output: Path, dtype: torch.dtype | None) -> int:
    """The same, of weights that have been found. Returns the number of tensors."""
    _check_file(output, ".safetensors")
    sizes, values = _tensors(sources, dtype)
    partial = output.with_name(output.name + PARTIAL)
    with sole_writer(output):
        partial.unlink(missing_ok=True)
        try:
            write_safetensors(partial, sizes, values, next(iter(sources.values())).about)
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    return len(sizes)


def export(source: Source, output: Path, dtype: torch.dtype | None) -> int:
    """Write weights of this project in the layout of the released ones, as `torch.save` does.

    Args:
        source: the weights.
        output: the new file.
        dtype: of floating-point tensors; None keeps their types.

    Returns:
        Number of tensors written.

    Raises:
        UserError: for a network that the release's code does not have, or if `output` cannot be written.
    """
    _check_file(output, ".pt")
    config = portable(source.config)
    check_saved_config(config)
    sizes, values = exported(source, dtype)
    for key, theirs in ASSUMED.items():
        if (ours := value_at(config, key, theirs)) != theirs:
            info(f"{key} = {ours}: the release's code computes with {theirs}")
    source.verify()
    with sole_writer(output):
        _remove_left(output)
        with whole_file(output) as file:
            write_release(file, sizes, _tracked(values, len(sizes)))
    return len(sizes)


def _remove_left(output: Path) -> None:
    """Remove what killed processes left of this `whole_file`."""
    for path in output.parent.iterdir():
        ours = path.name.startswith(output.name) and re.fullmatch(r"\.\d+\.partial", path.name[len(output.name) :])
        if ours and (path.is_symlink() or path.is_file()):
            path.unlink(missing_ok=True)


def write_hub(
    sources: Sources, output: Path, dtype: torch.dtype | None, license: str, metrics: Path | None, shard_gb: float
) -> int:
    """Write a folder for a model hub, with a model card.

    Args:
        sources: the weights; the first are described.
        output: the new folder.
        dtype: of floating-point tensors; None keeps their types.
        license: its identifier on the hub.
        metrics: a `metrics.json` that `src/eval.py` wrote for these weights.
        shard_gb: largest size of a file of weights, in 10⁹ bytes.

    Returns:
        Number of tensors written.

    Raises:
        UserError: if the weights cannot be described without paths of this machine, or `output` cannot be written.
    """
    check_hub_output(output)
    prefix, source = next(iter(sources.items()))
    config = portable(source.config)
    check_saved_config(config)
    _check_places("", config)
    if any((folder / COMPLETE).exists() for folder in output.resolve().parents):
        raise UserError(f"output = {output}: must not be inside a checkpoint")
    measured = None if metrics is None else parse_json(read_small(metrics), str(metrics))
    if not (measured is None or isinstance(measured, dict)):
        raise UserError(f"metrics = {metrics}: not written by src/eval.py")
    sizes, values = _tensors(sources, dtype)
    records = {"latents": without_places(source.latents), "text": without_places(source.text)}
    about = {"step": source.step, "config": config} | {key: value for key, value in records.items() if value}
    metadata = source.about | {key: json.dumps(value) for key, value in records.items() if value}
    card = model_card(source, sizes, output.name, license, measured, raw=bool(prefix))
    write_hub_folder(output, sizes, values, about, metadata, card, shard_gb * 1e9)
    return len(sizes)


def _tensors(sources: Sources, dtype: torch.dtype | None) -> tuple[Sizes, Iterator[Tensor]]:
    """Types and shapes of what will be written, and the tensors, once their checksums have been compared."""
    for source in sources.values():
        source.verify()
    sizes: Sizes = {}
    for prefix, source in sources.items():
        for name, (stored, shape) in source.sizes.items():
            sizes[prefix + name] = (dtype if dtype is not None and stored.is_floating_point else stored, shape)
    values = (source.read(name, sizes[prefix + name][0]) for prefix, source in sources.items() for name in source.sizes)
    return sizes, _tracked(values, len(sizes))


def _tracked(values: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _ in track(range(count), "writing"):
        yield next(values)


def _check_file(output: Path, suffix: str) -> None:
    if output.suffix != suffix or (output.exists() and not output.is_file()):
        raise UserError(f"output = {output}: must be a file that ends in {suffix}")
    if any((folder / COMPLETE).exists() for folder in output.resolve().parents):
        raise UserError(f"output = {output}: must not be inside a checkpoint")
    if not output.parent.is_dir():
        raise UserError(f"output = {output}: its folder does not exist")


def _check_places(key: str, value: Any) -> None:
    """Raise `UserError` for a path in a config that is to be published."""
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            _check_places(f"{key}.{name}".lstrip("."), child)
    elif isinstance(value, str) and ("/" in value or "\\" in value):
        raise UserError(f"{key} = {value[:MAX_REASON]}: a network that reads a file cannot be published in a folder")
