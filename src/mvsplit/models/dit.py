"""The paper's single-stream diffusion transformer.

Shapes: B batch, C channels, P patch size, I image tokens, S context tokens, T = I + S tokens, D width.

Image and context tokens run through the same blocks, each block an attention and a SwiGLU branch joined to the
trunk by a residual (`models/residuals.py`). There is neither AdaLN nor a timestep embedding: the network infers t
from its input (paper: a linear probe on the image-token mean predicts t with R² ≈ 0.998).
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Len
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, is_grad_enabled, nn

from mvsplit.kernels.merge_norm import Segments, upcast
from mvsplit.models.attention import Attention
from mvsplit.models.conditioning import Context
from mvsplit.models.layers import Linear, SwiGLU, rms_norm
from mvsplit.models.recompute import Checkpointing
from mvsplit.models.residuals import Residual
from mvsplit.models.rope import rope_table

ResidualFactory = Callable[..., Residual]
"""Called as `factory(width=…, depth=…, branch=…)` for each of a block's two merges."""


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


class Block(nn.Module):
    """Attention and feed-forward, each merged into the trunk by its own residual: two merges per block.

    In training, the code that `compiled` holds runs instead of `compute`, if there is any: equal blocks share it. A
    `watched` block has hooks on its parts, which compiled code would not call.
    """

    compiled: Callable[..., Tensor] | None = None
    watched = False

    def __init__(
        self, width: int, depth: int, num_heads: int, hidden: int, residual: ResidualFactory, qk_eps: float
    ) -> None:
        super().__init__()
        self.residual1 = residual(width=width, depth=depth, branch="attention")
        self.residual2 = residual(width=width, depth=depth, branch="ffn")
        self.attention = Attention(width, num_heads, qk_eps, writer_std=self.residual1.writer_std(width))
        self.ffn = SwiGLU(width, hidden, writer_std=self.residual2.writer_std(hidden))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        run = self.compute if self.compiled is None or self.watched or not is_grad_enabled() else self.compiled
        return run(x, cos, sin, segments)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """What `forward` does, not compiled."""
        x = self.residual1(x, self.attention(self.residual1.branch_input(x), cos, sin), segments)
        return self.residual2(x, self.ffn(self.residual2.branch_input(x)), segments)


