"""How a branch's update is merged into the trunk: the paper's split, its baselines, and the article's reading of it.

Shapes: B batch, T tokens, D width.

All residuals have the same interface, `x = residual(x, update, segments)` with `update = F(residual.branch_input(x))`,
so any of them fits any transformer. `segments` are the lengths of consecutive groups of tokens (image, context);
residuals that do not use token means ignore them. Notation: J is the token mean of each segment, P = I − J, RMSNorm has
no weights, ⊙ is per channel. The rivals since 2025, which move or scale the norms, are in `norm_placements.py`.

A subclass also takes the base's arguments (`**common`). Its `merge` gets trunk and update in at least float32, whatever
their dtypes; the new trunk has the old one's dtype. So the network alone decides what is rounded.

Each residual also defines how the branch's last matrix (its "writer": W_O, W_2) is initialised:

    zero      the branch adds nothing at first        normal    N(0, 0.02²), the paper's LayerScale runs
    standard  N(0, 1/(3·fan_in)), PyTorch's scale     deepnorm  standard × (8·depth)^(−1/4)
"""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Lt
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from mvsplit.kernels.merge_norm import Segments, merge_norm, merge_reference, segment_mean, spread, upcast
from mvsplit.models.layers import rms_norm, standard_std

WriterInit = Literal["zero", "normal", "standard", "deepnorm"]
Branch = Literal["attention", "ffn"]
Gain = float | Literal["auto"]
"""A gain's initial value; `auto` is 1/√depth."""


