"""The MV-Split merge and the norm after it, with a hand-derived backward pass (paper eq. 7–10).

Shapes: B batch, T tokens, D width, S segments.

    Z  = X + β⊙P F + α⊙J(F − X)        X' = RMSNorm(Z)                      (eq. 7)

J takes the mean of each segment, P = I − J. With r the reciprocal root mean square of Z, g the gradient of X' and ⟨·⟩
the mean over the channels of a token:

    Δ  = r·(g − X'·⟨g⊙X'⟩)
    dX = Δ − α⊙Δ̄     dF = β⊙Δ + (α − β)⊙Δ̄     dα = Σ Δ⊙(F̄ − X̄)     dβ = Σ Δ⊙(F − F̄)

A bar is a segment mean. Neither X nor Z is kept for the backward pass: X' is the input of the next branch anyway.

Everything is computed in at least float32, whatever the dtypes of X, F and the gains; X' has X's dtype. A thousand
blocks would round a bfloat16 trunk two thousand times, and the errors add up: see `DiT`'s argument `trunk`.

`MergeNorm` must equal `merge_norm_reference`; the tests compare them in float64. `fused_merge_norm.py` has the same
formulas in Triton.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Segments = tuple[int, ...]
"""Lengths of the consecutive token segments, e.g. (image tokens, context tokens); they add up to T."""


def upcast(x: Tensor) -> Tensor:
    """Cast to float32; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def segment_mean(x: Tensor, segments: Segments, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of each segment's tokens: (B, T, D) → (B, S, D), in `dtype` (default: x's). Zero for an empty segment."""
    parts = x.split(segments, dim=1)
    return torch.stack([s.mean(1, dtype=dtype) if s.shape[1] else s.sum(1, dtype=dtype) for s in parts], dim=1)


def spread(means: Tensor, segments: Segments) -> Tensor:
    """Repeat each segment's row for its tokens: (B, S, D) → (B, T, D). After `segment_mean`, this is J."""
    return torch.cat([means[:, i : i + 1].expand(-1, n, -1) for i, n in enumerate(segments)], dim=1)


def merge_reference(x: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, segments: Segments) -> Tensor:
    """Z, literally as in eq. 7."""
    mean_update = spread(segment_mean(update, segments), segments)  # J F
    mean_x = spread(segment_mean(x, segments), segments)  # J X
    return x + beta * (update - mean_update) + alpha * (mean_update - mean_x)


def merge_norm_reference(
    x: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, segments: Segments, eps: float
) -> Tensor:
    """RMSNorm(Z), differentiated by autograd."""
    z = merge_reference(upcast(x), upcast(update), upcast(alpha), upcast(beta), segments)
    return F.rms_norm(z, (z.shape[-1],), eps=eps).to(x.dtype)


class MergeNorm(torch.autograd.Function):
    """`merge_norm_reference` with a closed-form backward pass: less memory traffic and fewer saved tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, segments: Segments, eps: float
    ) -> Tensor:
        ctx.types = x.dtype, update.dtype, alpha.dtype, beta.dtype
        alpha, beta = upcast(alpha), upcast(beta)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_update, mean_x = segment_mean(update, segments, wide), segment_mean(x, segments, wide)  # (B, S, D)
        z = torch.addcmul(x, beta, update)  # in the widest of the three dtypes
        _add_rows(z, (alpha - beta) * mean_update - alpha * mean_x, segments)
        r = (z.square().mean(-1, keepdim=True) + eps).rsqrt()  # (B, T, 1)
        normed = z.mul_(r)  # X', before it is rounded to a narrower trunk's dtype
        out = normed.to(x.dtype)
        ctx.save_for_backward(normed, r, update, mean_update, mean_x, alpha, beta)
        ctx.segments = segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        normed, r, update, mean_update, mean_x, alpha, beta = ctx.saved_tensors
        segments = ctx.segments
        g = g.to(normed.dtype)
        inner = (g * normed).mean(-1, keepdim=True)  # ⟨g⊙X'⟩
        delta = torch.addcmul(g, normed, inner, value=-1).mul_(r)
        mean_delta = segment_mean(delta, segments)  # (B, S, D)
        sum_delta_update = (delta * update).sum((0, 1))
        found = corrected(delta, mean_delta, sum_delta_update, mean_update, mean_x, alpha, beta, segments)
        gradients = zip(found, ctx.types, strict=True)
        return *(gradient.to(dtype) for gradient, dtype in gradients), None, None


def corrected(
    delta: Tensor,
    mean_delta: Tensor,
    sum_delta_update: Tensor,
    mean_update: Tensor,
    mean_x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, update, alpha and beta.

    Args:
        delta: Δ, (B, T, D); overwritten.
        mean_delta: Δ̄, (B, S, D).
        sum_delta_update: Σ Δ⊙F, (D,).
        mean_update, mean_x: F̄ and X̄, (B, S, D).
        alpha, beta: (D,), at least float32.
        segments: lengths that add up to T.
    """
    # Sums over each segment's tokens. A tensor of segment lengths would have to be copied to the GPU, a sync.
    sum_delta = torch.stack([row * n for row, n in zip(mean_delta.unbind(1), segments, strict=True)], dim=1)
    d_alpha = (sum_delta * (mean_update - mean_x)).sum((0, 1))
    d_beta = sum_delta_update - (sum_delta * mean_update).sum((0, 1))
    d_update = _add_rows(beta * delta, (alpha - beta) * mean_delta, segments)
    return _add_rows(delta, -alpha * mean_delta, segments), d_update, d_alpha, d_beta


def _add_rows(x: Tensor, rows: Tensor, segments: Segments) -> Tensor:
    """Add each segment's row (B, S, D) to its tokens (B, T, D), in place."""
    for part, row in zip(x.split(segments, dim=1), rows.unbind(1), strict=True):
        part += row[:, None]
    return x


def merge_norm(
    x: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, segments: Segments, eps: float, fused: bool = False
) -> Tensor:
    """RMSNorm(X + β⊙P F + α⊙J(F − X)).

    Args:
        x, update: (B, T, D).
        alpha, beta: (D,).
        segments: lengths that add up to T.
        eps: ε of the norm.
        fused: use the Triton kernels; see `KernelChoice`.

    Returns:
        (B, T, D), in x's dtype.
    """
    if fused:
        from mvsplit.kernels import fused_merge_norm  # here: Triton may be missing

        return fused_merge_norm.merge_norm(x, update, alpha, beta, segments, eps)[0]
    out: Tensor = MergeNorm.apply(x, update, alpha, beta, segments, eps)
    return out
