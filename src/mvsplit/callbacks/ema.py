"""Exponential moving average of the weights, used for validation and samples."""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mvsplit.training.checkpoint_format import Tensors
from mvsplit.training.gradients import coalesce_by_storage
from mvsplit.training.local_state import fill, master_weights, on_disk, slices_of, working_weights
from mvsplit.utils.errors import AgreedError


class EMA(Callback):
    """Keeps w̄ ← d·w̄ + (1 − d)·w in float32, with d = min(decay, (1 + n)/(10 + n)) after n updates.

    It averages the weights that the optimiser updates: under ZeRO-3 the float32 masters, not their bfloat16 copies.
    Each process averages its local shards, without communication. During validation and testing the network has the
    averaged weights; the trained ones are restored afterwards, bit for bit.

    Args:
        decay: upper bound of d.

    Raises:
        AgreedError: if the masters are stored on NVMe.
    """

    def __init__(self, decay: Annotated[float, Ge(0), Lt(1)] = 0.999) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._masters: list[Tensor] = []  # inputs and results; `shadow` has views of the results
        self._averages: list[Tensor] = []
        self._saved: Tensors | None = None  # averages of a checkpoint, until there is a network
        self._trained: dict[str, Tensor] | None = None

    def _begin(self, module: LightningModule) -> list[Tensor]:
        """Start from the checkpoint's averages, or from the current weights. Returns the masters."""
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        masters = {name: weight for name, weight in master_weights(module).items() if name in trained}
        buffers = coalesce_by_storage(list(masters.values()))  # ZeRO-3: one averaging for all weights, not one for each
        self._averages = [buffer.to(torch.float32, copy=True) for buffer in buffers]
        places = {buffer.data_ptr(): average for buffer, average in zip(buffers, self._averages, strict=True)}
        for name, weight in masters.items():
            own = places.get(weight.data_ptr())
            if own is None or own.numel() != weight.numel():  # a part of a buffer
                buffer = places[weight.untyped_storage().data_ptr()]
                own = buffer.as_strided(weight.size(), weight.stride(), weight.storage_offset())
            self.shadow[name] = own.view(weight.shape)
        if self._saved is not None:
            fill(module, self._saved, self.shadow)
            self._saved = None
        return buffers

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if on_disk(module):
            raise AgreedError("callbacks.ema: weights on NVMe cannot be averaged; use callbacks.ema=null")
        self._masters = self._begin(module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.num_updates:
            return  # a micro-batch without an optimiser step
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [weight.detach().float() for weight in self._masters]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)

    def _swap_in(self, module: LightningModule) -> None:
        if self._saved is not None:  # testing without training
            self._begin(module)
        if not self.shadow or self._trained is not None:
            return
        current = working_weights(module)
        self._trained = {name: current[name].detach().clone() for name in self.shadow}
        self._write(module, self.shadow)

    def _swap_out(self, module: LightningModule) -> None:
        if self._trained is not None:
            self._write(module, self._trained)
            self._trained = None

    @staticmethod
    @torch.no_grad()
    def _write(module: LightningModule, values: dict[str, Tensor]) -> None:
        current = working_weights(module)
        for name, value in values.items():
            current[name].copy_(value)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("tensors", {})["ema"] = slices_of(module, self.shadow)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint["tensors"]("ema")
