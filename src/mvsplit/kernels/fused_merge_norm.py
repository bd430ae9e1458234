"""The MV-Split merge and the norm after it in Triton; `merge_norm.py` has the formulas, and their plain form.

Shapes: B batch, T tokens, D width, S segments.

A program works on a tile: some consecutive tokens of one segment of one sample. Sums over tokens go through a buffer of
the tiles' sums, (2, B, tiles, D), which a second kernel adds up: no atomics, so results are the same in each run. The
corrections by segment means in the backward pass are left to PyTorch: a compiled block adds them where it reads Δ.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.merge_norm import corrected, upcast
from mvsplit.kernels.triton_ops import Tile, accumulator, operator, power_of_two, whole_rows, wrap_triton


@triton.jit
def _tile(number, first, second, TOKENS: tl.constexpr):
    """Start, end and segment (0 or 1) of a tile in two consecutive segments of `first` and `second` tokens."""
    of_first = tl.cdiv(first, TOKENS)
    later = number >= of_first
    start = tl.where(later, first + (number - of_first) * TOKENS, number * TOKENS)
    end = tl.minimum(start + TOKENS, tl.where(later, first + second, first))
    return start, end, later.to(tl.int32)


@triton.jit
def _sums(
    x, update, sums_x, sums_update, tokens, tiles, tiles_here, begin, tile_begin, first, second,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Column sums of two tensors over a tile."""
    ACC: tl.constexpr = sums_x.dtype.element_ty
    sample, tile = (tl.program_id(0) // tiles_here).to(tl.int64), tl.program_id(0) % tiles_here
    start, end, _ = _tile(tile, first, second, TOKENS)
    columns = tl.arange(0, BLOCK)[None, :]
    x += (sample * tokens + begin) * D
    update += (sample * tokens + begin) * D
    sum_x = tl.zeros((ROWS, BLOCK), ACC)
    sum_update = tl.zeros((ROWS, BLOCK), ACC)
    for token in range(start, end, ROWS):
        row = token + tl.arange(0, ROWS)[:, None]
        at, keep = row * D + columns, (row < end) & (columns < D)
        sum_x += tl.load(x + at, keep, other=0).to(ACC)
        sum_update += tl.load(update + at, keep, other=0).to(ACC)
    column = tl.arange(0, BLOCK)
    at = (sample * tiles + tile_begin + tile) * D + column
    tl.store(sums_x + at, tl.sum(sum_x, 0), column < D)
    tl.store(sums_update + at, tl.sum(sum_update, 0), column < D)


@triton.jit
def _means(
    sums1, sums2, means1, means2, tiles, segments, begin, tile_begin, first, second,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Means of a segment from the sums of its tiles, for two tensors; 0 for an empty segment."""
    ACC: tl.constexpr = sums1.dtype.element_ty
    sample, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    of_first = tl.cdiv(first, TOKENS)
    length = tl.where(segment == 0, first, second)
    start = tl.where(segment == 0, 0, of_first)
    sums1 += (sample * tiles + tile_begin) * D
    sums2 += (sample * tiles + tile_begin) * D
    sum1 = tl.zeros((BLOCK,), ACC)
    sum2 = tl.zeros((BLOCK,), ACC)
    for tile in range(start, start + tl.cdiv(length, TOKENS)):
        sum1 += tl.load(sums1 + tile * D + column, column < D, other=0)
        sum2 += tl.load(sums2 + tile * D + column, column < D, other=0)
    at = (sample * segments + begin + segment) * D + column
    tokens = tl.maximum(length, 1).to(ACC)
    tl.store(means1 + at, sum1 / tokens, column < D)
    tl.store(means2 + at, sum2 / tokens, column < D)


@triton.jit
def _merge(
    x, update, alpha, beta, mean_x, mean_update, out, r, tokens, segments, tiles_here, begin, segment_begin, first,
    second,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """X' and r of a tile."""
    ACC: tl.constexpr = mean_x.dtype.element_ty
    sample, tile = (tl.program_id(0) // tiles_here).to(tl.int64), tl.program_id(0) % tiles_here
    start, end, segment = _tile(tile, first, second, TOKENS)
    columns = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(beta + columns, columns < D, other=0).to(ACC)
    leak = tl.load(alpha + columns, columns < D, other=0).to(ACC)
    mean_at = (sample * segments + segment_begin + segment) * D + columns
    mean = (leak - gain) * tl.load(mean_update + mean_at, columns < D, other=0)
    mean -= leak * tl.load(mean_x + mean_at, columns < D, other=0)
    offset = sample * tokens + begin
    x += offset * D
    update += offset * D
    out += offset * D
    r += offset
    for token in range(start, end, ROWS):
        row = token + tl.arange(0, ROWS)[:, None]
        at, keep = row * D + columns, (row < end) & (columns < D)
        z = tl.load(x + at, keep, other=0).to(ACC) + gain * tl.load(update + at, keep, other=0).to(ACC) + mean
        scale = tl.rsqrt(tl.sum(z * z, 1, keep_dims=True) / D + EPS)
        tl.store(out + at, z * scale, keep)
        tl.store(r + row, scale, row < end)


@triton.jit
def _deltas(
    g, out, r, update, delta, sums_delta, sums_product, tokens, tiles, tiles_here, begin, tile_begin, first, second,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Δ of a tile, and its column sums of Δ and Δ⊙F."""
    ACC: tl.constexpr = delta.dtype.element_ty
    sample, tile = (tl.program_id(0) // tiles_here).to(tl.int64), tl.program_id(0) % tiles_here
    start, end, _ = _tile(tile, first, second, TOKENS)
    columns = tl.arange(0, BLOCK)[None, :]
    offset = sample * tokens + begin
    g += offset * D
    out += offset * D
    update += offset * D
    delta += offset * D
    r += offset
    sum_delta = tl.zeros((ROWS, BLOCK), ACC)
    sum_product = tl.zeros((ROWS, BLOCK), ACC)
    for token in range(start, end, ROWS):
        line = token + tl.arange(0, ROWS)
        row = line[:, None]
        at, keep = row * D + columns, (row < end) & (columns < D)
        normed = tl.load(out + at, keep, other=0).to(ACC)
        grad = tl.load(g + at, keep, other=0).to(ACC)
        scale = tl.load(r + line, line < end, other=0)[:, None]
        found = scale * (grad - normed * (tl.sum(grad * normed, 1, keep_dims=True) / D))
        tl.store(delta + at, found, keep)
        sum_delta += found
        sum_product += found * tl.load(update + at, keep, other=0).to(ACC)
    column = tl.arange(0, BLOCK)
    at = (sample * tiles + tile_begin + tile) * D + column
    tl.store(sums_delta + at, tl.sum(sum_delta, 0), column < D)
    tl.store(sums_product + at, tl.sum(sum_product, 0), column < D)


class _Pairs:
    """A tensor's segments in pairs, which one launch handles: a table of all lengths would have to be on the GPU."""

    def __init__(self, x: Tensor, segments: list[int]) -> None:
        self.batch, self.tokens, self.width = x.shape
        self.segments = segments
        self.tile: Tile = whole_rows(self.width)
        self.tiles = self._tiles(segments)

    def _tiles(self, segments: list[int]) -> int:
        return sum(-(-n // self.tile.tokens) for n in segments)

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Number of tiles; first token, tile and segment; the lengths of the pair (0 for a missing second)."""
        for number in range(0, len(self.segments), 2):
            before, (first, second) = self.segments[:number], (*self.segments[number:], 0)[:2]
            yield self._tiles([first, second]), sum(before), self._tiles(before), number, first, second

    def sums(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Room for the tiles' sums of two tensors."""
        size = (self.batch, self.tiles, self.width)
        return like.new_empty(size, dtype=dtype), like.new_empty(size, dtype=dtype)


def _segment_means(pairs: _Pairs, sums1: Tensor, sums2: Tensor) -> tuple[Tensor, Tensor]:
    """Means of two tensors, (B, S, D), from the tiles' sums, (B, tiles, D)."""
    size = (pairs.batch, len(pairs.segments), pairs.width)
    means1, means2 = sums1.new_empty(size), sums2.new_empty(size)
    block = min(512, power_of_two(pairs.width))
    for _, _, tile_begin, number, first, second in pairs:
        grid = (pairs.batch, min(2, len(pairs.segments) - number), -(-pairs.width // block))
        wrap_triton(_means)[grid](
            sums1, sums2, means1, means2, pairs.tiles, len(pairs.segments), number, tile_begin, first, second,
            pairs.width, block, pairs.tile.tokens, num_warps=4,
        )  # fmt: skip
    return means1, means2


@operator("merge_norm")
def merge_norm(
    x: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, segments: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mvsplit.kernels.merge_norm.merge_norm`, and what its backward pass needs.

    Returns:
        X' (B, T, D) in x's dtype; r (B, T, 1); X̄ and F̄ (B, S, D).
    """
    x, update = x.contiguous(), update.contiguous()
    dtype = accumulator(x, update)
    pairs = _Pairs(x, segments)
    tile = pairs.tile
    sums_x, sums_update = pairs.sums(x, dtype)
    for tiles, begin, tile_begin, _, first, second in pairs:
        wrap_triton(_sums)[(pairs.batch * tiles,)](
            x, update, sums_x, sums_update, pairs.tokens, pairs.tiles, tiles, begin, tile_begin, first, second,
            pairs.width, tile.block, tile.rows, tile.tokens, num_warps=tile.num_warps,
        )  # fmt: skip
    mean_x, mean_update = _segment_means(pairs, sums_x, sums_update)
    out, r = torch.empty_like(x), x.new_empty((pairs.batch, pairs.tokens, 1), dtype=dtype)
    for tiles, begin, _, number, first, second in pairs:
        wrap_triton(_merge)[(pairs.batch * tiles,)](
            x, update, alpha, beta, mean_x, mean_update, out, r, pairs.tokens, len(segments), tiles, begin, number,
            first, second,
            pairs.width, tile.block, tile.rows, tile.tokens, eps, num_warps=tile.num_warps,
        )  # fmt: skip
    return out, r, mean_x, mean_update


@operator("merge_norm_backward")
def merge_norm_backward(
    g: Tensor, out: Tensor, r: Tensor, update: Tensor, segments: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Δ (B, T, D), and the segment means of Δ and of Δ⊙F, (B, S, D) each.

    Args:
        g: gradient of X', (B, T, D).
        out: X', (B, T, D).
        r: (B, T, 1).
        update: F, (B, T, D).
        segments: lengths that add up to T.
    """
    g, update = g.contiguous(), update.contiguous()
    pairs = _Pairs(out, segments)
    tile = pairs.tile
    delta = torch.empty_like(out, dtype=r.dtype)
    sums_delta, sums_product = pairs.sums(out, r.dtype)
    for tiles, begin, tile_begin, _, first, second in pairs:
        wrap_triton(_deltas)[(pairs.batch * tiles,)](
            g, out, r, update, delta, sums_delta, sums_product, pairs.tokens, pairs.tiles, tiles, begin, tile_begin,
            first, second,
            pairs.width, tile.block, tile.rows, tile.tokens, num_warps=tile.num_warps,
        )  # fmt: skip
    return delta, *_segment_means(pairs, sums_delta, sums_product)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, update, alpha, beta, ctx.segments, _ = inputs
    out, *others = output
    ctx.save_for_backward(out, update, alpha, beta, *others)
    ctx.mark_non_differentiable(*others)
    ctx.type = x.dtype


def _backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    out, update, alpha, beta, r, mean_x, mean_update = ctx.saved_tensors
    delta, mean_delta, mean_product = merge_norm_backward(g, out, r, update, ctx.segments)
    products = [row * n for row, n in zip(mean_product.unbind(1), ctx.segments, strict=True)]  # (B, D) each
    sum_product = torch.stack(products).sum((0, 1))
    found = corrected(
        delta, mean_delta, sum_product, mean_update, mean_x, upcast(alpha), upcast(beta), tuple(ctx.segments)
    )
    types = ctx.type, update.dtype, alpha.dtype, beta.dtype
    return *(gradient.to(dtype) for gradient, dtype in zip(found, types, strict=True)), None, None


merge_norm.register_autograd(_backward, setup_context=_keep)
