"""Exponential moving average of the weights: what validation, sampling and the user's pictures see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from lightning import Callback, Trainer
from torch import Tensor, nn

from mvsplit.training.strategies import local_parameters, local_tensors, whole_tensors


class EMA(Callback):
    """Keeps w̄ ← d·w̄ + (1 − d)·w in float32, with d = min(decay, (1 + n)/(10 + n)) after n updates.

    Sharded strategies average each rank's own shards, without communication. While validation or testing runs, the
    averaged weights are in the network; the trained ones come back afterwards, bit for bit.

    Args:
        decay: upper bound of d.
    """

    def __init__(self, decay: Annotated[float, Ge(0), Lt(1)] = 0.999) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] | None = None
        self._network: nn.Module | None = None  # whose average this is, once training has begun

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._network = module.network
        known_values = local_tensors(module.network, self.shadow)
        for name, weight in local_parameters(module.network).items():
            known = known_values.get(name)
            self.shadow[name] = (
                (weight if known is None else known).detach().to(weight.device, torch.float32, copy=True)
            )

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.num_updates:
            return  # a micro-batch without an optimiser step
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [w.detach().float() for w in local_parameters(module.network).values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def averaged(self, module: Any) -> Iterator[None]:
        """The averaged weights in the network, for as long as the context lasts."""
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    def _swap_in(self, module: Any) -> None:
        if not self.shadow or self._trained is not None:
            return
        current = local_parameters(module.network)
        self._trained = {name: weight.detach().clone() for name, weight in current.items()}
        self._write(module, self.shadow)

    def _swap_out(self, module: Any) -> None:
        if self._trained is not None:
            self._write(module, self._trained)
            self._trained = None

    @staticmethod
    @torch.no_grad()
    def _write(module: Any, values: dict[str, Tensor]) -> None:
        for name, weight in local_parameters(module.network).items():
            weight.copy_(values[name])

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self._swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self._swap_out(module)

    def on_test_start(self, trainer: Trainer, module: Any) -> None:
        self._swap_in(module)

    def on_test_end(self, trainer: Trainer, module: Any) -> None:
        self._swap_out(module)

    def state_dict(self) -> dict[str, Any]:
        shadow = whole_tensors(self._network, self.shadow) if self._network is not None else dict(self.shadow)
        return {"shadow": shadow, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.num_updates = dict(state["shadow"]), state["num_updates"]
