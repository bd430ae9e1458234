"""DINOv2's features, for FD-DINOv2 (Stein et al., 2023), which agrees better with people than FID.

Shapes: B batch, T tokens, D width, H heads.

The network is written here because none of the libraries does what published distances are based on, Meta's code by
`torch.hub` (it runs whatever its repository contains): others interpolate the position embedding to other places.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.evaluation.feature_networks import FeatureNetwork, Features, in_colour
from mvsplit.evaluation.weight_files import check_shapes, downloaded, load_weights
from mvsplit.utils.errors import UserError

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
IMAGE_SIZE, PATCH, HEAD = 224, 14, 64
"""Pixels of the resized image and of a patch, and width of an attention head (in all of DINOv2's sizes)."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_DEPTH, MAX_WIDTH = 64, 4096
"""Largest network that a file may describe; the largest of DINOv2 has 40 and 1536."""


class DinoV2(FeatureNetwork):
    """DINOv2's class token after the last norm; the usual protocol takes ViT-L/14, with 1024 features.

    Images are resized to 224 × 224 by a bicubic filter with antialiasing, as in dgm-eval (by Pillow, to whole numbers)
    and EDM2 (as here, on tensors, which it found to give almost the same distances).

    Args:
        weights: path of a published file (`dinov2_vit{s,b,l}14_pretrain.pth`, without registers) or of the same tensors
            as safetensors, which determine the network's size; None downloads ViT-L/14.
        sha256: that the file must have.

    Raises:
        UserError: if the weights cannot be loaded.
    """

    def __init__(self, weights: str | None = None, sha256: str | None = None) -> None:
        super().__init__()
        path = Path(weights) if weights is not None else downloaded(DINOV2_URL)
        tensors, self.sha256 = load_weights(path, sha256)
        tensors.pop("mask_token", None)  # only for its training
        depth, width, side = _sizes(tensors, path)
        with torch.device("meta"):
            self.network = VisionTransformer(depth, width, side)
        shapes = {name: tensor.shape for name, tensor in self.network.state_dict().items()}
        check_shapes(tensors, shapes, path, f"a DINOv2 of {depth} blocks of width {width}")
        self.network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        self.num_features = width
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Features:
        x = in_colour(images).float()
        x = F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True) / 255
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return Features(self.network((x - mean) / std))

    def identity(self) -> dict[str, Any]:
        return {"name": "DinoV2", "sha256": self.sha256, "resize": "bicubic, antialiased"}


def _sizes(tensors: dict[str, Tensor], path: Path) -> tuple[int, int, int]:
    """Number of blocks, width, and patches along a side of the position embedding."""
    places = tensors.get("pos_embed", torch.zeros(0)).shape
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,3})\.", name))}
    depth, width, side = len(numbers), places[-1], round((places[1] - 1) ** 0.5) if len(places) == 3 else 0
    valid = len(places) == 3 and side > 0 and places[1] == side**2 + 1 and width % HEAD == 0
    if not (valid and 0 < depth <= MAX_DEPTH and 0 < width <= MAX_WIDTH):
        raise UserError(f"features.weights = {path}: not the weights of a DINOv2 (dinov2_vitl14_pretrain.pth)")
    return depth, width, side


class VisionTransformer(nn.Module):
    """(B, 3, height, width) → (B, D), with the names of the published weights."""

    def __init__(self, depth: int, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)  # (B, D, rows, columns)
        rows, columns = patches.shape[-2:]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)  # (B, T, D)
        x = x + self.positions(rows, columns)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding (1, T, D), interpolated to so many patches.

        The factor is by a tenth of a patch too large, as it was when the network was trained: this shifts all places.
        """
        if (rows, columns) == (self.side, self.side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (self.side, self.side))
        factors = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        assert grid.shape[-2:] == (rows, columns)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and scaled per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.empty(width)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, 64)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)  # (B, T, D)
        x = x + self.attn["proj"](attended) * self.ls1["gamma"]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2["gamma"]
