"""How Triton kernels become PyTorch operators: on a GPU, in Triton's interpreter, and for offline compilation.

Import this only where Triton is installed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), then also on tensors of a CPU."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its arguments by name, and `num_warps`."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int


_launches: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches inside; with fake tensors, on a machine without a GPU too."""
    global _launches
    launches: list[Launch] = []
    _launches = launches
    try:
        yield launches
    finally:
        _launches = None


class _Starter:
    """Starts a kernel by `starter[grid](…)`."""

    def __init__(self, kernel: Any, start: Any) -> None:
        self.kernel, self.start = kernel, start

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        def start(*args: Any, num_warps: int = 4) -> None:
            if _launches is not None:
                _launches.append(Launch(self.kernel, dict(zip(self.kernel.arg_names, args, strict=True)), num_warps))
            elif self.start is not None:
                self.start[grid](*args, num_warps=num_warps)
            elif not any(isinstance(arg, FakeTensor) for arg in args):  # the interpreter needs values
                self.kernel[grid](*args, num_warps=num_warps)

        return start


def wrap_triton(kernel: Any) -> _Starter:
    """Like `torch.library.wrap_triton`, also for interpreted and recorded kernels.

    It has the same name, because PyTorch looks for calls of it in the source of an operator: the kernels' source is
    part of the key under which it caches compiled code.
    """
    return _Starter(kernel, None if INTERPRETED else torch.library.wrap_triton(kernel))


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of tensors, which starts kernels, as an operator of PyTorch.

    Args:
        name: after `mvsplit::`.
    """

    def register(function: Callable[..., Any]) -> Any:
        if INTERPRETED:  # opaque: what traces an operator would not see the calls of an interpreted kernel
            made = torch.library.custom_op(f"mvsplit::{name}", function, mutates_args=())
            made.register_fake(function)
            return made
        return torch.library.triton_op(f"mvsplit::{name}", function, mutates_args=())

    return register


def accumulator(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of all arithmetic: float32, or float64 if an input is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@dataclass(frozen=True)
class Tile:
    """How a program walks over rows of D channels.

    Attributes:
        block: columns at a time, a power of two.
        rows: rows at a time.
        tokens: rows of a program.
        num_warps: with 8 elements of a row to a thread; so four warps read 1024 bfloat16 columns 16 bytes at a time.
    """

    block: int
    rows: int
    tokens: int
    num_warps: int


def whole_rows(width: int) -> Tile:
    """For kernels that need a whole row at a time, and sum columns over a program's rows."""
    block = power_of_two(width)
    rows = max(1, 1024 // block)
    # 16 rows: few enough for some hundreds of programs, enough to make the traffic of column sums small.
    return Tile(block, rows, max(16, 4 * rows), min(16, max(1, block * rows // 256)))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()
