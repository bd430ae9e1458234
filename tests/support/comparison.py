"""Comparing runs by their last checkpoint."""

from pathlib import Path
from typing import Any

import torch

from mvsplit.training.checkpoint_format import Saved


def last(run: Path) -> dict[str, Any]:
    """The state of a run's last checkpoint, with the weights, the optimiser's tensors and the averages by name."""
    saved = Saved(run / "checkpoints" / "last.ckpt").verify()
    kinds = {kind: saved.tensors(kind) for kind in ("weights", "optimizer", "ema")}
    return saved.state() | {"tensors": {kind: {name: t.whole(name) for name in t} for kind, t in kinds.items()}}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested containers of tensors are not the same to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{path}.{key} only once" for key in a.keys() ^ b.keys()]
        return keys + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {a} != {b}"]


STATE = ("tensors", "optimizer", "lr_schedulers", "global_step", "ShardDataModule")


def state(run: Path) -> dict[str, Any]:
    """What a run is: weights, optimiser, schedule, average, data position. Paths and loop counters are left out."""
    content = last(run)
    return {key: content[key] for key in STATE} | {"updates": content["callbacks"]["EMA"]["num_updates"]}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return last(run)["tensors"]["weights"]