class DiT(nn.Module):
    """Predicts the velocity x0 − x1 at z_t.

    Args:
        image_size: [height, width] in pixels (or latent cells).
        channels: C, of the image or latent.
        patch_size: P; must divide both sides of the image.
        depth: blocks. width: D. num_heads: H, with D/H divisible by 4 (two-dimensional RoPE).
        hidden: inner width of the SwiGLU branch; 0 means 3·D (paper: 3072 at D = 1024).
        context: makes the context module from `width`, e.g. `functools.partial(ClassTokens, num_classes=10)`.
        residual: makes a residual from `width`, `depth` and `branch`.
        rope_theta: base of the rotary frequencies. eps: ε of the input norms. qk_eps: ε of the QK-norm.
        checkpointing: which blocks' activations are computed again in the backward pass; None keeps everything.
        compile: compile a block, once for all of them; the whole network would take hours at a thousand.
        trunk: type of the trunk between two merges. `float32`: with a gain of 1/√depth the error of bfloat16 weights or
            autocast then does not grow with depth (with a gain of 1 it does). `compute`: that of the branches, as in
            the paper's kernels; each merge rounds it, and two thousand roundings are a random walk. Merges, norms,
            token means, RoPE and QK-norm are computed in float32 either way, branches and their matrix products in the
            type of the weights or of autocast.

    Raises:
        ValueError: naming the key, for sizes that do not fit together.
    """

    def __init__(
        self,
        image_size: Annotated[list[PositiveInt], Len(2, 2)],
        channels: PositiveInt,
        patch_size: PositiveInt,
        depth: PositiveInt,
        width: PositiveInt,
        num_heads: PositiveInt,
        context: Callable[..., Context],
        residual: ResidualFactory,
        hidden: NonNegativeInt = 0,
        rope_theta: Annotated[float, Ge(1)] = 10000.0,
        eps: PositiveFloat = 1e-6,
        qk_eps: PositiveFloat = 1e-6,
        checkpointing: Checkpointing | None = None,
        compile: bool = False,
        trunk: Literal["float32", "compute"] = "float32",
    ) -> None:
        self.check(image_size, patch_size, width, num_heads, compile)
        super().__init__()
        self.patch_size, self.channels, self.eps, self.trunk = patch_size, channels, eps, trunk
        self.checkpointing = checkpointing or Checkpointing()
        self.rows, self.columns = image_size[0] // patch_size, image_size[1] // patch_size
        self.input_shape = (channels, *image_size)
        patch_dim = patch_size**2 * channels
        self.context = context(width=width)
        self.segments: Segments = (self.rows * self.columns, self.context.num_tokens)
        self.patch_proj = Linear(patch_dim, width, bias=True)
        self.blocks = nn.ModuleList()
        for _ in range(depth):  # one by one: sharded strategies take each as it is built
            block = Block(width, depth, num_heads, hidden or 3 * width, residual, qk_eps)
            if compile:
                block.compiled = torch.compile(block.compute, fullgraph=True)
            self.blocks.append(block)
        self.normalise_output = not block.residual2.normalises_output
        # Not stated in the paper: we start from a zero velocity, as diffusion transformers commonly do.
        self.final_proj = Linear(width, patch_dim, bias=True, std=0)
        tables = rope_table(self.rows, self.columns, width // num_heads, rope_theta, self.context.num_tokens)
        # As integers, (2, T, D/H): `network.bfloat16()` and its like round buffers of floats and leave these alone.
        self.rope: Tensor
        self.register_buffer("rope", torch.stack(tables).view(torch.int32), persistent=False)

    @staticmethod
    def check(image_size: list[int], patch_size: int, width: int, num_heads: int, compile: bool) -> None:
        """Raise `ValueError` for what does not fit; called on the composed config before anything is built."""
        for side in image_size:
            if side % patch_size:
                raise ValueError(f"model.patch_size = {patch_size}: must divide the image size {list(image_size)}")
        if width % num_heads:
            raise ValueError(f"model.width = {width}: must be divisible by model.num_heads = {num_heads}")
        if width // num_heads % 4:
            raise ValueError(
                f"model.num_heads = {num_heads}: width / num_heads = {width // num_heads} must be divisible by 4"
            )
        if not compile:
            return
        # Triton builds what starts its kernels from C, with $CC alone if that is set; kernels for CPUs are C++.
        if torch.cuda.is_available():
            compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
            if not any(map(shutil.which, compilers)):
                raise ValueError(
                    f"model.compile = True: needs a C compiler, and there is no {' or '.join(compilers)};"
                    " allowed is false"
                )
        elif not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise ValueError(
                "model.compile = True: needs a C++ compiler, and there is no g++ or clang++; allowed is false"
            )
        header = os.path.join(sysconfig.get_path("include"), "Python.h")  # both include it
        if not os.path.isfile(header):
            raise ValueError(
                f"model.compile = True: needs Python's headers (apt install python3-dev), and there is no {header};"
                " allowed is false"
            )

    @property
    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `rope_table`, (T, D/H) each, float32."""
        cos, sin = self.rope.view(torch.float32).unbind()
        return cos, sin

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity at z.

        Args:
            z: (B, C, height, width). t: (B,) times; not used by this network, part of the interface for others.
            condition: what the context module takes: (B,) classes or (B, S, W) embeddings.

        Returns:
            (B, C, height, width).
        """
        image = self.patch_proj(patchify(z, self.patch_size))  # (B, I, D)
        entries = (upcast(image), upcast(self.context(condition)))  # (B, I, D), (B, S, D)
        x = torch.cat([rms_norm(tokens, self.eps) for tokens in entries], dim=1)  # (B, T, D)
        if self.trunk == "compute":
            x = x.to(image.dtype)
        x = self.checkpointing.run(self.blocks, x, *self.rope_tables, self.segments)
        x = x[:, : self.segments[0]]  # (B, I, D)
        if self.normalise_output:
            x = rms_norm(x, self.eps)
        return unpatchify(self.final_proj(x), self.patch_size, self.rows, self.columns).to(z.dtype)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        """The condition, with the samples where mask (B,) is true unconditioned."""
        return self.context.drop(condition, mask)
