"""SiT: the field's baseline, a diffusion transformer with AdaLN-Zero and a timestep embedding.

Shapes: B batch, C channels, P patch size, T tokens (image patches only), D width, H heads, E head dimension (D/H).

The architecture is DiT's (Peebles and Xie 2023, sec. 3.2), trained to predict a velocity as SiT is (Ma et al. 2024).
Condition and time are added up to one vector c per sample. In each block a linear map of silu(c) gives a shift, a scale
and a gain (DiT's α) per branch and channel:

    X' = X + gain ⊙ F(LayerNorm(X) ⊙ (1 + scale) + shift)

These maps start at zero: a block starts as the identity. As in the paper t = 1 is noise, and what is embedded is t
itself, not 1000·t. The trunk is in float32 (or float64), branches are in the dtype of the weights or of autocast.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.kernels.merge_norm import upcast
from mvsplit.models.compiled import Compilable, Compile, append_blocks
from mvsplit.models.conditioning import ClassContext
from mvsplit.models.dit import check_sizes, patchify, unpatchify
from mvsplit.models.layers import Linear, normal_like
from mvsplit.models.recompute import Checkpointing

EPS = 1e-6
"""ε of all LayerNorms, which have no weights of their own."""
STD = 0.02
"""Initial standard deviation of the embeddings of time and class."""
FREQUENCIES = 128
"""Of the time embedding: a cosine and a sine of each."""


class Dense(Linear):
    """Linear map with a bias that starts at zero, and weights from Xavier's uniform distribution, drawn in float32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(nn.init.xavier_uniform_(torch.empty_like(self.weight, dtype=torch.float32)))
        nn.init.zeros_(self.bias)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(X) ⊙ (1 + scale) + shift. x: (B, T, D); shift, scale: (B, D)."""
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, None], normal, 1 + scale[:, None])


def position_table(rows: int, columns: int, width: int) -> Tensor:
    """Fixed sine-cosine embedding of a grid in raster order: (rows·columns, D) float32.

    A quarter each: sines and cosines of the column, then of the row, times 10000^(−k/(D/4)), k = 0 … D/4 − 1.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter).double() / quarter)  # from integers: see `rope_table`
    row = torch.arange(rows).double().repeat_interleave(columns)
    column = torch.arange(columns).double().repeat(rows)
    angles = [place[:, None] * frequency for place in (column, row)]  # (T, D/4) each
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


class TimeEmbedding(nn.Module):
    """Cosines and sines of t, then two linear maps.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(2 * FREQUENCIES, width, bias=True, std=STD)
        self.fc2 = Linear(width, width, bias=True, std=STD)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) in [0, 1]. Returns (B, D)."""
        t = upcast(t)
        frequency = 10000.0 ** (-torch.arange(FREQUENCIES, device=t.device, dtype=t.dtype) / FREQUENCIES)
        angle = t[:, None] * frequency  # (B, 128)
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=1))))


