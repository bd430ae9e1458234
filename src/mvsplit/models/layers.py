"""Layers that initialise their own weights.

Shapes: B batch, T tokens, D width, F feed-forward hidden width.

Each module initialises its parameters in its own constructor, and no parent changes them later: under DeepSpeed's
partitioned construction a parameter is sharded as soon as its owner's `__init__` returns, and a parent would write to
an empty tensor.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.kernels.swiglu import swiglu


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, without weights (paper: all norms of the network)."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def standard_std(fan_in: int) -> float:
    """1/√(3·fan_in): the scale of PyTorch's own linear layers. The paper does not state its initialisation.

    It matters at depth: in `experiment=mms_lab residual=post_norm` (200 blocks, zero writers, one seed) the validation
    loss stays at 1.58 from step 50 to 200 with 1/√fan_in. With this scale it falls to 1.07 by step 50 before it rises
    again (1.33 at step 100): the late collapse that the paper describes.
    """
    return (3 * fan_in) ** -0.5


def normal_like(parameter: Tensor, std: float) -> Tensor:
    """Random values from N(0, std²) in a parameter's shape, always in float32.

    So a bfloat16 parameter starts as the rounded float32 one; values drawn in bfloat16 would be a different network.
    """
    return nn.init.normal_(torch.empty_like(parameter, dtype=torch.float32), std=std)


class Linear(nn.Linear):
    """Linear map whose weight is drawn from N(0, std²); biases start at zero.

    Computes in the dtype of its weight, or in autocast's; the input is cast.

    Args:
        std: standard deviation of the initial weight; None means `standard_std`, 0 gives exact zeros.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, std: float | None = None) -> None:
        # Read by reset_parameters, which super().__init__ calls.
        self.init_std = standard_std(in_features) if std is None else std
        super().__init__(in_features, out_features, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init_std == 0:
            nn.init.zeros_(self.weight)
        else:
            self.weight.copy_(normal_like(self.weight, self.init_std))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Autocast does not cast float64.
        if x.dtype != self.weight.dtype and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):
            x = x.to(self.weight.dtype)
        return super().forward(x)


class SwiGLU(nn.Module):
    """Gated feed-forward: W₂(silu(gate) ⊙ value), gate and value packed in one matrix (gate rows first).

    Args:
        width: D.
        hidden: F.
        writer_std: initial standard deviation of the writer W₂ (see `Residual.writer_std`).

    Attributes:
        fused: whether the pointwise part uses the Triton kernels; set by the network.
    """

    fused = False

    def __init__(self, width: int, hidden: int, writer_std: float | None = None) -> None:
        super().__init__()
        self.w13 = Linear(width, 2 * hidden)
        self.w2 = Linear(hidden, width, std=writer_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x), self.fused))  # (B, T, D)
