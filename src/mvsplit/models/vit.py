"""A plain classifier with the DiT's blocks and residuals: is the collapse one of diffusion, or of depth?

Shapes: B batch, C channels, I image tokens, S class tokens, D width, K classes.

The class tokens take the place of the context: a segment of their own, learned and the same for every image. They
attend to the image tokens in every block, and a linear head reads the first one. The others are there for the split:
the centred part of a single token is zero, so with α = 0 nothing would be added to it.
"""

import functools
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mvsplit.kernels.merge_norm import upcast
from mvsplit.models.dit import PatchTransformer
from mvsplit.models.layers import Linear, normal_like


class LearnedTokens(nn.Module):
    """Tokens that are the same for every sample.

    Args:
        width: D.
        num_tokens: S.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        # Three-dimensional, so that weight decay, which is for matrices, skips it: as in `ClassTokens`.
        self.table = nn.Parameter(torch.empty(1, num_tokens, width))
        with torch.no_grad():
            self.table.copy_(normal_like(self.table, std=1.0))

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, …), of which only B counts. Returns (B, S, D)."""
        return self.table.expand(len(image), -1, -1)


class ViT(PatchTransformer):
    """Predicts the class of an image. The other arguments are those of `PatchTransformer`.

    Args:
        num_classes: K.
        num_tokens: S; residuals that split the mean of a segment need at least 2.
    """

    provided = frozenset({"context"})

    def __init__(self, *, num_classes: PositiveInt, num_tokens: PositiveInt = 4, **common: Any) -> None:
        super().__init__(context=functools.partial(LearnedTokens, num_tokens=num_tokens), **common)
        self.num_classes = num_classes
        self.head = Linear(self.width, num_classes, bias=True, std=0)  # starts with equal probabilities: loss ln K

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the classes. image: (B, C, height, width). Returns (B, K), at least float32."""
        rows, columns = self.grid(image)
        x = self.run(image, image)[:, rows * columns]  # (B, D)
        return upcast(self.head(self.output(x)))
