"""What one process holds of weights, optimiser state and gradients, whichever strategy shares them out.

Plainly and under DDP a process holds whole tensors; under FSDP2 some rows of each; under ZeRO-3 a stretch of each
flattened one, the weights twice: in the network's precision, and in float32 ("masters"), which the optimiser updates.
Nothing here is a collective call except where it says so.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mvsplit.training.folder import Slice, Slices, Tensors
from mvsplit.utils.errors import AgreedError

PIECE = 1 << 18
"""Numbers that a CPU adds up in float32 at once: the norm is exact to 2e-6, at full speed."""


def working_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that the forward pass uses, as far as they lie here; writing to them changes the network."""
    _reshard(network)
    return {name: _working(parameter) for name, parameter in network.named_parameters()}


def _working(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return local(parameter.data)


def local(tensor: Tensor) -> Tensor:
    """What lies here of a tensor that FSDP2 may have shared out: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reshard(network: nn.Module) -> None:
    """Give up whole copies of parameters, which both strategies keep for a while after a forward pass."""
    for parameter in network.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def master_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that the optimiser updates, as far as they lie here: views, if need be in host memory."""
    return {name: _master(parameter) for name, parameter in network.named_parameters()}


def _master(parameter: nn.Parameter) -> Tensor:
    zero3 = _zero3(parameter)
    if zero3 is None:
        return _working(parameter).detach()
    if zero3.swap_optimizer:
        return zero3.get_local_fp32_param(parameter)  # a copy: it is read from the disk
    return _stretch(zero3, parameter, _flat(zero3, parameter))


def _zero3(parameter: nn.Parameter) -> Any:
    """DeepSpeed's optimiser, if it trains this parameter."""
    if not hasattr(parameter, "ds_tensor") or not parameter.requires_grad:
        return None
    optimizer = getattr(parameter, "_z3_optimizer", None)
    return optimizer if hasattr(optimizer, "fp32_partitioned_groups_flat") else None


def on_disk(network: nn.Module) -> bool:
    """Whether masters and the optimiser's tensors lie on NVMe: they can be read between two steps, but not changed."""
    return any(getattr(_zero3(parameter), "swap_optimizer", False) for parameter in network.parameters())


def _flat(zero3: Any, parameter: nn.Parameter) -> Tensor:
    """The buffer of masters that a parameter's lie in, and that DeepSpeed's inner optimiser knows."""
    return zero3.fp32_partitioned_groups_flat[zero3.grad_position[zero3.get_param_id(parameter)][0]]


def _stretch(zero3: Any, parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """A parameter's part of its buffer of masters, or of a state of the same layout."""
    _, offset, length = zero3.grad_position[zero3.get_param_id(parameter)]
    return flat.detach().narrow(0, offset, length)


def extent(parameter: nn.Parameter) -> tuple[tuple[int, ...], int, int]:
    """Shape of the whole parameter, and which entries of it, flattened, lie here."""
    if hasattr(parameter, "ds_tensor"):
        length, rank = parameter.ds_tensor.ds_numel, dist.get_rank(parameter.ds_process_group)
        start = min(rank * length, parameter.ds_numel)
        return tuple(parameter.ds_shape), start, min(start + length, parameter.ds_numel)
    shape = tuple(parameter.shape)
    if not isinstance(parameter.data, DTensor):
        return shape, 0, parameter.numel()
    (placement,) = parameter.placements
    assert placement.is_shard(0), "FSDP2 shares out rows"
    mesh = parameter.device_mesh
    rows = -(-shape[0] // mesh.size())
    row = parameter.numel() // shape[0]
    start = min(mesh.get_local_rank() * rows, shape[0])
    return shape, start * row, min(start + rows, shape[0]) * row


def slices_of(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Slice]:
    """What lies here of values that are shared out like the parameters of these names (padding left out)."""
    _reshard(module)
    return {name: _slice(p, values[name]) for name, p in module.named_parameters() if name in values}


def _slice(parameter: nn.Parameter, values: Tensor) -> Slice:
    shape, start, stop = extent(parameter)
    return Slice(start, shape, values.detach().reshape(-1)[: stop - start])


def fill(module: nn.Module, saved: Tensors, values: dict[str, Tensor]) -> None:
    """Inverse of `slices_of`, in place; names that were not saved are left alone."""
    _reshard(module)
    for name, parameter in module.named_parameters():
        if name in values and name in saved:
            _fill(parameter, saved, name, values[name])


def _fill(parameter: nn.Parameter, saved: Tensors, name: str, values: Tensor) -> None:
    _, start, stop = extent(parameter)
    flat = values.detach().view(-1)
    flat[: stop - start].copy_(saved.read(name, start, stop))
    flat[stop - start :].zero_()  # ZeRO-3 pads the last shard


# ------------------------------------------------------------- weights, to and from a checkpoint


def held_weights(module: nn.Module) -> dict[str, Slice]:
    """Slices of the trained weights, and on the first process the buffers."""
    slices = slices_of(module, master_weights(module))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for name, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                slices[name] = Slice.whole(value)
    return slices


@torch.no_grad()
def load_weights(module: nn.Module, saved: Tensors) -> None:
    """Put saved weights into masters, network and buffers.

    Raises:
        AgreedError: if the masters lie on NVMe.
    """
    if on_disk(module):
        raise AgreedError(
            "trainer.strategy.offload_optimizer = nvme: nothing can be gone on from with it yet; the checkpoint can be"
            " with none or cpu"
        )
    working, masters = working_weights(module), master_weights(module)
    fill(module, saved, masters)
    for name, weight in working.items():
        weight.copy_(masters[name])
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, nn.Parameter) and name in saved:
            value.copy_(saved.whole(name))


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all whole weights and buffers."""
    _reshard(module)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict(keep_vars=True).items()}
    return shapes | {name: extent(parameter)[0] for name, parameter in module.named_parameters()}


# ----------------------------------------------------- the optimiser, to and from a checkpoint


def held_optimizer(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], Slices]:
    """Settings and counts of the optimiser, and slices of its tensors, `<parameter>/<state>`."""
    _reshard(module)
    slices: dict[str, Slice] = {}
    counts: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        _, state, part = _state(parameter, optimizer)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                slices[f"{name}/{key}"] = _slice(parameter, part(key))
            else:
                counts.setdefault(name, {})[key] = value.cpu() if isinstance(value, Tensor) else value
    groups = [{key: value for key, value in g.items() if key != "params"} for g in _inner(optimizer).param_groups]
    return {"param_groups": groups, "counts": counts}, slices


@torch.no_grad()
def load_optimizer(module: nn.Module, optimizer: Optimizer, settings: dict[str, Any], saved: Tensors) -> None:
    """Inverse of `held_optimizer`; what it adds is made where the masters lie."""
    _reshard(module)
    for group, known in zip(_inner(optimizer).param_groups, settings["param_groups"], strict=True):
        group.update({key: value for key, value in known.items() if key != "param_names"})
    keys: dict[str, list[str]] = {}
    for entry in saved:
        name, _, key = entry.rpartition("/")
        keys.setdefault(name, []).append(key)
    for name, parameter in module.named_parameters():
        owner, state, part = _state(parameter, optimizer)
        for key, value in settings["counts"].get(name, {}).items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
        for key in keys.get(name, []):
            if key not in state:
                state[key] = torch.zeros_like(owner, requires_grad=False)
            _fill(parameter, saved, f"{name}/{key}", part(key))


def clear_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    """Let the optimiser be as before its first step, but for its settings."""
    for parameter in module.parameters():
        _state(parameter, optimizer)[1].clear()


def _inner(optimizer: Optimizer) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's, like Lightning's, wraps the real one


def _state(parameter: nn.Parameter, optimizer: Optimizer) -> tuple[Tensor, dict[str, Any], Callable[[str], Tensor]]:
    """The tensor that the optimiser knows, its state, and how to get the parameter's part of the state of a name."""
    zero3 = _zero3(parameter)
    if zero3 is None:
        state = _inner(optimizer).state[parameter] if parameter.requires_grad else {}
        return parameter, state, lambda key: local(state[key])
    flat = _flat(zero3, parameter)
    state = zero3.optimizer.state[flat]
    if zero3.swap_optimizer:
        return flat, state, lambda key: zero3.get_local_fp32_param(parameter, key)
    return flat, state, lambda key: _stretch(zero3, parameter, state[key])


# ------------------------------------------------------------------- gradients


def local_gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of this step as far as they lie here, summed up over micro-batches and processes."""
    return _gradients_of(dict(module.named_parameters()))


def _gradients_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    gradients = {}
    averaged: dict[int, Tensor] = {}  # parameter → gradient: DeepSpeed's, unless it has moved them to its optimiser's
    for name, parameter in parameters.items():
        zero3 = _zero3(parameter)
        if zero3 is not None and not zero3.offload_optimizer and not averaged:
            for number, group in zero3.averaged_gradients.items():
                averaged |= zip(map(id, zero3.fp16_groups[number]), group, strict=True)
        if zero3 is None:
            gradient = parameter.grad
        elif id(parameter) in averaged:
            gradient = averaged[id(parameter)]
        elif zero3.offload_optimizer and not zero3.swap_optimizer:
            flat = _flat(zero3, parameter).grad
            assert flat is not None
            gradient = _stretch(zero3, parameter, flat)  # where it lies, in host memory
        else:
            gradient = zero3.get_local_fp32_grad_for_param(parameter)  # a copy on the device
        if gradient is not None:
            gradients[name] = local(gradient)
    return gradients


def drop_gradients(module: nn.Module) -> None:
    """Let the optimiser step that follows change nothing: weights, optimiser state and its counts stay to the bit.

    Optimisers leave parameters without a gradient alone. DeepSpeed's keeps its gradients elsewhere, but can throw
    them away: that is what it does when float16 overflows.
    """
    zero3 = next((z for parameter in module.parameters() if (z := _zero3(parameter)) is not None), None)
    if zero3 is not None:
        _discard_step(zero3)
        return
    for parameter in module.parameters():
        parameter.grad = None


def _discard_step(zero3: Any) -> None:
    """Make DeepSpeed take its next step for one that overflowed, without saying that gradients were not finite."""
    check, update = "_overflow_check_and_loss_scale_update", "_update_scale"

    def overflowed(update_scale: bool = True) -> bool:
        delattr(zero3, check)
        zero3.overflow = True
        return True

    def keep_quiet(has_overflow: bool = False) -> None:
        delattr(zero3, update)

    setattr(zero3, check, overflowed)
    setattr(zero3, update, keep_quiet)


def whole_storages(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in fewer tensors: those that lie side by side in one buffer, as ZeRO-3's do, as that buffer."""
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


def gradient_norm(module: nn.Module) -> float:
    """Norm of the whole gradient; a collective call where gradients are shared out."""
    gradients = whole_storages(list(local_gradients(module).values()))
    return float(total_norm(gradients, _is_shared_out(module), _device(module)))


def total_norm(tensors: list[Tensor], shared_out: bool, device: torch.device | None = None) -> Tensor:
    """Norm of all tensors together, float64; a collective call if each process holds a part of them.

    Args:
        device: where the processes add up; needed if there may be no tensors, or if they lie elsewhere.
    """
    total = _squares([piece for tensor in tensors for piece in _pieces(tensor)]).sum().to(device)
    if shared_out:
        dist.all_reduce(total)
    return total.sqrt()


def gradient_norms(module: nn.Module, family: Callable[[str], str]) -> dict[str, float]:
    """Norms of the gradient by family of parameters; a collective call where gradients are shared out."""
    gradients = local_gradients(module)
    names = [family(name) for name in gradients]
    families = sorted(set(names))
    squares = _squares(list(gradients.values()))
    index = torch.tensor([families.index(name) for name in names], dtype=torch.int64, device=squares.device)
    total = squares.new_zeros(len(families)).index_add_(0, index, squares).to(_device(module))
    if _is_shared_out(module):
        dist.all_reduce(total)
    return dict(zip(families, total.sqrt().tolist(), strict=True))


def row_norms(module: nn.Module, rows: Mapping[str, tuple[str, int, int]]) -> dict[str, float]:
    """Norms of the gradient's rows; a collective call where gradients are shared out.

    Args:
        rows: name → (parameter, first row, the one after the last).
    """
    parameters = {name: module.get_parameter(name) for name, _, _ in rows.values()}  # a walk over all takes long
    gradients, squares = _gradients_of(parameters), []
    for name, first, last in rows.values():
        shape, start, stop = extent(parameters[name])
        row = math.prod(shape[1:])
        begin, end = max(first * row, start), min(last * row, stop)
        squares.append(gradients[name].reshape(-1)[begin - start : max(begin, end) - start].double().square().sum())
    total = torch.stack(squares).to(_device(module))
    if _shared_out(parameters.values()):
        dist.all_reduce(total)
    return dict(zip(rows, total.sqrt().tolist(), strict=True))


def gain_statistics(module: nn.Module, groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, float]]:
    """Mean and largest magnitude of vectors of weights; a collective call where weights are shared out.

    Args:
        groups: name → the parameters that count together.
    """
    names = list(groups)
    totals = torch.zeros(len(names), 2, dtype=torch.float64)  # sum, count
    largest = torch.zeros(len(names), dtype=torch.float64)
    for number, parameters in enumerate(groups.values()):
        held = [_held(module.get_parameter(name)) for name in parameters]
        values = torch.cat(held).cpu().double()
        totals[number] = torch.tensor([values.sum(), len(values)])
        largest[number] = values.abs().amax() if len(values) else 0.0
    if _is_shared_out(module):
        totals, largest = totals.to(_device(module)), largest.to(_device(module))
        dist.all_reduce(totals)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    means = (totals[:, 0] / totals[:, 1]).tolist()
    return dict(zip(names, zip(means, largest.tolist(), strict=True), strict=True))


def _held(parameter: nn.Parameter) -> Tensor:
    """What lies here of a parameter that is not gathered at the moment, flattened, without padding."""
    return _slice(parameter, _working(parameter)).values


def _squares(tensors: list[Tensor]) -> Tensor:
    """Sum of squares of each tensor: (N,) float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    # Added up, and handed on, in float32 at least: bf16 has three digits.
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype)).double().square()


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor, on a CPU in pieces: a norm there adds up a few long sums, and is 1 % short at 10⁸ numbers."""
    return tensor.reshape(-1).split(PIECE) if tensor.is_cpu else [tensor]


def _device(module: nn.Module) -> torch.device:
    """Where collective calls find their tensors: gradients and masters of an offloaded optimiser lie elsewhere."""
    return next(module.parameters()).device


def _is_shared_out(module: nn.Module) -> bool:
    return _shared_out(module.parameters())


def _shared_out(parameters: Iterable[nn.Parameter]) -> bool:
    return any(hasattr(p, "ds_tensor") or isinstance(p.data, DTensor) for p in parameters)
