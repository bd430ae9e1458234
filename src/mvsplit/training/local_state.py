"""The part of weights and optimiser state that one process holds, under any strategy; `gradients.py` adds theirs.

In one process and under DDP these are whole tensors; under FSDP2 some rows of each; under ZeRO-3 a range of each
flattened tensor, with weights twice: in the network's precision, and in float32 ("masters") for the optimiser.
Nothing here is a collective call unless its docstring says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mvsplit.training.checkpoint_format import Slice, Slices, Tensors
from mvsplit.utils.errors import AgreedError


def working_weights(network: nn.Module) -> dict[str, Tensor]:
    """Local part of the weights that the forward pass uses; writing to them changes the network."""
    _reshard(network)
    return {name: working_weight(parameter) for name, parameter in network.named_parameters()}


def working_weight(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return local(parameter.data)


def local(tensor: Tensor) -> Tensor:
    """The local part of a tensor that FSDP2 may have sharded: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reshard(network: nn.Module) -> None:
    """Release gathered parameters, which both strategies keep for a while after a forward pass."""
    for parameter in network.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def master_weights(network: nn.Module) -> dict[str, Tensor]:
    """Local part of the weights that the optimiser updates: views, in host memory if they are offloaded."""
    return {name: _master(parameter) for name, parameter in network.named_parameters()}


def _master(parameter: nn.Parameter) -> Tensor:
    zero3 = zero3_of(parameter)
    if zero3 is None:
        return working_weight(parameter).detach()
    if zero3.swap_optimizer:
        return zero3.get_local_fp32_param(parameter)  # a copy: it is read from the disk
    return part_of(zero3, parameter, flat_of(zero3, parameter))


def zero3_of(parameter: nn.Parameter) -> Any:
    """DeepSpeed's optimiser, if it trains this parameter."""
    if not hasattr(parameter, "ds_tensor") or not parameter.requires_grad:
        return None
    optimizer = getattr(parameter, "_z3_optimizer", None)
    return optimizer if hasattr(optimizer, "fp32_partitioned_groups_flat") else None


def trained_by_zero3(module: nn.Module) -> Any:
    """DeepSpeed's optimiser, if it trains this module."""
    return next((zero3 for parameter in module.parameters() if (zero3 := zero3_of(parameter)) is not None), None)


def on_disk(network: nn.Module) -> bool:
    """Whether masters and optimiser state are on NVMe: they can be read between two steps, but not changed."""
    return any(getattr(zero3_of(parameter), "swap_optimizer", False) for parameter in network.parameters())


def flat_of(zero3: Any, parameter: nn.Parameter) -> Tensor:
    """The buffer that contains a parameter's masters and that DeepSpeed's inner optimiser updates."""
    return zero3.fp32_partitioned_groups_flat[zero3.grad_position[zero3.get_param_id(parameter)][0]]


