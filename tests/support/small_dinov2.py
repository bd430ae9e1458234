"""A small DINOv2 with random weights, in the layout of the published files."""

import torch
from torch import Tensor


def dino_weights(depth: int = 2, width: int = 128, side: int = 16) -> dict[str, Tensor]:
    """Random weights with the names of the published files."""
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,), "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,), "ls1.gamma": (width,), "ls2.gamma": (width,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, 1 + side**2, width),
        "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draws) / max(shape) ** 0.5 for name, shape in shapes.items()}
