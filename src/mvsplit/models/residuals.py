"""How a branch's update joins the trunk: the paper's split, its baselines, and the article's reading of it.

Shapes: B batch, T tokens, D width.

Every residual is called alike, `x = residual(x, update, segments)` with `update = F(residual.branch_input(x))`, so
any of them can be tried in any transformer. `segments` are the lengths of consecutive token groups (image tokens,
context tokens); residuals that do not look at token means ignore them. Notation: J is the token mean of each
segment, P = I − J, RMSNorm has no weights, ⊙ is per channel.

A subclass takes the base's arguments too (`**common`). Its `merge` sees trunk and update in float32 at least, whatever
types they and the gains have, and the next trunk has the type of the last: what rounds is chosen by the network alone.

Each residual also says how the branch's last matrix (its "writer": W_O, W_2) starts:

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
    """Base of all residuals: what a block may ask of one. Subclasses write `merge`.

    Args:
        width: D.
        depth: blocks in the network (a block has two merges).
        branch: which of the two merges this is.
        writer_init: initialisation of the branch's writer, see above; None takes the class's own default.
        eps: ε of the RMSNorm.
    """

    provided = frozenset({"width", "depth", "branch"})
    """Arguments that the network fills in, and configs do not set."""
    default_writer_init: WriterInit = "zero"
    normalises_output = True
    """Whether the trunk leaves this residual RMS-normalised; if not, the network ends with a norm."""

    def __init__(
        self,
        width: PositiveInt,
        depth: PositiveInt = 1,
        branch: Branch = "attention",
        writer_init: WriterInit | None = None,
        eps: PositiveFloat = 1e-6,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.branch, self.eps = width, depth, branch, eps
        self.writer_init: WriterInit = writer_init or self.default_writer_init

    def writer_std(self, fan_in: int) -> float:
        """Standard deviation with which the branch's writer, of `fan_in` inputs, starts."""
        return {
            "zero": 0.0,
            "normal": 0.02,
            "standard": standard_std(fan_in),
            "deepnorm": standard_std(fan_in) * (8 * self.depth) ** -0.25,
        }[self.writer_init]

    def branch_input(self, x: Tensor) -> Tensor:
        """What the branch sees: the trunk itself, unless a residual normalises it first."""
        return x

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        """The merged trunk Z, before the norm. x, update: (B, T, D), float32 at least. Returns (B, T, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        """The next trunk. x, update: (B, T, D); segments add up to T. Returns (B, T, D) in x's type."""
        z = self.merge(upcast(x), upcast(update), segments)
        return (rms_norm(z, self.eps) if self.normalises_output else z).to(x.dtype)

    def gain(self, value: Gain, width: int | None = None) -> nn.Parameter:
        """A trainable gain per channel, (width or D,), starting at `value` everywhere."""
        start = self.depth**-0.5 if value == "auto" else float(value)
        return nn.Parameter(torch.full((width or self.width,), start))


class PostNorm(Residual):
    """X' = RMSNorm(X + F(X)): the paper's un-stabilised baseline, zero writers."""

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
    """X' = X + a·F(X) with one scalar a per merge that starts at 0, and no norm (Bachlechner et al., 2020)."""

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
        lambda_init: where every λ starts; `auto` is 1/√depth.
    """

    default_writer_init = "normal"

    def __init__(
        self,
        width: PositiveInt,
        *,
        lambda_init: Gain = 1e-2,
        **common: Any,
    ) -> None:
        super().__init__(width, **common)
        self.scale = self.gain(lambda_init)

    def merge(self, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
        return torch.addcmul(x, self.scale, update)


class MVSplit(Residual):
    """The paper's mean-variance split: Z = X + β⊙P F + α⊙J(F − X), X' = RMSNorm(Z) (eq. 7).

    The split is over *tokens*: each segment's token mean J and what remains, P = I − J, get gains of their own, so
    PZ = PX + β⊙PF and JZ = (1 − α)⊙JX + α⊙JF (eq. 9). The popular article's other reading, a split of the feature
    channels into two groups, is `ChannelSplit`; this class is the paper's.

    Args:
        alpha_init: where every α starts (paper: 0).
        beta_init: where every β starts; `auto` is 1/√depth (paper: 1 at 400 blocks, 0.03 ≈ 1/√1000 at 1000).
        segment_means: take means per segment (paper); False takes one mean over all tokens.
        mean_update: what happens to the trunk's mean. `leaky`: α⊙J(F − X), the paper's leaky replacement;
            `plain`: α⊙JF, the mean accumulates and never leaks; `none`: the update's mean is dropped.
        attention_only: split at the attention merge alone and leave the FFN merge a `PostNorm` (paper's negative
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
        if self.split and self.mean_update == "leaky":  # the paper's form has a fused kernel
            return merge_norm(x, update, self.alpha, self.beta, self._means_over(x, segments), self.eps)
        return super().forward(x, update, segments)


class ChannelSplit(Residual):
    """The popular article's reading of the split, *not* the paper's: over channels instead of tokens.

    The first channels form a mean group that receives only the update's token mean, the others a variance group
    that receives only its centred part; each group has its own gain, then both are merged by concatenation and
    one norm: Z = [X_m + α⊙J F_m ; X_v + β⊙P F_v], X' = RMSNorm(Z). The article gives no formula; this is the most
    literal one. The paper's split, where every channel has both parts, is `MVSplit`.

    Args:
        mean_fraction: share of the channels in the mean group.
        alpha_init, beta_init: where the gains of the mean and variance group start; `auto` is 1/√depth.

    Raises:
        ValueError: if one of the groups would have no channel.
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
        mean = spread(segment_mean(update, segments), segments)
        mean_group = self.alpha * mean[..., : self.num_mean]
        variance_group = self.beta * (update - mean)[..., self.num_mean :]
        return x + torch.cat([mean_group, variance_group], dim=-1)
