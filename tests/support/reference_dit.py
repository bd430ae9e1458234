"""The network of the paper's release, written down from its equations in plain PyTorch, with the release's own keys.

Nothing is imported from mvsplit: tests compare the two. Written for clarity, slow.

Shapes: B batch, T tokens, I image tokens, S caption tokens, D width, E head dimension, C channels, P patch size.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def normalised(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.eps, self.weight)


class Merge(nn.Module):
    """Eq. 7: Z = X + β⊙PF + α⊙J(F − X), X' = RMSNorm(Z), with a mean for each segment."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(0.3 * torch.rand(width))
        self.beta = nn.Parameter(0.5 + 0.5 * torch.rand(width))
        self.register_buffer("weight", torch.ones(width))

    def forward(self, x: Tensor, update: Tensor, image: int) -> Tensor:
        z = torch.empty_like(x)
        for part in (slice(0, image), slice(image, None)):
            mean_x, mean_f = (tokens[:, part].mean(1, keepdim=True) for tokens in (x, update))
            centred = update[:, part] - mean_f
            z[:, part] = x[:, part] + self.beta * centred + self.alpha * (mean_f - mean_x)
        return normalised(z, 1e-5, self.weight)


class QKNorm(nn.Module):
    def __init__(self, head: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = Norm(head, 1e-6), Norm(head, 1e-6)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.qk_norm = QKNorm(width // heads)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """angles: (T, E/2), of the plane of channels i and i + E/2; turned backwards."""
        B, T, D = x.shape
        q, k, v = (proj(x).view(B, T, self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))

        def turned(y: Tensor) -> Tensor:
            half = y.shape[-1] // 2
            planes = torch.complex(y[..., :half], y[..., half:]) * torch.exp(-1j * angles)[:, None]
            return torch.cat([planes.real, planes.imag], -1)

        q, k = self.qk_norm.query_norm(turned(q)), self.qk_norm.key_norm(turned(k))
        scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(D // self.heads)
        return self.proj(torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, -1)
        return self.w2(gate * gate.sigmoid() * value)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.fused_mvsplit_norm1, self.fused_mvsplit_norm2 = Merge(width), Merge(width)
        self.operator, self.ffn = Attention(width, heads), FeedForward(width, hidden)

    def forward(self, x: Tensor, angles: Tensor, image: int) -> Tensor:
        x = self.fused_mvsplit_norm1(x, self.operator(x, angles), image)
        return self.fused_mvsplit_norm2(x, self.ffn(x), image)


class Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch_proj = nn.Conv2d(channels, width, patch, patch)


class ReferenceDiT(nn.Module):
    """Velocity at x (B, C, height, width) for captions' states (B, S, W)."""

    def __init__(
        self, width: int = 64, heads: int = 2, depth: int = 12, hidden: int = 96, channels: int = 8, patch: int = 1,
        text: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.head = patch, width // heads
        self.patch_embed = Patches(channels, width, patch)
        self.norm_img_input, self.norm_text_input = Norm(width, 1e-5), Norm(width, 1e-5)
        self.context_proj = nn.Linear(text, width, bias=False) if text != width else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.final_proj = nn.Linear(width, patch * patch * channels)

    def angles(self, rows: int, columns: int, context: int) -> Tensor:
        quarter = self.head // 4
        frequencies = torch.tensor([10000.0 ** (-k / quarter) for k in range(quarter)])
        table = torch.zeros(rows * columns + context, 2 * quarter)
        for row in range(rows):
            for column in range(columns):
                table[row * columns + column] = torch.cat([row * frequencies, column * frequencies])
        return table

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, C, P = x.shape[0], x.shape[1], self.patch
        rows, columns = x.shape[2] // P, x.shape[3] // P
        image = self.patch_embed.patch_proj(x).flatten(2).transpose(1, 2)  # (B, I, D)
        tokens = torch.cat([self.norm_img_input(image), self.norm_text_input(self.context_proj(context))], 1)
        angles = self.angles(rows, columns, context.shape[1])
        for block in self.blocks:
            tokens = block(tokens, angles, rows * columns)
        out = self.final_proj(tokens[:, : rows * columns]).view(B, rows, columns, P, P, C)
        return torch.einsum("bhwpqc->bchpwq", out).reshape(B, C, rows * P, columns * P)


def euler(network: ReferenceDiT, x: Tensor, captions: Tensor, null: Tensor, scale: float, steps: int) -> Tensor:
    """From noise at t = 1 to data at t = 0, on the grid shifted by s = 4, with guidance."""
    times = [4 * t / (1 + 3 * t) for t in (n / steps for n in range(steps, -1, -1))]
    for t, t_next in pairwise(times):
        unconditional = network(x, null.expand_as(captions))
        x = x + (t - t_next) * (unconditional + scale * (network(x, captions) - unconditional))
    return x


ONES = ("norm_img_input", "norm_text_input", "fused_mvsplit_norm1.weight", "fused_mvsplit_norm2.weight", "qk_norm")


def release_state(network: nn.Module, ones: str = "all") -> dict[str, Tensor]:
    """Its state dictionary. `ones`: the weights of norms in it: all, inputs (as with the release's kernels), none."""
    state = network.state_dict()
    left_out = {"all": (), "inputs": ONES[2:], "none": ONES}[ones]
    for key in [key for key in state if any(part in key for part in left_out)]:
        del state[key]  # not a copy: `_metadata` stays
    return state


def save_release(path: Path, network: nn.Module, ones: str = "all", under: str | None = None) -> dict[str, Tensor]:
    """Write it as the release was written."""
    state = release_state(network, ones)
    torch.save({under: state, "step": 7} if under else state, path)
    return state


def full_size(depth: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the shapes of the release, without values: they take no memory until they are written or read."""
    D, F = 1024, 3072
    shapes: dict[str, Any] = {"patch_embed.patch_proj.weight": (D, 128, 1, 1), "patch_embed.patch_proj.bias": (D,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.fused_mvsplit_norm{n}.{gain}": (D,) for n in (1, 2) for gain in ("alpha", "beta")}
        shapes |= {f"blocks.{i}.operator.{name}.weight": (D, D) for name in ("q_proj", "k_proj", "v_proj", "proj")}
        shapes |= {f"blocks.{i}.ffn.w13.weight": (2 * F, D), f"blocks.{i}.ffn.w2.weight": (D, F)}
    shapes |= {"final_proj.weight": (128, D), "final_proj.bias": (128,)}
    yield from ((key, torch.empty(shape, dtype=dtype)) for key, shape in shapes.items())


def save_sparse(path: Path, depth: int, dtype: torch.dtype) -> None:
    """A file of the release's size, of which only the records' headers are on disk."""
    state = dict(full_size(depth, dtype))
    with torch.serialization.skip_data():
        torch.save(state, path)
