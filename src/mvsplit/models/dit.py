"""The paper's single-stream diffusion transformer, and what it shares with other transformers (`models/vit.py`).

Shapes: B batch, C channels, P patch size, I image tokens, S context tokens, T = I + S tokens, D width.

Image and context tokens pass through the same blocks. In each, an attention and a SwiGLU branch are merged into the
trunk by residuals (`models/residuals.py`). There is neither AdaLN nor a timestep embedding: the network infers t
from its input (paper: a linear probe on the image-token mean predicts t with R² ≈ 0.998).
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Len
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from mvsplit.kernels.choice import Fused, KernelChoice, Kernels, Sizes
from mvsplit.kernels.merge_norm import Segments, upcast
from mvsplit.models.attention import Attention, rope_table
from mvsplit.models.compiled import Compilable, Compile, append_blocks, check_compiler
from mvsplit.models.conditioning import Context, Tokens
from mvsplit.models.layers import Linear, SwiGLU, rms_norm
from mvsplit.models.recompute import Checkpointing
from mvsplit.models.residuals import Residual
from mvsplit.utils.errors import UserError

MAX_SIDE = 512
"""Most patches along a side: the size of the reference code's RoPE table."""
ResidualFactory = Callable[..., Residual]
"""Called as `factory(width=…, depth=…, branch=…, number=…)` for each of a block's two merges."""


def patchify(image: Tensor, patch: int) -> Tensor:
    """(B, C, rows·P, columns·P) → (B, rows·columns, P·P·C): raster order, channels fastest (reference layout)."""
    B, C, height, width = image.shape
    x = image.reshape(B, C, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)


