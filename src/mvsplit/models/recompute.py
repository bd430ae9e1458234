"""Activation checkpointing: keep few activations, recompute the others in the backward pass.

L blocks; a: bytes that autograd keeps of one block; c: bytes of the trunk between two blocks. The first R blocks are
recomputed in groups of k, of which only the input is kept. The other L − R blocks keep everything; the backward pass
starts with them, and has freed them when it recomputes the first group. So the peak is about

    ⌈R/k⌉·c + max(L − R, k)·a

bytes. With R = L − k it is lowest near k = √(L·c/a); here a is 15 to 27 times c.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, device, distributed, empty, is_grad_enabled, nn, uint8
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Which blocks are recomputed: the first `recomputed` ones, in groups of `every`."""

    recomputed: int
    every: int

    @property
    def groups(self) -> int:
        return math.ceil(self.recomputed / self.every) if self.recomputed else 0

    @property
    def largest_group(self) -> int:
        return min(self.every, self.recomputed)

    def describe(self, depth: int) -> str:
        groups = f", in groups of {self.every}" if self.recomputed else ""
        return f"{self.recomputed} of {depth} blocks are recomputed{groups}"

    def peak_bytes(self, depth: int, saved: int, trunk: int) -> int:
        """Peak of the activations. `saved`: a, in bytes; `trunk`: c, or 0 if the groups' inputs are offloaded."""
        return self.groups * trunk + max(depth - self.recomputed, self.largest_group) * saved


@lru_cache
def choose(depth: int, saved: int, trunk: int, budget: float | None) -> Schedule:
    """The schedule with the fewest recomputed blocks that fits the budget, else the one with the lowest peak.

    The last k blocks are never recomputed: the backward pass needs them first, so it would save nothing.

    Args:
        depth: L.
        saved: a, in bytes.
        trunk: c, in bytes.
        budget: in bytes; None chooses the lowest peak.
    """

    def peak(schedule: Schedule) -> int:
        return schedule.peak_bytes(depth, saved, trunk)

    def fewest(every: int, budget: float) -> Schedule:
        """The peak falls with each block that is recomputed: the first schedule that fits."""
        recomputed = range(depth - every)
        return Schedule(bisect_left(recomputed, True, key=lambda r: peak(Schedule(r, every)) <= budget), every)

    least = min((Schedule(depth - every, every) for every in range(1, depth + 1)), key=peak)
    if budget is None or peak(least) > budget:
        return least
    fitting = [schedule for every in range(1, depth + 1) if peak(schedule := fewest(every, budget)) <= budget]
    return min(fitting, key=lambda schedule: (schedule.recomputed, peak(schedule)))


class HostMemory:
    """Host memory for the inputs of recomputed groups, reused in the next step.

    Inputs on a GPU are copied to and from page-locked memory on its stream; the host does not wait. PyTorch rounds
    each page-locked allocation up to a power of two, so 68 MB would take 134: buffers are cut from such chunks.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}

    def pack(self, tensor: Tensor) -> "_Kept":
        """Copy a tensor to host memory."""
        place = self._place(tensor.nbytes, tensor.is_cuda)
        host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        return _Kept(host, tensor.device, place, self._free[len(place), tensor.is_cuda])

    @staticmethod
    def unpack(kept: "_Kept") -> Tensor:
        """Copy it back to its device."""
        return kept.host.to(kept.device, non_blocking=True, copy=True)

    def _place(self, size: int, pinned: bool) -> Tensor:
        size = -(-size // 512) * 512  # whole cache lines, for any dtype
        free = self._free.setdefault((size, pinned), [])
        if not free:
            chunk = empty(chunk_size(size), dtype=uint8, pin_memory=pinned)
            free += chunk[: len(chunk) // size * size].split(size)
        return free.pop()


@dataclass
class _Kept:
    """A tensor's values in host memory. The buffer is free again when this object is deleted."""

    host: Tensor
    device: device
    place: Tensor
    free: list[Tensor]

    def __del__(self) -> None:
        self.free.append(self.place)


