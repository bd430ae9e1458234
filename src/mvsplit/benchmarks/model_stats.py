"""Parameter counts and activation sizes of a network, without allocating it.

Parameters are counted on the meta device. Activations are measured by running one block on fake tensors, which have
shapes and storages but no data.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.flow.objective import velocity_loss
from mvsplit.models.recompute import saved_bytes
from mvsplit.stability.taps import blocks_of, writers_of
from mvsplit.utils.config import build
from mvsplit.utils.errors import UserError


@dataclass(frozen=True)
class ModelStats:
    """Numbers of parameters of a network."""

    total: int
    block: int
    writers: int
    """Those of a block's two writers."""
    largest: int
    """Those of the largest tensor."""

    def at_depth(self, depth: int, change_to: int) -> "ModelStats":
        return replace(self, total=self.total + (change_to - depth) * self.block)


def count_parameters(model: dict[str, Any]) -> ModelStats:
    """The numbers of parameters of a checked `model` node.

    Raises:
        UserError: for a network that does not consist of `depth` equal blocks and little else.
    """
    with torch.device("meta"):
        network = build(model)()
    blocks = blocks_of(network)
    if not blocks or len(blocks) != model.get("depth") or len({_count(block) for block in blocks}) > 1:
        raise UserError(
            f"model = {model['_target_']}: cannot be planned; the planner requires a network with an argument `depth`"
            " and that many blocks of equal size in `blocks`"
        )
    writers = [matrix for matrix, _ in writers_of(network, blocks[0]).values()]
    largest = max(parameter.numel() for parameter in network.parameters())
    return ModelStats(_count(network), _count(blocks[0]), sum(map(_count, writers)), largest)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of a micro-batch."""

    block: int
    trunk: int
    """The trunk between two blocks."""
    around: int
    """Activations outside the blocks."""
    working: int
    """Gradients in flight in a block's backward pass."""
    casts: int
    """A block's weights, cast by autocast."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living storages that were created inside it, and their peak.

    Args:
        existing: tensors created before, whose views are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in existing}

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
    """Run a network of one block on fake tensors.

    Args:
        model: a checked `model` node.
        batch: micro-batch per process.
        dtype: of the weights.
        autocast: to bf16.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        network = build(model | {"depth": 1} | ({"checkpointing": None} if "checkpointing" in model else {}))()
        image = torch.zeros(batch, *network.input_shape, dtype=torch.float32)  # batches are not cast
        condition = torch.zeros(batch, dtype=torch.long)
        if (width := getattr(network, "embedding_width", None)) is not None:
            condition = torch.zeros(batch, network.context.num_tokens, width)
        seen: list[Any] = []
        network.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else nullcontext():
            _, everything = saved_bytes(
                lambda: velocity_loss(network, image, image.clone(), torch.zeros(batch), condition), network
            )
            block, (x, *others) = network.blocks[0], seen
            x = x.detach().requires_grad_()
            _, saved = saved_bytes(lambda: block(x, *others), block, others)
            with LiveBytes() as live:
                block(x, *others).sum().backward()
    casts = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2) if autocast else 0
    return Activations(
        block=saved,
        trunk=x.nbytes,
        around=max(0, everything - saved) + 3 * image.nbytes,  # data, noise and their mixture
        working=max(0, live.peak - (saved - x.nbytes)),
        casts=casts,
    )
