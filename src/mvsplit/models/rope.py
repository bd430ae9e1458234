"""Two-dimensional rotary position embedding (paper: θ = 10000, half of each head for rows, half for columns).

Shapes: B batch, H heads, T tokens, I image tokens (rows·columns), E head dimension.
"""

import torch
from torch import Tensor


def rope_table(rows: int, columns: int, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a rows × columns grid of tokens in raster order.

    Of the head_dim/2 rotation planes the first half turns with the row, the second with the column, each with
    frequencies θ^(−k/(head_dim/4)), k = 0 … head_dim/4 − 1.

    Returns:
        Two float32 tensors (I, head_dim/2).

    Raises:
        ValueError: if head_dim is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim = {head_dim}: two-dimensional RoPE needs width / num_heads divisible by 4")
    planes = head_dim // 4
    frequency = theta ** (-torch.arange(planes, dtype=torch.float64) / planes)
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)  # (I, E/2)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the planes (i, i + E/2) of the first I tokens; the tokens after them (context) stay as they are.

    Args:
        x: (B, H, T, E) queries or keys, T ≥ I. cos, sin: (I, E/2) from `rope_table`.
    """
    num_image = cos.shape[0]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x[..., :num_image, :].chunk(2, dim=-1)  # (B, H, I, E/2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, x[..., num_image:, :]], dim=-2)
