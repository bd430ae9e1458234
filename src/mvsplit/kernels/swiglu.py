"""The pointwise part of SwiGLU.

Shapes: B batch, T tokens, F feed-forward hidden width.

`fused_swiglu.py` has the same formula in Triton.
"""

from torch import Tensor
from torch.nn import functional as F


def swiglu(packed: Tensor, fused: bool = False) -> Tensor:
    """silu(gate) ⊙ value.

    Args:
        packed: (B, T, 2·F): gate, then value.
        fused: use the Triton kernels, which round once, after the product; see `KernelChoice`.

    Returns:
        (B, T, F), in packed's dtype.
    """
    if fused:
        from mvsplit.kernels import fused_swiglu  # here: Triton may be missing

        return fused_swiglu.swiglu(packed)
    gate, value = packed.chunk(2, dim=-1)  # (B, T, F) each
    return F.silu(gate) * value
