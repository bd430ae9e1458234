"""Rotary position embedding, then QK-norm without weights, and the split into heads.

Shapes: B batch, T tokens, D width, H heads, E head dimension (D/H).

`fused_rope_norm.py` has the same formulas in Triton.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mvsplit.kernels.merge_norm import upcast


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each plane (i, i + E/2): (a, b) → (a·cos + b·sin, b·cos − a·sin).

    This is the direction of the reference code, so that its released weights are used as they are stored. Most language
    models rotate the other way, and so did version 0.1 of this project: its checkpoints draw nothing sensible now.

    Args:
        x: (B, H, T, E) queries or keys.
        cos, sin: (T, E) from `rope_table`.
    """
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def rope_norm(
    qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, num_heads: int, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated, normalised queries and keys, and values. Computed in at least float32.

    Args:
        qkv: (B, T, 3·D): all queries, all keys, all values.
        cos, sin: (T, E) from `rope_table`.
        eps: ε of the norm.
        num_heads: H.
        fused: use the Triton kernels; see `KernelChoice`.

    Returns:
        q, k and v, (B, H, T, E) each, in qkv's dtype.
    """
    if fused:
        from mvsplit.kernels import fused_rope_norm  # here: Triton may be missing

        q, k, v, _ = fused_rope_norm.rope_norm(qkv, cos, sin, eps, num_heads)  # (B, T, H, E)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    qkv = qkv.unflatten(-1, (3, num_heads, -1))  # (B, T, 3, H, E)
    qk = qkv[:, :, :2].permute(2, 0, 3, 1, 4).flatten(0, 1)  # (2B, H, T, E): one pass for both
    rotated = apply_rope(upcast(qk), cos, sin)
    q, k = F.rms_norm(rotated, (rotated.shape[-1],), eps=eps).to(qkv.dtype).chunk(2)
    return q, k, qkv[:, :, 2].transpose(1, 2)
