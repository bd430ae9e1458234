"""Activation checkpointing: keep few activations, compute the others again in the backward pass.

L blocks, a: bytes that autograd keeps of one block, c: bytes of the trunk between two blocks. The first R blocks are
recomputed in groups of k, of which only the input is kept; the other L − R keep everything. The backward pass begins
with those, and has given them up when the first group is recomputed. So about

    ⌈R/k⌉·c + max(L − R, k)·a

bytes are held at the worst moment. With R = L − k that is least near k = √(L·c/a), and a is 15 to 27 times c here.
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
        """Most bytes of activations held at a time. saved: a of a block. trunk: c, or 0 if it is kept elsewhere."""
        return self.groups * trunk + max(depth - self.recomputed, self.largest_group) * saved


@lru_cache
def choose(depth: int, saved: int, trunk: int, budget: float | None) -> Schedule:
    """The schedule with the fewest recomputed blocks that fits the budget, else that of least memory.

    The last k blocks are never recomputed: it would free nothing, they are the first that the backward pass asks for.

    Args:
        depth: L. saved: a, bytes. trunk: c, bytes. budget: bytes; None is none at all.
    """

    def peak(schedule: Schedule) -> int:
        return schedule.peak_bytes(depth, saved, trunk)

    def fewest(every: int, budget: float) -> Schedule:
        """The more of the L − k blocks are recomputed, the less is held: the first that fits."""
        recomputed = range(depth - every)
        return Schedule(bisect_left(recomputed, True, key=lambda r: peak(Schedule(r, every)) <= budget), every)

    least = min((Schedule(depth - every, every) for every in range(1, depth + 1)), key=peak)
    if budget is None or peak(least) > budget:
        return least
    fitting = [schedule for every in range(1, depth + 1) if peak(schedule := fewest(every, budget)) <= budget]
    return min(fitting, key=lambda schedule: (schedule.recomputed, peak(schedule)))


class HostMemory:
    """Where the inputs of recomputed groups wait for the backward pass; their places are used again in the next step.

    From a GPU they go to page-locked memory, both ways in line with its other work, and the host does not wait. PyTorch
    rounds each page-locked allocation up to a power of two: 134 MB for a trunk of 68. So places are cut from chunks of
    such a size.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}

    def pack(self, tensor: Tensor) -> "_Kept":
        """Copy a tensor here."""
        place = self._place(tensor.nbytes, tensor.is_cuda)
        host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        return _Kept(host, tensor.device, place, self._free[len(place), tensor.is_cuda])

    @staticmethod
    def unpack(kept: "_Kept") -> Tensor:
        """A copy of it where it came from."""
        return kept.host.to(kept.device, non_blocking=True, copy=True)

    def _place(self, size: int, pinned: bool) -> Tensor:
        size = -(-size // 512) * 512  # whole cache lines, whatever type comes next
        free = self._free.setdefault((size, pinned), [])
        if not free:
            chunk = empty(chunk_size(size), dtype=uint8, pin_memory=pinned)
            free += chunk[: len(chunk) // size * size].split(size)
        return free.pop()


@dataclass
class _Kept:
    """A tensor's numbers in host memory. Its place is free again once nothing refers to this."""

    host: Tensor
    device: device
    place: Tensor
    free: list[Tensor]

    def __del__(self) -> None:
        self.free.append(self.place)


def chunk_size(size: int) -> int:
    """The smallest power of two that places of this size fill to nine tenths."""
    least = 1 << (size - 1).bit_length()
    return next(chunk for chunk in (least << n for n in count()) if chunk // size * size >= 0.9 * chunk)


class Checkpointing:
    """Runs a stack of blocks with activation checkpointing.

    Recomputation draws the random numbers of the forward pass again, and gives the same gradients to the bit where the
    operations do (on CPUs).

    Args:
        every: k, blocks per group; 0 keeps all activations; `auto` measures, at the first training batch, what a block
            keeps and takes `choose`'s schedule.
        fraction: share of the blocks that are recomputed, the first ones (paper: 3 of 4).
        budget_gib: bytes, in GiB, that `auto` may use for the activations of a process; None takes the schedule of
            least memory.
        offload: keep the groups' inputs in host memory (pinned if they come from a GPU).

    Raises:
        ValueError: naming the key, for settings that contradict each other.
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
            raise ValueError(f"{key}.budget_gib = {budget_gib}: only for every=auto, and every = {every}")
        if fraction != 1 and every in (0, "auto"):
            raise ValueError(f"{key}.fraction = {fraction}: only for every=1, 2, …, and every = {every}")
        if offload and every == 0:
            raise ValueError(f"{key}.offload = {offload}: every = 0 recomputes nothing, so there is nothing to offload")

    def schedule(self, depth: int, saved: int, trunk: int) -> Schedule:
        """What is recomputed. depth: L. saved, trunk: a and c in bytes, which only `auto` looks at."""
        if self.every == "auto":
            budget = None if self.budget_gib is None else self.budget_gib * 2**30
            return choose(depth, saved, 0 if self.offload else trunk, budget)
        assert isinstance(self.every, int)
        return Schedule(round(self.fraction * depth), self.every) if self.every else Schedule(0, 0)

    def likely_group(self, depth: int) -> int:
        """Blocks that are recomputed together; with `auto` about those that it chooses without a budget."""
        return self.every if isinstance(self.every, int) else round(math.sqrt(depth / 20))

    def run(self, blocks: Iterable[nn.Module], x: Tensor, *args: Any) -> Tensor:
        """`block(x, *args)` for one block after the other. x, and the result: (B, T, D)."""
        blocks = list(blocks)  # slices of a ModuleList are new modules
        if not is_grad_enabled():
            return _run(blocks, x, args)
        if not x.requires_grad:
            x.requires_grad_()  # below frozen layers; else ZeRO-3 would not gather a block's weights for its backward
        done = 0
        if self.every != "auto":
            schedule = self.schedule(len(blocks), 0, 0)
        elif (key := (len(blocks), x.shape, x.dtype)) in self._chosen:
            schedule = self._chosen[key]
        else:
            trunk = x.nbytes
            x, saved = saved_bytes(lambda: blocks[0](x, *args), blocks[0], args)
            done = 1  # once, the first block keeps what it saved: no block runs for the measurement alone
            schedule = self._chosen[key] = self.schedule(len(blocks), saved, trunk)
            self._tell(schedule, len(blocks), saved, trunk)
        for first in range(0, schedule.recomputed, schedule.every or 1):
            group = blocks[max(first, done) : min(first + schedule.every, schedule.recomputed)]
            if group:
                with saved_tensors_hooks(self._host.pack, self._host.unpack) if self.offload else nullcontext():
                    # Around the group's input alone: what the group itself saves is checkpoint's, which drops it.
                    x = checkpoint(_run, group, x, args, use_reentrant=False)
        return _run(blocks[max(schedule.recomputed, done) :], x, args)

    def _tell(self, schedule: Schedule, depth: int, saved: int, trunk: int) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            return
        needed = schedule.peak_bytes(depth, saved, 0 if self.offload else trunk) / 2**30
        log.info(f"checkpointing: {schedule.describe(depth)}; activations of the blocks take {needed:.2f} GiB")
        if self.budget_gib is not None and needed > self.budget_gib:
            log.warning(
                f"model.checkpointing.budget_gib = {self.budget_gib}: even the schedule of least memory needs"
                f" {needed:.2f} GiB; a smaller batch or more devices would fit"
            )


def _run(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Any, ...]) -> Tensor:
    for block in blocks:
        x = block(x, *args)
    return x


def saved_bytes(run: Callable[[], Tensor], module: nn.Module, shared: Sequence[Any] = ()) -> tuple[Tensor, int]:
    """Run something and count what autograd keeps of it for the backward pass.

    Args:
        run: calls `module`, whose parameters do not count.
        shared: tensors that do not count either: they are there anyway, whatever the number of blocks.

    Returns:
        The result of `run()`, and the bytes of the distinct storages that it keeps, its input included.
    """
    sizes: dict[int, int] = {}
    others = {_identity(t) for t in shared if isinstance(t, Tensor)}

    def pack(tensor: Tensor) -> Tensor:
        # Asked each time: sharded parameters have their storage only while the module runs.
        if _identity(tensor) not in others.union(_identity(p.data) for p in module.parameters()):
            sizes[_identity(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(sizes.values())


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
