"""Context tokens: what the network is conditioned on, and the null condition of guidance.

Shapes: B batch, S context tokens, D width, W embedding width (for example of a text encoder).

Every context module has the same interface: `num_tokens`, the most it makes; `forward(condition) -> (B, S, D)`; and
`drop(condition, mask) -> condition`, which replaces the condition of the masked samples with the null condition. If S
differs between batches, it has `lengths_differ`, which is then true.
Label dropout in training and the unconditional branch in sampling both use `drop`, unless the null condition comes with
the condition (`flow.objective.drop_condition`).
"""

from pathlib import Path
from typing import Protocol

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from mvsplit.models.layers import Linear, normal_like
from mvsplit.utils.errors import UserError


class Tokens(Protocol):
    """The interface that a transformer expects of the module that makes its second segment."""

    num_tokens: int

    def __call__(self, condition: Tensor) -> Tensor: ...


class Context(Tokens, Protocol):
    """The interface that the DiT expects of a context module."""

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor: ...


class ClassContext(nn.Module):
    """Base of modules that condition on classes; `null_class` means none."""

    null_class: int

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Replace the classes where mask (B,) is true with the null class."""
        return torch.where(mask, torch.full_like(condition, self.null_class), condition)


class ClassTokens(ClassContext):
    """Learned context tokens per class, plus one null class (index `num_classes`).

    Args:
        width: D.
        num_classes: without the null class.
        num_tokens: S.
    """

    provided = frozenset({"width"})

    def __init__(self, width: int, num_classes: PositiveInt, num_tokens: PositiveInt = 4) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.null_class = num_classes
        # Unit scale: the context is RMS-normalised on entry, so only its direction matters. Three-dimensional, so
        # that weight decay, which is for matrices, skips it.
        self.table = nn.Parameter(torch.empty(num_classes + 1, num_tokens, width))
        with torch.no_grad():
            self.table.copy_(normal_like(self.table, std=1.0))

    def forward(self, condition: Tensor) -> Tensor:
        """condition: (B,) class indices, `null_class` for none. Returns (B, S, D)."""
        return self.table[condition]


class CaptionTable(ClassContext):
    """A fixed table of caption embeddings, one row per class and a last row for the null caption.

    Args:
        width: D.
        embeddings: (num_classes + 1, S, W) tensor, or the path of a safetensors file that contains it under the key
            `embeddings`. The table is a buffer: saved with the weights, never trained.

    Raises:
        ValueError: if the table is missing or not three-dimensional.
    """

    provided = frozenset({"width"})
    table: Tensor

    def __init__(self, width: int, embeddings: Tensor | str | Path) -> None:
        super().__init__()
        if not isinstance(embeddings, Tensor):
            embeddings = _load_embeddings(Path(embeddings))
        if embeddings.ndim != 3:
            raise ValueError(f"caption table: shape {tuple(embeddings.shape)}, expected (classes + 1, tokens, width)")
        self.num_tokens = embeddings.shape[1]
        self.null_class = embeddings.shape[0] - 1
        self.register_buffer("table", embeddings.float())
        self.proj = context_projection(embeddings.shape[2], width)

    def forward(self, condition: Tensor) -> Tensor:
        """condition: (B,) class indices, `null_class` for none. Returns (B, S, D)."""
        return self.proj(self.table[condition])


class SampleEmbeddings(nn.Module):
    """A text encoder's states of each sample's caption, which come with the batch (paper: Qwen3-0.6B, W = 1024).

    The number of tokens may differ between batches. There is no mask: padding takes part in attention and in token
    means, as in the reference code. The null condition is the encoded empty caption, and comes with the batch too.

    Args:
        width: D.
        num_tokens: most tokens of a caption; only used to plan memory.
        embedding_width: W; 0 means D.
    """

    provided = frozenset({"width"})
    lengths_differ = True

    def __init__(self, width: int, num_tokens: PositiveInt = 256, embedding_width: NonNegativeInt = 0) -> None:
        super().__init__()
        self.num_tokens, self.embedding_width = num_tokens, embedding_width or width
        self.proj = context_projection(self.embedding_width, width)

    def forward(self, condition: Tensor) -> Tensor:
        """condition: (B, S, W), any S. Returns (B, S, D)."""
        if condition.ndim != 3 or condition.shape[2] != self.embedding_width:
            raise UserError(
                f"model.context: needs embeddings (samples, tokens, {self.embedding_width}) of captions, but was given"
                f" {tuple(condition.shape)}; src/encode.py kind=text makes them"
            )
        return self.proj(condition)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Raises `UserError`: the network does not know the empty caption's embeddings."""
        raise UserError("model.context: the batch has captions' embeddings, but no `null_condition`")


def context_projection(embedding_width: int, width: int) -> nn.Module:
    """The reference layout's `context_proj`: without a weight if the widths are equal."""
    return nn.Identity() if embedding_width == width else Linear(embedding_width, width)


def _load_embeddings(path: Path) -> Tensor:
    from safetensors.torch import load_file  # tensors only: the file cannot execute anything

    if not path.is_file():
        raise ValueError(f"embeddings file {path} does not exist")
    tensors = load_file(path)
    if "embeddings" not in tensors:
        raise ValueError(f"{path}: no tensor named 'embeddings'; it contains {', '.join(sorted(tensors)) or 'none'}")
    return tensors["embeddings"]
