"""Gradients under any strategy, of which each process may hold a part only: their norms, clipping and removal.

Nothing here is a collective call unless its docstring says so.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from mvsplit.training.local_state import (
    flat_of,
    local,
    part_of,
    shard_range,
    slice_of,
    trained_by_zero3,
    working_weight,
    zero3_of,
)

K = TypeVar("K")
PIECE = 1 << 18
"""Numbers that a CPU sums in float32 at a time: the norm is exact to 2e-6, at full speed."""


def _gradients_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    gradients = {}
    averaged: dict[int, Tensor] = {}  # parameter → gradient: DeepSpeed's, unless it has moved them to its optimiser's
    for name, parameter in parameters.items():
        zero3 = zero3_of(parameter)
        if zero3 is not None and not zero3.offload_optimizer and not averaged:
            for number, group in zero3.averaged_gradients.items():
                averaged |= zip(map(id, zero3.fp16_groups[number]), group, strict=True)
        if zero3 is None:
            gradient = parameter.grad
        elif id(parameter) in averaged:
            gradient = averaged[id(parameter)]
        elif zero3.offload_optimizer and not zero3.swap_optimizer:
            flat = flat_of(zero3, parameter).grad
            assert flat is not None
            gradient = part_of(zero3, parameter, flat)  # where it is stored, in host memory
        else:
            gradient = zero3.get_local_fp32_grad_for_param(parameter)  # a copy on the device
        if gradient is not None:
            gradients[name] = local(gradient)
    return gradients


def drop_gradients(module: nn.Module) -> None:
    """Let the optimiser step that follows change nothing: weights, optimiser state and its counts stay bit for bit.

    Optimisers leave parameters without a gradient alone. DeepSpeed's keeps its gradients elsewhere, but can throw
    them away: that is what it does when float16 overflows.
    """
    zero3 = trained_by_zero3(module)
    if zero3 is not None:
        _discard_step(zero3)
        return
    for parameter in module.parameters():
        parameter.grad = None


def _discard_step(zero3: Any) -> None:
    """Make DeepSpeed take its next step for one that overflowed, without a log line about non-finite gradients."""
    check, update = "_overflow_check_and_loss_scale_update", "_update_scale"

    def overflowed(update_scale: bool = True) -> bool:
        delattr(zero3, check)
        zero3.overflow = True
        return True

    def keep_quiet(has_overflow: bool = False) -> None:
        delattr(zero3, update)

    setattr(zero3, check, overflowed)
    setattr(zero3, update, keep_quiet)


def coalesce_by_storage(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in fewer tensors: those that fill one buffer, as ZeRO-3's do, become that buffer."""
    buffers: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        buffers.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    merged = []
    for parts in buffers.values():
        storage, dtype = parts[0].untyped_storage(), parts[0].dtype
        if sum(part.nbytes for part in parts) == storage.nbytes():
            merged.append(torch.empty(0, dtype=dtype, device=parts[0].device).set_(storage))
        else:
            merged += parts
    return merged


