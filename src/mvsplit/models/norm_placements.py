"""Residuals that place or scale norms otherwise: the split's rivals since 2025.

Shapes: B batch, T tokens, D width. Interface and notation as in `residuals.py`. L = 2·depth is the number of merges.
The authors' norms have gains; here, as in the whole network, norms have no weights.
"""

from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from mvsplit.kernels.merge_norm import Segments, upcast
from mvsplit.models.layers import rms_norm
from mvsplit.models.residuals import PreNorm, Residual, split_channels


class Keel(Residual):
    """X' = RMSNorm(L·X + S F(RMSNorm(X))): Post-Norm with a highway (Chen and Wei, 2026, arXiv 2601.19895).

    The trunk's weight is the number of merges, so that a gradient passes all of them nearly unchanged. In the paper S
    is the identity. The split is added here: Keel's fixed gain 1/L lives at the highest rates, where the split's
    trainable gains fail.

    Args:
        split: S. `none`: F; `channels`: as in `ChannelSplit`, half of the channels get JF and half PF; `centred`: PF,
            the update's mean is dropped.
    """

    default_writer_init = "standard"

    def __init__(
        self, width: PositiveInt, *, split: Literal["none", "channels", "centred"] = "none", **common: Any
    ) -> None:
        super().__init__(width, **common)
        self.split = split

    def branch_input(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        if self.split != "none":
            mean, centred = split_channels(update, self.width // 2 if self.split == "channels" else 0, segments)
            update = torch.cat([mean, centred], dim=-1)
        return 2 * self.depth * x + update


class _OfBlock(Residual):
    """Base of residuals whose formula holds the number of the block."""

    def __init__(self, width: PositiveInt, *, number: PositiveInt = 1, **common: Any) -> None:
        super().__init__(width, number=number, **common)
        # As an integer tensor: a Python number would be compiled into the block, which all share, and casts to
        # bfloat16 leave integers alone.
        self.number: Tensor
        self.register_buffer("number", torch.tensor(number), persistent=False)


class LayerNormScaling(PreNorm, _OfBlock):
    """X' = X + F(RMSNorm(X)/√l), l the number of the block (Sun et al., 2025, arXiv 2502.05795).

    In Pre-Norm the trunk grows with depth, and its deep blocks add next to nothing new; here it grows more slowly.
    """

    def branch_input(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        return (rms_norm(wide, self.eps) * self.number.to(wide.dtype).rsqrt()).to(x.dtype)


class PeriNorm(PreNorm):
    """X' = X + RMSNorm(F(RMSNorm(X))): Peri-LN, norms on both sides of the branch (Kim et al., 2025, arXiv 2502.02732).

    Each update has norm 1 per channel: the trunk grows with √depth if updates are unrelated, at most linearly.
    """

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return x + rms_norm(update, self.eps)


class SiameseNorm(_OfBlock):
    """A Post-Norm and a Pre-Norm stream around the same branches (Li et al., 2026, arXiv 2602.08064).

    The trunk is [U ; Y], (B, T, 2D), both streams the tokens at first. With A = U + RMSNorm(Y) and l the number of the
    block, U' = RMSNorm(U + F(RMSNorm(A))/√(2l)) and Y' = Y + F(RMSNorm(A)). The network's head gets A.
    The monitor measures the whole trunk, in which Y, which has no norm, weighs most.
    """

    default_writer_init = "standard"
    normalises_output = False

    def enter(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=-1)

    def leave(self, x: Tensor) -> Tensor:
        post, pre = upcast(x).chunk(2, dim=-1)
        return (post + rms_norm(pre, self.eps)).to(x.dtype)

    def branch_input(self, x: Tensor) -> Tensor:
        return rms_norm(self.leave(upcast(x)), self.eps).to(x.dtype)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        post, pre = x.chunk(2, dim=-1)
        gain = (2 * self.number).to(update.dtype).rsqrt()
        return torch.cat([rms_norm(post + gain * update, self.eps), pre + update], dim=-1)