def part_of(zero3: Any, parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """A parameter's part of its buffer of masters, or of optimiser state with the same layout."""
    _, offset, length = zero3.grad_position[zero3.get_param_id(parameter)]
    return flat.detach().narrow(0, offset, length)


def shard_range(parameter: nn.Parameter) -> tuple[tuple[int, ...], int, int]:
    """Shape of the whole parameter, and the range [start, stop) of its flattened entries that are local."""
    if hasattr(parameter, "ds_tensor"):
        length, rank = parameter.ds_tensor.ds_numel, dist.get_rank(parameter.ds_process_group)
        start = min(rank * length, parameter.ds_numel)
        return tuple(parameter.ds_shape), start, min(start + length, parameter.ds_numel)
    shape = tuple(parameter.shape)
    if not isinstance(parameter.data, DTensor):
        return shape, 0, parameter.numel()
    (placement,) = parameter.placements
    assert placement.is_shard(0), "FSDP2 shards rows"
    mesh = parameter.device_mesh
    rows = -(-shape[0] // mesh.size())
    row = parameter.numel() // shape[0]
    start = min(mesh.get_local_rank() * rows, shape[0])
    return shape, start * row, min(start + rows, shape[0]) * row


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether this process holds all of a parameter and of its state."""
    return not hasattr(parameter, "ds_tensor") and not isinstance(parameter.data, DTensor)


def slices_of(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Slice]:
    """Local slices of values that are sharded like the parameters of these names, without padding."""
    _reshard(module)
    return {name: slice_of(p, values[name]) for name, p in module.named_parameters() if name in values}


def slice_of(parameter: nn.Parameter, values: Tensor) -> Slice:
    shape, start, stop = shard_range(parameter)
    return Slice(start, shape, values.detach().reshape(-1)[: stop - start])


def fill(module: nn.Module, saved: Tensors, values: dict[str, Tensor]) -> None:
    """Inverse of `slices_of`, in place; names that were not saved are unchanged."""
    _reshard(module)
    for name, parameter in module.named_parameters():
        if name in values and name in saved:
            _fill(parameter, saved, name, values[name])


def _fill(parameter: nn.Parameter, saved: Tensors, name: str, values: Tensor) -> None:
    _, start, stop = shard_range(parameter)
    flat = values.detach().view(-1)
    flat[: stop - start].copy_(saved.read(name, start, stop))
    flat[stop - start :].zero_()  # ZeRO-3 pads the last shard


def local_weights(module: nn.Module) -> dict[str, Slice]:
    """Slices of the trained weights and, on the first process, the buffers."""
    slices = slices_of(module, master_weights(module))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for name, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                slices[name] = Slice.whole(value)
    return slices


@torch.no_grad()
def load_weights(module: nn.Module, saved: Tensors) -> None:
    """Load saved weights into masters, network and buffers.

    Raises:
        AgreedError: if the masters are on NVMe.
    """
    if on_disk(module):
        raise AgreedError(
            "trainer.strategy.offload_optimizer = nvme: a run cannot be resumed or rolled back with it yet; use none"
            " or cpu"
        )
    working, masters = working_weights(module), master_weights(module)
    fill(module, saved, masters)
    for name, weight in working.items():
        weight.copy_(masters[name])
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, nn.Parameter) and name in saved:
            value.copy_(saved.whole(name))


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all whole weights and buffers; a shared weight has its first name, as in a checkpoint."""
    _reshard(module)
    buffers = {n: v for n, v in module.state_dict(keep_vars=True).items() if not isinstance(v, nn.Parameter)}
    shapes = {name: tuple(value.shape) for name, value in buffers.items()}
    return shapes | {name: shard_range(parameter)[0] for name, parameter in module.named_parameters()}


def local_optimizer(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], Slices]:
    """Settings and counts of the optimiser, and slices of its tensors, `<parameter>/<state>`."""
    _reshard(module)
    slices: dict[str, Slice] = {}
    counts: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        _, state, part = _state(parameter, optimizer)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                slices[f"{name}/{key}"] = Slice.whole(value) if is_whole(parameter) else slice_of(parameter, part(key))
            else:
                counts.setdefault(name, {})[key] = value.cpu() if isinstance(value, Tensor) else value
    groups = [{key: value for key, value in g.items() if key != "params"} for g in _inner(optimizer).param_groups]
    return {"param_groups": groups, "counts": counts}, slices


@torch.no_grad()
def load_optimizer(module: nn.Module, optimizer: Optimizer, settings: dict[str, Any], saved: Tensors) -> None:
    """Inverse of `local_optimizer`; new state is created on the masters' device."""
    _reshard(module)
    for group, known in zip(_inner(optimizer).param_groups, settings["param_groups"], strict=True):
        group.update({key: value for key, value in known.items() if key != "param_names"})
    keys: dict[str, list[str]] = {}
    for entry in saved:
        name, _, key = entry.rpartition("/")
        keys.setdefault(name, []).append(key)
    for name, parameter in module.named_parameters():
        owner, state, part = _state(parameter, optimizer)
        if name in keys and hasattr(_inner(optimizer), "new_state"):  # of other types or shapes than the parameter's
            state.update(_inner(optimizer).new_state(parameter))
        for key, value in settings["counts"].get(name, {}).items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
        for key in keys.get(name, []):
            if key not in state:
                state[key] = torch.zeros_like(owner, requires_grad=False)
            if is_whole(parameter):
                state[key].copy_(saved.whole(f"{name}/{key}"))
            else:
                _fill(parameter, saved, f"{name}/{key}", part(key))


def clear_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    """Reset the optimiser to its state before the first step, except for its settings."""
    for parameter in module.parameters():
        _state(parameter, optimizer)[1].clear()


def _inner(optimizer: Optimizer) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's, like Lightning's, wraps the real one


def _state(parameter: nn.Parameter, optimizer: Optimizer) -> tuple[Tensor, dict[str, Any], Callable[[str], Tensor]]:
    """The tensor that the optimiser updates, its state, and a function: key → the parameter's part of that state."""
    zero3 = zero3_of(parameter)
    if zero3 is None:
        state = _inner(optimizer).state[parameter] if parameter.requires_grad else {}
        return parameter, state, lambda key: local(state[key])
    flat = flat_of(zero3, parameter)
    state = zero3.optimizer.state[flat]
    if zero3.swap_optimizer:
        return flat, state, lambda key: zero3.get_local_fp32_param(parameter, key)
    return flat, state, lambda key: part_of(zero3, parameter, state[key])