def gradient_norm(module: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
    """Norm of the whole gradient; a collective call where gradients are sharded.

    Args:
        parameters: those of the optimiser, in its order, which affects the last digit.
    """
    zero3 = trained_by_zero3(module)
    if zero3 is None:
        chosen = module.parameters() if parameters is None else parameters
        numbered = {str(number): parameter for number, parameter in enumerate(chosen)}
        return total_norm(list(_gradients_of(numbered).values()), _is_shared_out(module), _device(module))
    # DeepSpeed clips in its own step, by a norm that it exposes only afterwards. The same method called now gives the
    # norm in time; its step then finds the result instead of computing it again.
    groups = type(zero3)._get_norm_groups(zero3)
    zero3._get_norm_groups = lambda: groups
    norms = torch.stack([torch.as_tensor(norm, dtype=torch.float64) for norm in groups])
    return torch.linalg.vector_norm(norms.masked_fill(norms < 0, math.nan))  # −1: not finite


@torch.no_grad()
def clip_gradients(module: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale the gradient, whose norm is `norm`, down to `max_norm`, to the bit as `torch.nn.utils.clip_grad_norm_`.

    ZeRO-3's is left alone: DeepSpeed clips in its step.
    """
    gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
    if gradients and trained_by_zero3(module) is None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.to(torch.promote_types(gradients[0].dtype, torch.float32)))


def total_norm(tensors: list[Tensor], shared_out: bool, device: torch.device | None = None) -> Tensor:
    """Norm of all tensors together; a collective call if each process holds a part of them.

    Args:
        device: where the processes sum; needed if there may be no tensors, or if they are stored elsewhere.
    """
    norms = norms_of_pieces(tensors)
    if not shared_out:
        return torch.linalg.vector_norm(norms).to(device)
    total = norms.double().square().sum().to(device)
    dist.all_reduce(total)
    return total.sqrt()


def gradient_norms(module: nn.Module, family: Callable[[str], str]) -> dict[str, float]:
    """Norms of the gradient by family of parameters; a collective call where gradients are sharded."""
    gradients = _gradients_of(dict(module.named_parameters()))
    names = [family(name) for name in gradients]
    families = sorted(set(names))
    squares = _norms(list(gradients.values())).double().square()
    index = torch.tensor([families.index(name) for name in names], dtype=torch.int64, device=squares.device)
    total = squares.new_zeros(len(families)).index_add_(0, index, squares).to(_device(module))
    if _is_shared_out(module):
        dist.all_reduce(total)
    return dict(zip(families, total.sqrt().tolist(), strict=True))


def row_norms(module: nn.Module, rows: Mapping[K, tuple[nn.Parameter, int, int]]) -> dict[K, float]:
    """Norms of the gradient's rows, without frozen parameters; a collective call where gradients are sharded.

    Args:
        rows: name → (parameter of the module, first row, the one after the last).
    """
    rows = {name: row for name, row in rows.items() if row[0].requires_grad}
    if not rows:
        return {}
    parameters = {str(id(parameter)): parameter for parameter, _, _ in rows.values()}
    gradients, squares = _gradients_of(parameters), []
    none = torch.zeros(0, device=next((g.device for g in gradients.values()), _device(module)))
    for parameter, first, last in rows.values():
        shape, start, stop = shard_range(parameter)
        row = math.prod(shape[1:])
        begin, end = max(first * row, start), min(last * row, stop)
        gradient = gradients.get(str(id(parameter)), none).reshape(-1)  # none if the loss does not depend on it
        squares.append(gradient[begin - start : max(begin, end) - start].double().square().sum())
    total = torch.stack(squares).to(_device(module))
    if _shared_out(parameters.values()):
        dist.all_reduce(total)
    return dict(zip(rows, total.sqrt().tolist(), strict=True))


def gain_statistics(module: nn.Module, groups: Mapping[K, Sequence[nn.Parameter]]) -> dict[K, tuple[float, float]]:
    """Mean and largest magnitude of vectors of weights; a collective call where weights are sharded.

    Args:
        groups: name → the parameters that count together.
    """
    totals = torch.zeros(len(groups), 2, dtype=torch.float64)  # sum, count
    largest = torch.zeros(len(groups), dtype=torch.float64)
    for number, parameters in enumerate(groups.values()):
        values = torch.cat([slice_of(p, working_weight(p)).values for p in parameters]).cpu().double()
        totals[number] = torch.tensor([values.sum(), len(values)])
        largest[number] = values.abs().amax() if len(values) else 0.0
    if _is_shared_out(module):
        totals, largest = totals.to(_device(module)), largest.to(_device(module))
        dist.all_reduce(totals)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    means = (totals[:, 0] / totals[:, 1]).tolist()
    return dict(zip(groups, zip(means, largest.tolist(), strict=True), strict=True))


def norms_of_pieces(tensors: list[Tensor]) -> Tensor:
    """Norms whose norm is that of all tensors, (N,)."""
    return _norms([piece for tensor in tensors for piece in _pieces(tensor)])


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norm of each tensor, (N,), in float32 at least: bf16 has three digits."""
    if not tensors:
        return torch.zeros(0)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor, on a CPU in pieces: a norm there adds up a few long sums, and is 1 % short at 10⁸ numbers."""
    return tensor.reshape(-1).split(PIECE) if tensor.is_cpu else [tensor]


def _device(module: nn.Module) -> torch.device:
    """The device of collective calls, not that of an offloaded optimiser's gradients and masters."""
    return next(module.parameters()).device


def _is_shared_out(module: nn.Module) -> bool:
    return _shared_out(module.parameters())


def _shared_out(parameters: Iterable[nn.Parameter]) -> bool:
    return any(hasattr(p, "ds_tensor") or isinstance(p.data, DTensor) for p in parameters)
