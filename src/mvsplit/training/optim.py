"""AdamW with the paper's parameter groups, or Muon beside it, and the learning-rate schedule in optimiser steps."""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Len, Lt
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mvsplit.training.checkpoint_format import Tensors
from mvsplit.training.local_state import local
from mvsplit.training.low_bit import LowBitAdamW, Moments
from mvsplit.training.muon import PackedMuon, Together, block_matrices
from mvsplit.utils.errors import UserError

Beta = Annotated[float, Ge(0), Lt(1)]


class LocalAdamW(torch.optim.AdamW):
    """AdamW on FSDP2's shards as plain tensors: the update is elementwise, so shards are independent.

    DTensor needs n² steps for the layout of n tensors: the first update of 100 blocks took 10 s, of 200 blocks 77 s.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(t) for t in tensors]
        return has_complex


@dataclass(frozen=True)
class AdamW:
    """AdamW and its schedule: linear warm-up, then constant (paper) or cosine.

    Args:
        lr: peak learning rate. Paper's rule: 1e-3 / (0.2·√width).
        betas: of Adam; null: 0.9 and 0.999.
        eps: of Adam.
        weight_decay: of 2-D weights only, not of gains, biases or token tables (paper), nor of those that the network
            names in its attribute `not_decayed`.
        warmup_steps: optimiser steps until the peak.
        schedule: after the warm-up.
        min_lr_ratio: last value of the cosine, as a share of lr.
        decay_steps: step at which the cosine ends; null: the run's end.
        moments: how the moments of each weight are stored: 8, 4 or 2 bytes together.
        in_backward: take each parameter's step in the backward pass, where its gradient is freed.
    """

    lr: PositiveFloat = 1.5625e-4
    betas: Annotated[list[Beta], Len(2, 2)] | None = None
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    warmup_steps: NonNegativeInt = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    decay_steps: PositiveInt | None = None
    moments: Moments = "float32"
    in_backward: bool = False

    @staticmethod
    def check(moments: str) -> None:
        """Raise `UserError` if a package is missing; called before anything is built."""
        if moments == "8bit" and find_spec("torchao") is None:
            raise UserError("optim.moments = 8bit: needs another package: pip install -e '.[lowbit]'")

    def factor(self, step: int, max_steps: int) -> float:
        """Share of `lr` for the optimiser step number `step` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        last = max(self.decay_steps or max_steps, self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (last - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    def build(self, network: nn.Module, max_steps: int) -> tuple[Optimizer, LambdaLR]:
        """Optimiser over the trainable parameters and its per-step scheduler."""
        optimizer = self._optimizer(network)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, max_steps))

    def _optimizer(self, network: nn.Module) -> Optimizer:
        return self._adamw({name: p for name, p in network.named_parameters() if p.requires_grad}, network)

    def _adamw(self, trainable: dict[str, nn.Parameter], network: nn.Module) -> Optimizer:
        # By name: FSDP2 makes new parameters, without what was noted at the old ones.
        spared = getattr(network, "not_decayed", ())
        decayed = {name for name, p in trainable.items() if num_dims(p) == 2 and name not in spared}
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": self.weight_decay},
            {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # ZeRO-3 has float32 masters of bf16 weights.
        rounded = any(p.dtype == torch.bfloat16 and not hasattr(p, "ds_shape") for p in trainable.values())
        if rounded or self.moments != "float32":
            return LowBitAdamW(groups, self.lr, self._betas(), self.eps, self.moments)
        kind = LocalAdamW if any(isinstance(p, DTensor) for p in trainable.values()) else torch.optim.AdamW
        return kind(groups, lr=self.lr, betas=self._betas(), eps=self.eps, foreach=True)

    def _betas(self) -> tuple[float, float]:
        return (self.betas[0], self.betas[1]) if self.betas else (0.9, 0.999)

    def reapply(self, optimizer: Optimizer, scheduler: LambdaLR, max_steps: int) -> None:
        """Apply this config's values after a checkpoint is loaded: they may differ from the saved ones."""
        scheduler.base_lrs = [self.lr] * len(optimizer.param_groups)
        for group in optimizer.param_groups:
            group["initial_lr"] = self.lr
            group["lr"] = self.lr * self.factor(scheduler.last_epoch, max_steps)
            group["weight_decay"] = self.weight_decay if group["weight_decay"] else 0.0
            self._reapply_own(group)

    def _reapply_own(self, group: dict[str, Any]) -> None:
        """Apply the values that other optimisers do not have."""
        group["betas"], group["eps"] = self._betas(), self.eps


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon for the matrices inside the blocks, AdamW for all other parameters, with one learning rate and schedule.

    An orthogonal matrix is multiplied by 0.2·√(its longer side), so its entries have a root mean square of 0.2, about
    that of AdamW's steps (Liu et al., 2025): learning rate and weight decay mean the same in both parts.

    Args:
        momentum: share of the momentum that is kept in each step; with Nesterov's correction.
        ns_steps: Newton–Schulz iterations: after five, singular values are between about 0.7 and 1.2.
    """

    momentum: Beta = 0.95
    ns_steps: Annotated[int, Ge(1), Lt(100)] = 5

    @staticmethod
    def check(moments: str) -> None:
        """Raise `UserError` for what only AdamW has; called before anything is built."""
        if moments != "float32":
            raise UserError(f"optim.moments = {moments}: must be float32 with optim=muon")

    def _optimizer(self, network: nn.Module) -> Optimizer:
        matrices = dict(block_matrices(network))
        groups = [
            {"params": [p for p, number in matrices.items() if number == parts], "parts": parts}
            for parts in sorted(set(matrices.values()))
        ]
        if not groups:
            raise UserError(f"optim = muon: {type(network).__name__} has no matrices in `blocks`; use optim=paper")
        others = {name: p for name, p in network.named_parameters() if p.requires_grad and p not in matrices}
        options: dict[str, Any] = {"momentum": self.momentum, "ns_steps": self.ns_steps}
        muon = PackedMuon(groups, lr=self.lr, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw", **options)
        return Together([muon, self._adamw(others, network)]) if others else muon

    def _reapply_own(self, group: dict[str, Any]) -> None:
        if "parts" in group:
            group["momentum"], group["ns_steps"] = self.momentum, self.ns_steps
        else:
            super()._reapply_own(group)


def check_same_kind(optimizer: Optimizer, settings: dict[str, Any], saved: Tensors) -> None:
    """Check that a saved state belongs to such an optimiser.

    Args:
        optimizer: of this run.
        settings: of `local_optimizer`, saved.
        saved: the tensors saved with them.

    Raises:
        UserError: if it belongs to another.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's wraps the real one
    if [group.get("parts") for group in inner.param_groups] != [g.get("parts") for g in settings["param_groups"]]:
        raise UserError("ckpt_path: saved with another optimiser or other parameters; use the optim of that run")
    parameters = [p for group in inner.param_groups for p in group["params"]]
    coded = isinstance(inner, LowBitAdamW) and any(map(inner.has_codes, parameters))
    if len(saved) and coded != any(name.endswith("_scale") for name in saved):
        now = "8bit" if coded else "float32 or bfloat16"
        raise UserError(f"optim.moments = {now}: the checkpoint's are {'not ' * coded}8bit, which is not converted")


def num_dims(parameter: torch.nn.Parameter) -> int:
    """Dimensions of the whole parameter: under ZeRO-3 the tensor is an empty placeholder."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape)
