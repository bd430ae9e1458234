"""Multi-head self-attention as the paper has it: RoPE first, then QK-norm without weights, no biases.

The rotary position embedding is two-dimensional (paper: θ = 10000, half of each head for rows, half for columns).

Shapes: B batch, T tokens (image, then context), D width, H heads, E head dimension (D/H).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.kernels.rope_norm import rope_norm
from mvsplit.models.layers import Linear


def rope_table(
    rows: int,
    columns: int,
    head_dim: int,
    theta: float = 10000.0,
    num_context: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a rows × columns grid of image tokens in raster order, then context tokens.

    Channels i and i + E/2 rotate in one plane. Of these E/2 planes the first half rotates with the row, the second with
    the column, each with frequencies θ^(−k/(E/4)), k = 0 … E/4 − 1. Context tokens are not rotated.

    Returns:
        Two float32 tensors (T, E). The sine's second half is negative: see `apply_rope`.

    Raises:
        ValueError: if head_dim is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim = {head_dim}: two-dimensional RoPE needs width / num_heads divisible by 4")
    planes = head_dim // 4
    # From integers: under DeepSpeed's partitioned construction in bf16 `torch.arange` returns bf16 for any float dtype,
    # and the frequencies would be off by 1/256.
    frequency = theta ** (-torch.arange(planes, device=device).double() / planes)
    row = torch.arange(rows, device=device).double()[:, None].expand(-1, columns).flatten()
    column = torch.arange(columns, device=device).double().repeat(rows)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)  # (rows·columns, E/2)
    angle = torch.cat([angle, angle.new_zeros(num_context, 2 * planes)])  # (T, E/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([cos, cos], dim=1), torch.cat([sin, -sin], dim=1)


class Attention(nn.Module):
    """Full (unmasked) attention over image and context tokens; scale 1/√E.

    Args:
        width: D.
        num_heads: H.
        qk_eps: ε of the query/key norm (reference code: 1e-6).
        writer_std: initial standard deviation of the writer W_O (see `Residual.writer_std`).

    Attributes:
        fused: whether RoPE and QK-norm use the Triton kernels; set by the network.
    """

    fused = False

    def __init__(self, width: int, num_heads: int, qk_eps: float = 1e-6, writer_std: float | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_eps = qk_eps
        self.qkv = Linear(width, 3 * width)  # rows: all queries, all keys, all values
        self.proj = Linear(width, width, std=writer_std)

    def heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the output of `self.qkv`, (B, T, 3·D), into rotated, normalised q and k, and v: (B, H, T, E) each.

        RoPE and QK-norm are computed in at least float32; the results have the dtype of `qkv`.
        """
        return rope_norm(qkv, cos, sin, self.qk_eps, self.num_heads, self.fused)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend. x: (B, T, D); cos, sin: (T, E) from `rope_table`. Returns (B, T, D)."""
        out = F.scaled_dot_product_attention(*self.heads(self.qkv(x), cos, sin))  # (B, H, T, E)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)
