"""Multi-head self-attention as the paper has it: RoPE first, then QK-norm without weights, no biases.

Shapes: B batch, T tokens, D width, H heads, E head dimension (D/H).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.kernels.merge_norm import upcast
from mvsplit.models.layers import Linear, rms_norm
from mvsplit.models.rope import apply_rope


class Attention(nn.Module):
    """Full (unmasked) attention over image and context tokens; scale 1/√E.

    Args:
        width: D. num_heads: H. qk_eps: ε of the query/key norm (reference code: 1e-6).
        writer_std: initial standard deviation of the writer W_O (see `Residual.writer_std`).
    """

    def __init__(self, width: int, num_heads: int, qk_eps: float = 1e-6, writer_std: float | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_eps = qk_eps
        self.qkv = Linear(width, 3 * width)  # rows: all queries, all keys, all values
        self.proj = Linear(width, width, std=writer_std)

    def heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned and normalised, and values, (B, H, T, E) each, of what `qkv` gave, (B, T, 3·D).

        RoPE and QK-norm are computed in float32 at least; the results have the type of `qkv`.
        """
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, E)
        qk = qkv[:, :, :2].permute(2, 0, 3, 1, 4).flatten(0, 1)  # (2B, H, T, E): one pass for both
        q, k = rms_norm(apply_rope(upcast(qk), cos, sin), self.qk_eps).to(qkv.dtype).chunk(2)
        return q, k, qkv[:, :, 2].transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend. x: (B, T, D); cos, sin: (T, E) from `rope_table`. Returns (B, T, D)."""
        out = F.scaled_dot_product_attention(*self.heads(self.qkv(x), cos, sin))  # (B, H, T, E)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)
