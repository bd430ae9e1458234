"""What callbacks draw samples for: classes, or the captions of the validation set."""

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from mvsplit.data.reader import collate
from mvsplit.utils.console import info_once


def has_captions(trainer: Trainer) -> bool:
    """Whether the data have states of captions."""
    return getattr(getattr(trainer, "datamodule", None), "text", None) is not None


def draws(trainer: Trainer, module: Any, callback: str) -> bool:
    """Whether a module generates samples here; if not, one line says that the callback is off."""
    why = None
    if not hasattr(module, "sample"):
        why = f"{type(module).__name__} draws no samples"
    elif getattr(getattr(module, "network", None), "embedding_width", None) is not None and not has_captions(trainer):
        why = f"{type(trainer.datamodule).__name__} has no stored captions"
    if why is not None and trainer.is_global_zero:
        info_once(f"callbacks.{callback}: off, {why}")
    return why is None


def of_captions(trainer: Trainer, numbers: list[int]) -> tuple[Tensor, Tensor, list[str]]:
    """Captions of the validation set, beginning again after its last.

    Padded together as the data module pads a micro-batch. A collective call for remote sets.

    Args:
        numbers: B numbers from 0.

    Returns:
        Their states (B, S, W), those of the empty caption (S_max, W), both on the run's device, and their texts.
    """
    data: Any = trainer.datamodule
    reader, device = data.reader("val", text=True), trainer.strategy.root_device
    chosen = [number % len(reader) for number in numbers]
    batch = collate(reader.__getitems__([(number, number) for number in chosen]))
    texts = batch.get("caption", [""] * len(chosen))
    return batch["condition"].to(device), data.text.null(torch.device(device)), texts