class Residual(nn.Module):
    """Base of all residuals: the interface that a block uses. Subclasses implement `merge`.

    A trunk of several streams is one tensor (B, T, streams · D): see `SiameseNorm`.

    Args:
        width: D.
        depth: number of blocks in the network (a block has two merges).
        branch: which of the two merges this is.
        number: of the block, counted from 1.
        writer_init: initialisation of the branch's writer, see above; None uses the class's default.
        eps: ε of the RMSNorm.
    """

    provided = frozenset({"width", "depth", "branch", "number"})
    """Arguments that the network passes and configs cannot set."""
    default_writer_init: WriterInit = "zero"
    normalises_output = True
    """Whether the trunk leaves this residual RMS-normalised; if not, the network ends with a norm."""
    fused = False
    """Whether merge and norm use the Triton kernels, if the residual `has_fused`; set by the network."""
    has_fused = False

    def __init__(
        self,
        width: PositiveInt,
        depth: PositiveInt = 1,
        branch: Branch = "attention",
        number: PositiveInt = 1,
        writer_init: WriterInit | None = None,
        eps: PositiveFloat = 1e-6,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.branch, self.eps = width, depth, branch, eps
        self.writer_init: WriterInit = writer_init or self.default_writer_init

    def writer_std(self, fan_in: int) -> float:
        """Initial standard deviation of the branch's writer, a matrix with `fan_in` inputs."""
        return {
            "zero": 0.0,
            "normal": 0.02,
            "standard": standard_std(fan_in),
            "deepnorm": standard_std(fan_in) * (8 * self.depth) ** -0.25,
        }[self.writer_init]

    def enter(self, x: Tensor) -> Tensor:
        """The trunk that the first block gets from the tokens (B, T, D): wider if it has several streams."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """The tokens (B, T, D) that the network's head gets from the last block's trunk."""
        return x

    def branch_input(self, x: Tensor) -> Tensor:
        """Input of the branch, (B, T, D): the trunk itself, unless a residual normalises it first."""
        return x

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        """The merged trunk Z, before the norm. x, update: (B, T, D), at least float32. Returns (B, T, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        """The new trunk. x, update: (B, T, D); segments add up to T. Returns (B, T, D) in x's dtype."""
        z = self.merge(upcast(x), upcast(update), segments)
        return (rms_norm(z, self.eps) if self.normalises_output else z).to(x.dtype)

    def gain(self, value: Gain, width: int | None = None) -> nn.Parameter:
        """A trainable gain per channel, (width or D,), initialised to `value`."""
        start = self.depth**-0.5 if value == "auto" else float(value)
        return nn.Parameter(torch.full((width or self.width,), start))


class PostNorm(Residual):
    """X' = RMSNorm(X + F(X)): the paper's unstabilised baseline, zero writers."""

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return x + update


class PreNorm(Residual):
    """X' = X + F(RMSNorm(X)): the usual transformer residual. The trunk is never normalised."""

    default_writer_init = "standard"
    normalises_output = False

    def branch_input(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return x + update


class ReZero(Residual):
    """X' = X + a·F(X) with one scalar a per merge, initially 0, and no norm (Bachlechner et al., 2020)."""

    default_writer_init = "standard"
    normalises_output = False

    def __init__(self, width: PositiveInt, **common: Any) -> None:
        super().__init__(width, **common)
        self.scale = nn.Parameter(torch.zeros(1))

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return x + self.scale * update


class DeepNorm(Residual):
    """X' = RMSNorm((2·depth)^(1/4)·X + F(X)), writers shrunk by (8·depth)^(−1/4) (Wang et al., 2022, encoder form)."""

    default_writer_init = "deepnorm"

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return (2 * self.depth) ** 0.25 * x + update


class LayerScale(Residual):
    """X' = RMSNorm(X + λ⊙F(X)): one gain per channel for the whole update (paper: λ init swept 1e-2 … 1e-5).

    Args:
        lambda_init: initial λ; `auto` is 1/√depth.
    """

    default_writer_init = "normal"

    def __init__(self, width: PositiveInt, *, lambda_init: Gain = 1e-2, **common: Any) -> None:
        super().__init__(width, **common)
        self.scale = self.gain(lambda_init)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return torch.addcmul(x, self.scale, update)


class MVSplit(Residual):
    """The paper's mean-variance split: Z = X + β⊙P F + α⊙J(F − X), X' = RMSNorm(Z) (eq. 7).

    The split is over *tokens*: each segment's token mean (J) and the centred part (P = I − J) have their own gains, so
    PZ = PX + β⊙PF and JZ = (1 − α)⊙JX + α⊙JF (eq. 9). The popular article reads it as a split of the feature channels
    into two groups: that is `ChannelSplit`.

    Args:
        alpha_init: initial α (paper: 0).
        beta_init: initial β; `auto` is 1/√depth (paper: 1 at 400 blocks, 0.03 ≈ 1/√1000 at 1000).
        segment_means: one mean per segment (paper); False uses one mean over all tokens.
        mean_update: what is added to the trunk's mean. `leaky`: α⊙J(F − X), the paper's leaky replacement;
            `plain`: α⊙JF, the mean accumulates; `none`: nothing, the update's mean is dropped.
        attention_only: split only the attention merge; the FFN merge is then a `PostNorm` (the paper's negative
            result: the spike moves to the FFN writer).
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        alpha_init: Gain = 0.0,
        beta_init: Gain = "auto",
        segment_means: bool = True,
        mean_update: Literal["leaky", "plain", "none"] = "leaky",
        attention_only: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(width, **common)
        self.segment_means, self.mean_update = segment_means, mean_update
        self.split = self.branch == "attention" or not attention_only
        self.has_fused = self.split and mean_update == "leaky"  # the paper's form
        if self.split:
            self.beta = self.gain(beta_init)
            if mean_update != "none":
                self.alpha = self.gain(alpha_init)

    def _means_over(self, x: Tensor, segments: Segments) -> Segments:
        return segments if self.segment_means else (x.shape[1],)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        if not self.split:
            return x + update
        segments = self._means_over(x, segments)
        if self.mean_update == "leaky":
            return merge_reference(x, update, self.alpha, self.beta, segments)
        mean_update = spread(segment_mean(update, segments), segments)  # JF
        z = x + self.beta * (update - mean_update)
        return z + self.alpha * mean_update if self.mean_update == "plain" else z

    def forward(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        if self.has_fused:
            segments = self._means_over(x, segments)
            return merge_norm(x, update, self.alpha, self.beta, segments, self.eps, self.fused)
        return super().forward(x, update, segments)


def split_channels(update: Tensor, num_mean: int, segments: Segments) -> tuple[Tensor, Tensor]:
    """JF of the first `num_mean` channels, and PF of the others. update: F, (B, T, D). Returns (B, T, ·) each."""
    mean = spread(segment_mean(update, segments), segments)
    return mean[..., :num_mean], (update - mean)[..., num_mean:]


class ChannelSplit(Residual):
    """The popular article's reading of the split, *not* the paper's: over channels instead of tokens.

    The first channels form a mean group that gets only the update's token mean, the others a variance group that gets
    only its centred part. Each group has its own gain: Z = [X_m + α⊙J F_m ; X_v + β⊙P F_v], X' = RMSNorm(Z). The
    article gives no formula; this is the most literal one. In `MVSplit`, the paper's, every channel has both parts.

    Args:
        mean_fraction: share of the channels in the mean group.
        alpha_init, beta_init: initial gains of the mean and the variance group; `auto` is 1/√depth.

    Raises:
        ValueError: if one of the groups would be empty.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        mean_fraction: Annotated[float, Gt(0), Lt(1)] = 0.5,
        alpha_init: Gain = "auto",
        beta_init: Gain = "auto",
        **common: Any,
    ) -> None:
        super().__init__(width, **common)
        self.num_mean = round(mean_fraction * width)
        if not 0 < self.num_mean < width:
            raise ValueError(f"residual.mean_fraction = {mean_fraction}: leaves a group of the {width} channels empty")
        self.alpha = self.gain(alpha_init, self.num_mean)
        self.beta = self.gain(beta_init, width - self.num_mean)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        mean, centred = split_channels(update, self.num_mean, segments)
        return x + torch.cat([self.alpha * mean, self.beta * centred], dim=-1)