class ClassEmbedding(ClassContext):
    """A learned vector per class, and a last one for none.

    Args:
        width: D.
        num_classes: without the null class.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.null_class = num_classes
        # Three-dimensional, so that weight decay, which is for matrices, skips it.
        self.table = nn.Parameter(torch.empty(num_classes + 1, 1, width))
        with torch.no_grad():
            self.table.copy_(normal_like(self.table, STD))

    def forward(self, condition: Tensor) -> Tensor:
        """condition: (B,) classes, `null_class` for none. Returns (B, D)."""
        return self.table[condition, 0]


class SelfAttention(nn.Module):
    """Attention over all tokens with biases, without RoPE or QK-norm; scale 1/√E.

    Args:
        width: D.
        num_heads: H.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Dense(width, 3 * width)  # rows: all queries, all keys, all values
        self.proj = Dense(width, width)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the output of `self.qkv`, (B, T, 3·D), into q, k and v: (B, H, T, E) each."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        out = F.scaled_dot_product_attention(*self.heads(self.qkv(x)))  # (B, H, T, E)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """W₂ gelu(W₁ x), with the tanh approximation of GELU.

    Args:
        width: D.
        hidden: inner width.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = Dense(width, hidden), Dense(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class Merge(nn.Module):
    """X + gain ⊙ F. A module, so that the monitor can measure the update against the trunk."""

    def forward(self, x: Tensor, update: Tensor, gain: Tensor) -> Tensor:
        """x, update: (B, T, D); gain: (B, D). Returns (B, T, D) in x's dtype."""
        return torch.addcmul(x, gain[:, None], update)


class SiTBlock(Compilable):
    """Attention and feed-forward, both modulated by c and merged with gains from c.

    Args:
        width: D.
        num_heads: H.
        hidden: inner width of the feed-forward branch.
    """

    per_sample = 1  # the condition

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.modulation = Linear(width, 6 * width, bias=True, std=0)
        self.attention = SelfAttention(width, num_heads)
        self.ffn = FeedForward(width, hidden)
        self.merge1, self.merge2 = Merge(), Merge()

    def compute(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, T, D); c: silu of the condition, (B, D). Returns (B, T, D)."""
        shift1, scale1, gain1, shift2, scale2, gain2 = upcast(self.modulation(c)).chunk(6, dim=1)  # (B, D) each
        x = self.merge1(x, self.attention(modulated_norm(x, shift1, scale1)), gain1)
        return self.merge2(x, self.ffn(modulated_norm(x, shift2, scale2)), gain2)


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to patches. Both start at zero, and so does the velocity.

    Args:
        width: D.
        outputs: values per token.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.modulation = Linear(width, 2 * width, bias=True, std=0)
        self.proj = Linear(width, outputs, bias=True, std=0)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, T, D); c: silu of the condition, (B, D). Returns (B, T, outputs)."""
        shift, scale = upcast(self.modulation(c)).chunk(2, dim=1)
        return self.proj(modulated_norm(x, shift, scale))


class SiT(nn.Module):
    """Predicts the velocity x0 − x1 at z_t.

    Trained parameters of the published sizes at C = 4, 32 × 32 latents and 1000 classes; they round to the published
    33, 130, 458 and 675 M. The position embedding of T·D values is a buffer here. In the published code it is a frozen
    parameter, and XL/2 has 675,129,632 with it.

        S/2 32,865,056      B/2 130,315,808      L/2 457,840,672      XL/2 674,834,720

    Args:
        image_size: [height, width] in pixels (or latent cells).
        channels: C, of the image or latent.
        num_classes: without the null class.
        patch_size: P; must divide both sides of the image.
        depth: number of blocks.
        width: D; must be divisible by 4 (sine-cosine position embedding) and by `num_heads`.
        num_heads: H.
        hidden: inner width of the feed-forward branch; 0 means 4·D, as published.
        learn_sigma: the last layer predicts 2·C channels, and the second half is dropped: the number of weights, and
            what is done with them, as in the published code. They get no gradient. False predicts C channels.
        checkpointing: which blocks' activations are recomputed in the backward pass; None keeps all activations.
        compile: compile one block for all; `auto`: if it is repaid, see `compiled.py`.

    Raises:
        ValueError: for sizes that do not fit together; names the key.
    """

    def __init__(
        self,
        image_size: Annotated[list[PositiveInt], Len(2, 2)],
        channels: PositiveInt,
        num_classes: PositiveInt,
        patch_size: PositiveInt,
        depth: PositiveInt,
        width: PositiveInt,
        num_heads: PositiveInt,
        hidden: NonNegativeInt = 0,
        learn_sigma: bool = True,
        checkpointing: Checkpointing | None = None,
        compile: Compile = False,
    ) -> None:
        self.check(image_size, patch_size, width, num_heads, compile)
        super().__init__()
        self.patch_size, self.channels, self.width, self.compile_when = patch_size, channels, width, compile
        self.checkpointing = checkpointing or Checkpointing()
        self.rows, self.columns = image_size[0] // patch_size, image_size[1] // patch_size
        self.input_shape, self.num_tokens = (channels, *image_size), self.rows * self.columns
        self.patch_proj = Dense(patch_size**2 * channels, width)
        self.time = TimeEmbedding(width)
        self.classes = ClassEmbedding(width, num_classes)
        self.blocks = nn.ModuleList()
        append_blocks(self.blocks, (SiTBlock(width, num_heads, hidden or 4 * width) for _ in range(depth)), compile)
        self.final = FinalLayer(width, patch_size**2 * channels * (2 if learn_sigma else 1))
        # As integers, (T, D): `network.bfloat16()` and its like round buffers of floats and leave these alone.
        self.position: Tensor
        table = position_table(self.rows, self.columns, width)
        self.register_buffer("position", table.view(torch.int32), persistent=False)

    @staticmethod
    def check(image_size: list[int], patch_size: int, width: int, num_heads: int, compile: Compile) -> None:
        """Raise `ValueError` for sizes that do not fit; called on the composed config before anything is built."""
        check_sizes(image_size, patch_size, width, num_heads, compile)
        if width % 4:
            raise ValueError(f"model.width = {width}: must be divisible by 4")

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity at z. z: (B, C, height, width); t: (B,); condition: (B,) classes. Returns z's shape and dtype."""
        x = upcast(self.patch_proj(patchify(z, self.patch_size)))  # (B, T, D)
        x = x + self.position.view(torch.float32)
        c = F.silu(upcast(self.time(t)) + upcast(self.classes(condition)))  # (B, D); all that modulations read
        x = self.checkpointing.run(self.blocks, x, c)
        out = unpatchify(self.final(x, c), self.patch_size, self.rows, self.columns)  # (B, C or 2·C, height, width)
        return out[:, : self.channels].to(z.dtype)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Replace the classes where mask (B,) is true with the null class."""
        return self.classes.drop(condition, mask)

    # What the monitor measures, see `Watchable` in `stability/taps.py`. All tokens are image tokens: no `segments`.

    def writers_of(self, block: SiTBlock) -> dict[str, tuple[nn.Module, nn.Module]]:
        return {"attention": (block.attention.proj, block.merge1), "ffn": (block.ffn.w2, block.merge2)}

    def heads_of(self, block: SiTBlock) -> tuple[nn.Linear, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        return block.attention.qkv, block.attention.heads
