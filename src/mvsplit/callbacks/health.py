"""Looks at loss and gradients before each optimiser step; a step that is not finite is never taken."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mvsplit.training.shards import gradient_norm, gradient_norms
from mvsplit.training.strategies import takes_step
from mvsplit.utils.errors import AgreedError


class NonFiniteStop(Callback):
    """Logs `train/grad_norm` (before clipping) and stops the run before a step with a non-finite loss or gradient.

    The weights, the optimiser and the average stay those of the last good step. A report says where and when:
    step, loss, times, sample numbers, and the gradient norm of each kind of parameter.

    Args:
        folder: where the report `nonfinite_step_<step>_rank_<rank>.json` goes.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._batch: dict[str, Tensor] = {}
        self._loss = torch.tensor(math.nan)
        self.norm = math.nan
        """Norm of the step's gradient before clipping, on every rank."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if not takes_step(trainer):  # a micro-batch's loss that is not finite will be in the step's gradient too
            return
        self.norm = gradient_norm(module)
        module.log("train/grad_norm", self.norm)
        finite = bool(self._loss.isfinite()) and math.isfinite(self.norm)
        # All ranks stop together: one alone would leave the others waiting for it.
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            path = self._report(trainer, module)
            raise AgreedError(
                f"the loss or its gradient is not finite at step {trainer.global_step} (loss {self._loss.item():g});"
                f" no step was taken, see {path}"
            )

    def _report(self, trainer: Trainer, module: LightningModule) -> Path:
        norms = gradient_norms(module, lambda name: ".".join(p for p in name.split(".") if not p.isdigit()))
        report = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "loss": str(self._loss.item()),
            "samples": self._batch["index"].tolist(),
            "positions": self._batch["position"].tolist(),
            "gradient_norms": {family: str(norm) for family, norm in norms.items()},
        }
        path = self.folder / f"nonfinite_step_{trainer.global_step}_rank_{trainer.global_rank}.json"
        path.write_text(json.dumps(report, indent=2))
        return path
