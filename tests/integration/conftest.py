"""Comparing runs by their last checkpoint."""

from pathlib import Path
from typing import Any

import torch


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


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


STATE = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ShardDataModule")


def state(run: Path) -> dict[str, Any]:
    """What a run is: weights, optimiser, schedule, average, data position. Paths and loop counters are left out."""
    content = last(run)
    return {key: content[key] for key in STATE} | {"ema": content["callbacks"]["EMA"]}