def unpatchify(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Inverse of `patchify`."""
    B, C = tokens.shape[0], tokens.shape[2] // patch**2
    x = tokens.reshape(B, rows, columns, patch, patch, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * patch, columns * patch)


class Block(Compilable):
    """Attention and feed-forward, each merged into the trunk by its own residual: two merges per block."""

    def __init__(
        self, width: int, depth: int, number: int, num_heads: int, hidden: int, residual: ResidualFactory, qk_eps: float
    ) -> None:
        super().__init__()
        self.residual1 = residual(width=width, depth=depth, branch="attention", number=number)
        self.residual2 = residual(width=width, depth=depth, branch="ffn", number=number)
        self.attention = Attention(width, num_heads, qk_eps, writer_std=self.residual1.writer_std(width))
        self.ffn = SwiGLU(width, hidden, writer_std=self.residual2.writer_std(hidden))

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """x: the trunk, (B, T, D), wider if the residual has several streams; cos, sin: of `rope_table`."""
        x = self.residual1(x, self.attention(self.residual1.branch_input(x), cos, sin), segments)
        return self.residual2(x, self.ffn(self.residual2.branch_input(x)), segments)

    def worth_compiling(self, x: Tensor, *args: Any) -> bool:
        # PyTorch compiles sizes of 0 and 1 apart. Captions have so few tokens now and then.
        *_, segments = args
        return not self.lengths_differ or segments[1] > 1

    fused = Fused()
    lengths_differ = False
    """Whether the number of context tokens differs between batches; set by the network."""

    def use(self, fused: Fused) -> None:
        """Use these fused operations."""
        self.fused = fused
        self.attention.fused, self.ffn.fused = fused.rope_norm, fused.swiglu
        self.residual1.fused = self.residual2.fused = fused.merge_norm


def check_sizes(image_size: list[int], patch_size: int, width: int, num_heads: int, compile: Compile) -> None:
    """Raise `ValueError` for what fits no transformer of patches; called before anything is built."""
    if any(side % patch_size for side in image_size):
        raise ValueError(f"model.patch_size = {patch_size}: must divide the image size {list(image_size)}")
    if width % num_heads:
        raise ValueError(f"model.width = {width}: must be divisible by model.num_heads = {num_heads}")
    check_compiler(compile)


class PatchTransformer(nn.Module):
    """Image patches and a second segment of tokens in one trunk; subclasses add what reads the result.

    Args:
        image_size: [height, width] in pixels (or latent cells) that the network is trained on; it takes others too.
        channels: C, of the image or latent.
        patch_size: P; must divide both sides of the image.
        depth: number of blocks.
        width: D.
        num_heads: H, with D/H divisible by 4 (two-dimensional RoPE).
        context: builds the second segment's module from `width`, e.g. `functools.partial(ClassTokens, num_classes=10)`.
        residual: builds a residual from `width`, `depth`, `branch` and `number`.
        hidden: inner width of the SwiGLU branch; 0 means 3·D (paper: 3072 at D = 1024).
        rope_theta: base of the rotary frequencies.
        eps: ε of the input norms.
        qk_eps: ε of the QK-norm.
        checkpointing: which blocks' activations are recomputed in the backward pass; None keeps all activations.
        compile: compile one block for all; `auto`: if enough passes are expected, see `compiled.py`.
        trunk: dtype of the trunk between merges. `float32`: with a gain of 1/√depth the error of bfloat16 weights or
            autocast then does not grow with depth (with a gain of 1 it does). `compute`: the branches' dtype, as in
            the paper's kernels; each merge rounds the trunk, and two thousand roundings are a random walk. In both
            cases merges, norms, token means, RoPE and QK-norm are computed in float32, and branches in the dtype of
            the weights or of autocast.
        kernels: `plain`: PyTorch's operations; `fused`: Triton kernels for the paper's merge, RoPE with QK-norm, and
            SwiGLU; `auto`: plain on a CPU, on a GPU for each what is faster at the first batch. Each process times for
            itself: choose `fused` or `plain` for runs that must be equal to the last bit.

    Raises:
        ValueError: for sizes that do not fit together; names the key.
    """

    def __init__(
        self,
        image_size: Annotated[list[PositiveInt], Len(2, 2)],
        channels: PositiveInt,
        patch_size: PositiveInt,
        depth: PositiveInt,
        width: PositiveInt,
        num_heads: PositiveInt,
        context: Callable[..., Tokens],
        residual: ResidualFactory,
        hidden: NonNegativeInt = 0,
        rope_theta: Annotated[float, Ge(1)] = 10000.0,
        eps: PositiveFloat = 1e-6,
        qk_eps: PositiveFloat = 1e-6,
        checkpointing: Checkpointing | None = None,
        compile: Compile = False,
        trunk: Literal["float32", "compute"] = "float32",
        kernels: Kernels = "auto",
    ) -> None:
        self.check(image_size, patch_size, width, num_heads, compile, kernels)
        super().__init__()
        self.patch_size, self.channels, self.eps, self.trunk = patch_size, channels, eps, trunk
        self.compile_when = compile
        self.checkpointing = checkpointing or Checkpointing()
        self.rows, self.columns = image_size[0] // patch_size, image_size[1] // patch_size
        self.input_shape = (channels, *image_size)
        self.width, self.patch_dim = width, patch_size**2 * channels
        self.context = context(width=width)
        # At the size it is trained on, with the longest context. Batches may differ from it.
        self.segments: Segments = (self.rows * self.columns, self.context.num_tokens)
        self.patch_proj = Linear(self.patch_dim, width, bias=True)
        hidden = hidden or 3 * width
        numbers = range(1, depth + 1)
        self.blocks = nn.ModuleList()
        new = (Block(width, depth, number, num_heads, hidden, residual, qk_eps) for number in numbers)
        append_blocks(self.blocks, new, compile)
        for block in self.blocks:
            block.lengths_differ = getattr(self.context, "lengths_differ", False)  # type: ignore[assignment]
        last: Block = self.blocks[-1]  # type: ignore[assignment]
        self.normalise_output = not last.residual2.normalises_output
        self.kernels = KernelChoice(kernels, last.residual1.has_fused)
        self._sizes = functools.partial(Sizes, width=width, num_heads=num_heads, hidden=hidden)
        self.rope_tables = functools.partial(rope_table, head_dim=width // num_heads, theta=rope_theta)

    not_decayed = frozenset({"patch_proj.weight"})
    """Matrices without weight decay. The reference code's patch projection is a convolution: its weight has four
    dimensions, and the paper decays only those of two."""

    @staticmethod
    def check(
        image_size: list[int], patch_size: int, width: int, num_heads: int, compile: Compile, kernels: Kernels = "auto"
    ) -> None:
        """Raise `ValueError` for sizes that do not fit; called on the composed config before anything is built."""
        check_sizes(image_size, patch_size, width, num_heads, compile)
        KernelChoice.check(kernels, width)
        if max(image_size) > MAX_SIDE * patch_size:
            raise UserError(
                f"model.image_size = {list(image_size)}: at most {MAX_SIDE} patches of {patch_size} are allowed a side"
            )
        if (head_dim := width // num_heads) % 4:
            raise ValueError(f"model.num_heads = {num_heads}: width / num_heads = {head_dim} must be divisible by 4")

    @property
    def num_tokens(self) -> int:
        """T, with the longest context."""
        return sum(self.segments)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (B, C, height, width).

        Raises:
            UserError: for images that are not a whole number of patches, or more than the network can place.
        """
        shape, side = tuple(image.shape[1:]), self.patch_size
        if len(shape) != 3 or shape[0] != self.channels or shape[1] % side or shape[2] % side or 0 in shape:
            raise UserError(
                f"model: images of shape {shape}; must be ({self.channels}, height, width) with both sides divisible by"
                f" model.patch_size = {side}"
            )
        rows, columns = shape[1] // side, shape[2] // side
        if max(rows, columns) > MAX_SIDE:
            raise UserError(f"model: images of {rows} × {columns} patches; at most {MAX_SIDE} × {MAX_SIDE} are allowed")
        return rows, columns

    def run(self, image: Tensor, condition: Tensor) -> Tensor:
        """The tokens after the last block: of the image, then of the context.

        Args:
            image: (B, C, height, width).
            condition: input of the context module.

        Returns:
            (B, T, D).
        """
        rows, columns = self.grid(image)
        patches = self.patch_proj(patchify(image, self.patch_size))  # (B, I, D)
        wide = upcast(patches)
        entries = (wide, self.context(condition).to(wide.dtype))  # (B, I, D), (B, S, D)
        x = torch.cat([rms_norm(tokens, self.eps) for tokens in entries], dim=1)  # (B, T, D)
        segments = (entries[0].shape[1], entries[1].shape[1])
        # Not a buffer: there is one for each size, `network.bfloat16()` would round it, and it takes 0.1 ms.
        tables = self.rope_tables(rows, columns, num_context=segments[1], device=x.device)
        if self.trunk == "compute":
            x = x.to(patches.dtype)
        compiled = bool(self.blocks[0].compiled)
        sizes = self._sizes(segments=segments, trunk=x.dtype, branch=patches.dtype)
        fused = self.kernels.choose(sizes, x, compiled)
        for block in self.blocks:
            if block.fused != fused:
                block.use(fused)  # type: ignore[operator]
        first: Residual = self.blocks[0].residual1  # type: ignore[assignment]
        last: Residual = self.blocks[-1].residual2  # type: ignore[assignment]
        return last.leave(self.checkpointing.run(self.blocks, first.enter(x), *tables, segments))

    def output(self, x: Tensor) -> Tensor:
        """Tokens (B, …, D) of the last block as a head reads them: normalised."""
        return rms_norm(x, self.eps) if self.normalise_output else x

    # What the monitor measures, see `Watchable` in `stability/taps.py`.

    def writers_of(self, block: Block) -> dict[str, tuple[nn.Module, nn.Module]]:
        return {"attention": (block.attention.proj, block.residual1), "ffn": (block.ffn.w2, block.residual2)}

    def heads_of(self, block: Block) -> tuple[nn.Linear, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            context = qkv.shape[1] - self.segments[0]
            tables = self.rope_tables(self.rows, self.columns, num_context=context, device=qkv.device)
            return block.attention.heads(qkv, *tables)

        return block.attention.qkv, heads


class DiT(PatchTransformer):
    """Predicts the velocity x0 − x1 at z_t. Its arguments are those of `PatchTransformer`."""

    context: Context

    def __init__(self, *args: Any, **common: Any) -> None:
        super().__init__(*args, **common)
        # Not stated in the paper: starts at zero velocity, as is usual for diffusion transformers.
        self.final_proj = Linear(self.width, self.patch_dim, bias=True, std=0)

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity at z.

        Args:
            z: (B, C, height, width).
            t: (B,) times; part of the interface, unused by this network.
            condition: input of the context module: (B,) classes or (B, S, W) embeddings.

        Returns:
            (B, C, height, width).
        """
        rows, columns = self.grid(z)
        x = self.output(self.run(z, condition)[:, : rows * columns])  # (B, I, D)
        return unpatchify(self.final_proj(x), self.patch_size, rows, columns).to(z.dtype)

    @property
    def embedding_width(self) -> int | None:
        """W of the captions' embeddings that it is conditioned on; None if it is conditioned on classes."""
        return getattr(self.context, "embedding_width", None)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Replace the condition where mask (B,) is true with the null condition."""
        return self.context.drop(condition, mask)
