"""Networks that are no DiT, as a fork may bring them: `Pixels` offers nothing to watch, `Tokens` some of it."""

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn


class Pixels(nn.Module):
    """Two matrices on all pixels at once."""

    def __init__(self, image_size: list[int], channels: PositiveInt, num_classes: PositiveInt, width: PositiveInt = 16):
        super().__init__()
        self.input_shape = (channels, *image_size)
        self.null_class = num_classes
        pixels = channels * image_size[0] * image_size[1]
        self.classes = nn.Embedding(num_classes + 1, width)
        self.enter, self.leave = nn.Linear(pixels + 1, width), nn.Linear(width, pixels)

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        x = self.enter(torch.cat([z.flatten(1), t[:, None].to(z.dtype)], 1)) + self.classes(condition)
        return self.leave(torch.nn.functional.silu(x)).view_as(z)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        return condition.masked_fill(mask, self.null_class)


class Layer(nn.Module):
    """Attention and a feed-forward by other names than the DiT's; a call takes more than x, and a gain has no rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        y = x + told
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return x + self.gain * self.shrink(torch.relu(self.grow(x)))


class Tokens(nn.Module):
    """A token per row of the picture, and blocks of which one writer is known."""

    def __init__(
        self,
        image_size: list[int],
        channels: PositiveInt,
        num_classes: PositiveInt,
        width: PositiveInt = 16,
        depth: PositiveInt = 3,
    ) -> None:
        super().__init__()
        self.input_shape = (channels, *image_size)
        self.null_class = num_classes
        row = channels * image_size[1]
        self.classes = nn.Embedding(num_classes + 1, width)
        self.enter, self.leave = nn.Linear(row, width), nn.Linear(width, row)
        self.blocks = nn.ModuleList([Layer(width) for _ in range(depth)])

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        rows = z.transpose(1, 2)  # (B, height, C, width)
        x = self.enter(rows.flatten(2))
        told = self.classes(condition)[:, None] * (1 + t[:, None, None])
        for block in self.blocks:
            x = block(x, told)
        return self.leave(x).view_as(rows).transpose(1, 2)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        return condition.masked_fill(mask, self.null_class)

    def writers_of(self, block: Any) -> dict[str, Any]:
        return {"ffn": (block.shrink, None)}


class Maps(nn.Module):
    """Convolutions: lists of lists, blocks that return feature maps, a weight with two names, buffers, and attributes
    that mean something else in the DiT.
    """

    def __init__(self, image_size: list[int], channels: PositiveInt, num_classes: PositiveInt, width: PositiveInt = 8):
        super().__init__()
        self.input_shape = (channels, *image_size)
        self.null_class = num_classes
        self.checkpointing = True
        self.classes = nn.Embedding(num_classes + 1, width)
        self.enter, self.leave = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        self.levels = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)]) for _ in range(4)
        )
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.twin = nn.Conv2d(width, width, 1)
        self.twin.weight = self.blocks[0].weight
        self.gain = nn.Parameter(torch.tensor([0.5]))

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        x = self.enter(z) + self.classes(condition)[:, :, None, None]
        for convolution, norm in self.levels:
            x = x + self.gain * norm(convolution(x)).relu()
        for block in (*self.blocks, self.twin):
            x = x + block(x)
        return self.leave(x)

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        return condition.masked_fill(mask, self.null_class)