def chunk_size(size: int) -> int:
    """The smallest power of two that buffers of this size fill to nine tenths."""
    least = 1 << (size - 1).bit_length()
    return next(chunk for chunk in (least << n for n in count()) if chunk // size * size >= 0.9 * chunk)


class Checkpointing:
    """Runs a stack of blocks with activation checkpointing.

    Recomputation uses the random numbers of the forward pass. Gradients are equal to the bit if the operations are
    deterministic (they are on CPUs). Not so for compiled blocks in groups of one: their recomputation is compiled into
    the backward pass, which is faster, but may round differently.

    Args:
        every: k, blocks per group; 0 keeps all activations; `auto` measures a block at the first training batch and
            uses `choose`'s schedule.
        fraction: share of the blocks that are recomputed, starting with the first (paper: 3 of 4).
        budget_gib: memory for the activations of a process with `auto`; None chooses the schedule with the lowest peak.
        offload: keep the groups' inputs in host memory (pinned, for those on a GPU).

    Raises:
        ValueError: for settings that contradict each other; names the key.
    """

    def __init__(
        self,
        every: NonNegativeInt | Literal["auto"] = 0,
        fraction: Annotated[float, Gt(0), Le(1)] = 1.0,
        budget_gib: PositiveFloat | None = None,
        offload: bool = False,
    ) -> None:
        self.check(every, fraction, budget_gib, offload)
        self.every, self.fraction, self.budget_gib, self.offload = every, fraction, budget_gib, offload
        self._host = HostMemory()
        self._chosen: dict[Any, Schedule] = {}

    @staticmethod
    def check(every: int | str, fraction: float, budget_gib: float | None, offload: bool) -> None:
        """Raise `ValueError` for settings that contradict each other; called before anything is built."""
        key = "model.checkpointing"
        if budget_gib is not None and every != "auto":
            raise ValueError(f"{key}.budget_gib = {budget_gib}: only allowed with every=auto, but every = {every}")
        if fraction != 1 and every in (0, "auto"):
            raise ValueError(f"{key}.fraction = {fraction}: only allowed with every=1, 2, …, but every = {every}")
        if offload and every == 0:
            raise ValueError(f"{key}.offload = {offload}: nothing to offload, since every = 0 recomputes nothing")

    def schedule(self, depth: int, saved: int, trunk: int) -> Schedule:
        """What is recomputed in `depth` (L) blocks. `saved`, `trunk`: a and c in bytes, used by `auto` only."""
        if self.every == "auto":
            budget = None if self.budget_gib is None else self.budget_gib * 2**30
            return choose(depth, saved, 0 if self.offload else trunk, budget)
        return Schedule(round(self.fraction * depth), self.every) if self.every else Schedule(0, 0)

    def likely_group(self, depth: int) -> int:
        """Blocks per group; for `auto` an estimate of what it chooses without a budget."""
        return self.every if isinstance(self.every, int) else round(math.sqrt(depth / 20))

    def run(self, blocks: Iterable[nn.Module], x: Tensor, *args: Any) -> Tensor:
        """Apply `x = block(x, *args)` block by block. x, and the result: (B, T, D)."""
        blocks = list(blocks)  # slices of a ModuleList are new modules
        if not is_grad_enabled():
            return _run(blocks, x, args)
        if not x.requires_grad:
            x.requires_grad_()  # after frozen layers; else ZeRO-3 would not gather a block's weights for its backward
        done = 0
        if self.every != "auto":
            schedule = self.schedule(len(blocks), 0, 0)
        elif (key := (len(blocks), x.shape, x.dtype)) in self._chosen:
            schedule = self._chosen[key]
        else:
            trunk = x.nbytes
            x, saved = saved_bytes(lambda: blocks[0](x, *args), blocks[0], args)
            done = 1  # in this step the first block keeps its activations: it need not run twice to be measured
            schedule = self._chosen[key] = self.schedule(len(blocks), saved, trunk)
            self._log(schedule, len(blocks), saved, trunk)
        for first in range(0, schedule.recomputed, schedule.every or 1):
            group = blocks[max(first, done) : min(first + schedule.every, schedule.recomputed)]
            if schedule.every == 1 and group and not self.offload and _compiles(group[0], x, args):
                x = group[0](x, *args, recompute=True)  # the recomputation is compiled too
            elif group:
                with saved_tensors_hooks(self._host.pack, self._host.unpack) if self.offload else nullcontext():
                    # Offloads the group's input alone: `checkpoint` drops what is saved inside.
                    x = checkpoint(_run, group, x, args, use_reentrant=False)
        return _run(blocks[max(schedule.recomputed, done) :], x, args)

    def _log(self, schedule: Schedule, depth: int, saved: int, trunk: int) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            return
        needed = schedule.peak_bytes(depth, saved, 0 if self.offload else trunk) / 2**30
        log.info(f"checkpointing: {schedule.describe(depth)}; the blocks' activations need {needed:.2f} GiB")
        if self.budget_gib is not None and needed > self.budget_gib:
            log.warning(
                f"model.checkpointing.budget_gib = {self.budget_gib}: the schedule with the lowest peak needs"
                f" {needed:.2f} GiB; use a smaller batch or more devices"
            )


def _compiles(block: Any, x: Tensor, args: tuple[Any, ...]) -> bool:
    return getattr(block, "runs_compiled", False) and block.worth_compiling(x, *args)


def _run(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Any, ...]) -> Tensor:
    for block in blocks:
        x = block(x, *args)
    return x


def saved_bytes(run: Callable[[], Tensor], module: nn.Module, shared: Sequence[Any] = ()) -> tuple[Tensor, int]:
    """Call a function and count the bytes that autograd keeps for its backward pass.

    Args:
        run: calls `module`, whose parameters are not counted.
        shared: tensors that are not counted either, since all blocks share them.

    Returns:
        The result of `run()`, and the bytes of the distinct storages that are kept, including the input's but not the
        result's: it is the next block's input, and counted there.
    """
    sizes: dict[int, int] = {}
    others = {_identity(t) for t in shared if isinstance(t, Tensor)}

    def pack(tensor: Tensor) -> Tensor:
        # Looked up each time: sharded parameters have a storage only while the module runs.
        if _identity(tensor) not in others.union(_identity(p.data) for p in module.parameters()):
            sizes[_identity(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    sizes.pop(_identity(result), None)
    return result, sum(sizes.values())


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
