"""RoPE, QK-norm and the split into heads in Triton; `rope_norm.py` has the formulas, and their plain form.

Shapes: B batch, T tokens, D width, H heads, E head dimension (D/H).

With n a rotated, normalised query or key, r its reciprocal root mean square, g its gradient and ⟨·⟩ the mean over its
E channels, the gradient is the inverse rotation of r·(g − n·⟨g⊙n⟩): a rotation keeps norms. So the input is not kept.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.triton_ops import accumulator, operator, power_of_two, wrap_triton


@triton.jit
def _normed(source, target, r, r_at, at, keep, line_keep, cos, sin, HALF: tl.constexpr, EPS: tl.constexpr):
    """Rotate and normalise rows of two halves; `at`: places in `source` and `target`."""
    first = tl.load(source + at[0], keep, other=0).to(cos.dtype)
    second = tl.load(source + at[0] + HALF, keep, other=0).to(cos.dtype)
    turned1, turned2 = first * cos - second * sin, second * cos + first * sin
    scale = tl.rsqrt(tl.sum(turned1 * turned1 + turned2 * turned2, 1) / (2 * HALF) + EPS)
    tl.store(target + at[1], turned1 * scale[:, None], keep)
    tl.store(target + at[1] + HALF, turned2 * scale[:, None], keep)
    tl.store(r + r_at, scale, line_keep)


@triton.jit
def _copied(source, target, at, keep, HALF: tl.constexpr):
    tl.store(target + at[1], tl.load(source + at[0], keep), keep)
    tl.store(target + at[1] + HALF, tl.load(source + at[0] + HALF, keep), keep)


@triton.jit
def _gradient(g, normed, r, target, r_at, at, keep, line_keep, cos, sin, HALF: tl.constexpr):
    """The gradient of rows before their rotation; `at`: places in `target`, and in `g` and `normed`."""
    n1 = tl.load(normed + at[1], keep, other=0).to(cos.dtype)
    n2 = tl.load(normed + at[1] + HALF, keep, other=0).to(cos.dtype)
    g1 = tl.load(g + at[1], keep, other=0).to(cos.dtype)
    g2 = tl.load(g + at[1] + HALF, keep, other=0).to(cos.dtype)
    inner = tl.sum(g1 * n1 + g2 * n2, 1, keep_dims=True) / (2 * HALF)
    scale = tl.load(r + r_at, line_keep, other=0)[:, None]
    d1, d2 = scale * (g1 - n1 * inner), scale * (g2 - n2 * inner)
    tl.store(target + at[0], d1 * cos + d2 * sin, keep)
    tl.store(target + at[0] + HALF, d2 * cos - d1 * sin, keep)


@triton.jit
def _places(
    cos, sin, rows, tokens, ACC: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Of a program's rows, which are heads of tokens: places in qkv and in q, rotations, and what exists."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = line[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    keep = (row < rows) & (column < HALF)
    number = row // H
    packed = number.to(tl.int64) * (6 * H * HALF) + (row % H) * (2 * HALF) + column
    apart = row.to(tl.int64) * (2 * HALF) + column
    angle = (number % tokens) * (2 * HALF) + column
    # The tables repeat themselves: cosines (c, c), sines (s, -s). So `sine` is -s, and the kernels turn by its angle.
    cosine = tl.load(cos + angle, keep, other=0).to(ACC)
    sine = tl.load(sin + angle + HALF, keep, other=0).to(ACC)
    return packed, apart, cosine, sine, line, line < rows, keep


@triton.jit
def _forward_kernel(
    qkv, cos, sin, q, k, v, r, rows, tokens,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    packed, apart, c, s, line, line_keep, keep = _places(
        cos, sin, rows, tokens, r.dtype.element_ty, H, HALF, BLOCK, ROWS
    )
    D: tl.constexpr = 2 * H * HALF
    _normed(qkv, q, r, line, (packed, apart), keep, line_keep, c, s, HALF, EPS)
    _normed(qkv + D, k, r, line + rows, (packed, apart), keep, line_keep, c, s, HALF, EPS)
    _copied(qkv + 2 * D, v, (packed, apart), keep, HALF)


@triton.jit
def _backward_kernel(
    dq, dk, dv, q, k, r, cos, sin, d_qkv, rows, tokens,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    packed, apart, c, s, line, line_keep, keep = _places(
        cos, sin, rows, tokens, r.dtype.element_ty, H, HALF, BLOCK, ROWS
    )
    D: tl.constexpr = 2 * H * HALF
    _gradient(dq, q, r, d_qkv, line, (packed, apart), keep, line_keep, c, s, HALF)
    _gradient(dk, k, r, d_qkv + D, line + rows, (packed, apart), keep, line_keep, c, s, HALF)
    _copied(dv, d_qkv + 2 * D, (apart, packed), keep, HALF)


def _sizes(heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """H, E/2, and the columns and rows of a program."""
    block = power_of_two(head_dim // 2)
    return heads, head_dim // 2, block, max(1, 1024 // block)


@operator("rope_norm")
def rope_norm(
    qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mvsplit.kernels.rope_norm.rope_norm`, and what its backward pass needs.

    Returns:
        q, k and v, (B, T, H, E) each; r (2, B, T, H) of q and k.
    """
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (qkv.new_empty((batch, tokens, num_heads, width // num_heads)) for _ in range(3))
    r = qkv.new_empty((2, batch, tokens, num_heads), dtype=accumulator(qkv))
    sizes = _sizes(num_heads, width // num_heads)
    rows = batch * tokens * num_heads
    wrap_triton(_forward_kernel)[(triton.cdiv(rows, sizes[3]),)](
        qkv, cos, sin, q, k, v, r, rows, tokens, *sizes, eps, num_warps=4
    )
    return q, k, v, r


@operator("rope_norm_backward")
def rope_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, r: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of qkv, (B, T, 3·D), from those of q, k and v, (B, T, H, E) each; the others as in `rope_norm`."""
    dq, dk, dv, cos, sin = dq.contiguous(), dk.contiguous(), dv.contiguous(), cos.contiguous(), sin.contiguous()
    batch, tokens, num_heads, head_dim = q.shape
    d_qkv = q.new_empty((batch, tokens, 3 * num_heads * head_dim))
    sizes = _sizes(num_heads, head_dim)
    rows = batch * tokens * num_heads
    wrap_triton(_backward_kernel)[(triton.cdiv(rows, sizes[3]),)](
        dq, dk, dv, q, k, r, cos, sin, d_qkv, rows, tokens, *sizes, num_warps=4
    )
    return d_qkv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, cos, sin, *_ = inputs
    q, k, _, r = output
    ctx.save_for_backward(q, k, r, cos, sin)
    ctx.mark_non_differentiable(r)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    q, k, r, cos, sin = ctx.saved_tensors
    return rope_norm_backward(dq, dk, dv, q, k, r, cos, sin), None, None, None, None


rope_norm.register_autograd(_backward, setup_context=_keep)
