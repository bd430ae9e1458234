"""Sizes of a network, without building it: parameters by number, activations by what one block keeps.

The network stands on the meta device to be counted. One block of it runs on fake tensors, where shapes and storages
are what they would be, and nothing is computed or allocated.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.flow.objective import velocity_loss
from mvsplit.models.recompute import saved_bytes
from mvsplit.stability.taps import WRITERS
from mvsplit.utils.config import build


@dataclass(frozen=True)
class Sizes:
    """Parameters of a network, by number."""

    total: int
    block: int
    writers: int
    """Of a block's two writers."""

    def at_depth(self, depth: int, change_to: int) -> "Sizes":
        return replace(self, total=self.total + (change_to - depth) * self.block)


def count_parameters(model: dict[str, Any]) -> Sizes:
    """Of a checked `model` node, built on the meta device."""
    with torch.device("meta"):
        network = build(model)()
    block = network.blocks[0]
    writers = [block.get_submodule(name) for name, _ in WRITERS.values()] if hasattr(block, "attention") else []
    parts = [network, block, nn.ModuleList(writers)]
    return Sizes(*(sum(p.numel() for p in part.parameters()) for part in parts))


@dataclass(frozen=True)
class Activations:
    """Bytes of activations for a micro-batch: of a block, of the trunk between blocks, of what is around the blocks,
    of gradients on their way through a block, and of a block's weights cast by autocast.
    """

    block: int
    trunk: int
    around: int
    working: int
    casts: int


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages made inside it that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure_activations(model: dict[str, Any], batch: int, dtype: torch.dtype, autocast: bool) -> Activations:
    """Run a network of one block on fake tensors: shapes and storages without memory or arithmetic.

    Args:
        model: a checked `model` node. batch: micro-batch per process. dtype: of the weights. autocast: to bf16.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        network = build(model | {"depth": 1} | ({"checkpointing": None} if "checkpointing" in model else {}))()
        image = torch.zeros(batch, *network.input_shape, dtype=torch.float32)  # batches keep their type
        null = getattr(network.context, "null", None)
        condition = torch.zeros(batch, dtype=torch.long) if null is None else null.expand(batch, -1, -1)
        seen: list[Any] = []
        network.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else nullcontext():
            _, everything = saved_bytes(
                lambda: velocity_loss(network, image, image.clone(), torch.zeros(batch), condition), network
            )
            block, (x, *others) = network.blocks[0], seen
            x = x.detach().requires_grad_()
            _, saved = saved_bytes(lambda: block(x, *others), block, others)
            with _Live() as live:
                block(x, *others).sum().backward()
    casts = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2) if autocast else 0
    return Activations(
        block=saved,
        trunk=x.nbytes,
        around=max(0, everything - saved) + 3 * image.nbytes,  # data, noise and their mixture stay as well
        working=max(0, live.peak - (saved - x.nbytes)),
        casts=casts,
    )
