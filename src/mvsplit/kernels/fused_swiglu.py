"""The pointwise part of SwiGLU in Triton; `swiglu.py` has the formula, and its plain form.

Shapes: B batch, T tokens, F feed-forward hidden width, N rows (B·T).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.triton_ops import operator, power_of_two, wrap_triton


@triton.jit
def _places(rows, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Of a program's part of (N, F): places in (N, F) and in (N, 2·F), and which exist."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row * F + column, row * (2 * F) + column, (row < rows) & (column < F)


@triton.jit
def _wide(x):
    """float64 stays, all others become float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _forward_kernel(packed, out, rows, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    at, packed_at, keep = _places(rows, F, BLOCK, ROWS)
    gate = _wide(tl.load(packed + packed_at, keep, other=0))
    value = _wide(tl.load(packed + packed_at + F, keep, other=0))
    tl.store(out + at, gate / (1 + tl.exp(-gate)) * value, keep)


@triton.jit
def _backward_kernel(g, packed, d_packed, rows, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    at, packed_at, keep = _places(rows, F, BLOCK, ROWS)
    gate = _wide(tl.load(packed + packed_at, keep, other=0))
    value = _wide(tl.load(packed + packed_at + F, keep, other=0))
    grad = _wide(tl.load(g + at, keep, other=0))
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    tl.store(d_packed + packed_at, grad * value * (sigmoid + silu * (1 - sigmoid)), keep)
    tl.store(d_packed + packed_at + F, grad * silu, keep)


def _start(rows: int, hidden: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The grid, and the sizes that kernels take."""
    block = next((size for size in (1024, 512, 256) if hidden % size == 0), min(1024, power_of_two(hidden)))
    at_once = 1024 // block
    return (triton.cdiv(rows, at_once), triton.cdiv(hidden, block)), (rows, hidden, block, at_once)


@operator("swiglu")
def swiglu(packed: Tensor) -> Tensor:
    """`mvsplit.kernels.swiglu.swiglu`: (B, T, 2·F) → (B, T, F)."""
    packed = packed.contiguous()
    out = packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))
    grid, sizes = _start(packed.shape[0] * packed.shape[1], out.shape[-1])
    wrap_triton(_forward_kernel)[grid](packed, out, *sizes, num_warps=4)
    return out


@operator("swiglu_backward")
def swiglu_backward(g: Tensor, packed: Tensor) -> Tensor:
    """The gradient of `packed`, (B, T, 2·F), from that of the result, g (B, T, F)."""
    g, packed = g.contiguous(), packed.contiguous()
    d_packed = torch.empty_like(packed)
    grid, sizes = _start(g.shape[0] * g.shape[1], g.shape[-1])
    wrap_triton(_backward_kernel)[grid](g, packed, d_packed, *sizes, num_warps=4)
    return d_packed


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> Tensor:
    (packed,) = ctx.saved_tensors
    return swiglu_backward(g, packed)


swiglu.register_autograd(_backward, setup_context=_keep)
