"""Two-dimensional rotary position embedding (paper: θ = 10000, half of each head for rows, half for columns).

Shapes: B batch, H heads, T tokens (image, then context), E head dimension.
"""

import torch
from torch import Tensor


def rope_table(
    rows: int, columns: int, head_dim: int, theta: float = 10000.0, num_context: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a rows × columns grid of image tokens in raster order, then context tokens.

    Channel i turns in a plane with channel i + E/2. Of these E/2 planes the first half turns with the row, the second
    with the column, each with frequencies θ^(−k/(E/4)), k = 0 … E/4 − 1. Context tokens are not turned.

    Returns:
        Two float32 tensors (T, E). The sine's first half is negative: see `apply_rope`.

    Raises:
        ValueError: if head_dim is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim = {head_dim}: two-dimensional RoPE needs width / num_heads divisible by 4")
    planes = head_dim // 4
    # From integers: under DeepSpeed's partitioned construction in bf16 `torch.arange` makes bf16 of any float it is
    # asked for, and the frequencies would be off by 1/256.
    frequency = theta ** (-torch.arange(planes).double() / planes)
    row = torch.arange(rows).double().repeat_interleave(columns)
    column = torch.arange(columns).double().repeat(rows)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)  # (rows·columns, E/2)
    angle = torch.cat([angle, angle.new_zeros(num_context, 2 * planes)])  # (T, E/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each plane (i, i + E/2): (a, b) → (a·cos − b·sin, b·cos + a·sin).

    Args:
        x: (B, H, T, E) queries or keys. cos, sin: (T, E) from `rope_table`.
    """
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))
