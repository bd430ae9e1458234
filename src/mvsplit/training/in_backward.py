"""Optimiser steps in the backward pass: each parameter's as soon as its gradient is complete, which is then freed.

So the gradients of all parameters never exist together. A step is the same to the bit as one after the backward pass:
each parameter's update depends on its own gradient and state alone. What must see the whole gradient first (clipping,
leaving a step out, several micro-batches) is not possible; `settings.check_optimizer` refuses it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mvsplit.training.gradients import norms_of_pieces


class StepsInBackward:
    """Hooks on the parameters of an optimiser, until `remove` is called.

    Args:
        optimizer: one whose parameters are whole.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._norms: dict[Tensor, Tensor] = {}  # of the pieces of each gradient
        self._parameters: list[nn.Parameter] = []
        self._handles: list[Any] = []
        for part in getattr(optimizer, "parts", [optimizer]):
            for group in part.param_groups:
                for parameter in group["params"]:
                    take = partial(self._take_step, part, group)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(take))
        # In the optimiser's order, which affects the norm's last digit.
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _take_step(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = norms_of_pieces([parameter.grad])
        # A step goes through all parameters of the optimiser's groups: thousands, once for each of them.
        groups = optimizer.param_groups
        optimizer.param_groups = [group | {"params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    def clear(self) -> None:
        """Forget the norms. A step begins."""
        self._norms.clear()

    def gradient_norm(self) -> Tensor:
        """Norm of the step's whole gradient, after the backward pass; to the bit as `gradients.gradient_norm`."""
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        return torch.linalg.vector_norm(torch.cat(norms) if norms else torch.zeros(0))

    def gradient_norms(self, module: nn.Module, family: Callable[[str], str]) -> dict[str, float]:
        """Norms of the step's gradient by family of parameters, as `gradients.gradient_norms`."""
        squares: dict[str, float] = {}
        for name, parameter in module.named_parameters():
            if parameter in self._norms:
                square = float(self._norms[parameter].double().square().sum())
                squares[family(name)] = squares.get(family(name), 0.0) + square
        return {name: square**0.5 for name, square in sorted(squares.items())}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
