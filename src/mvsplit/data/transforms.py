"""From a decoded picture to pixels of the wanted size. A transform is called as (picture, place in the stream)."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvsplit.utils.rng import Stream, uniform_at

MAX_SCALED = 1 << 26
"""Pixels that a picture may be scaled to before it is cropped: a thin one of few bytes could fill the memory."""


@dataclass(frozen=True)
class CentreCrop:
    """ADM's preprocessing of ImageNet, which published FID values stand on; exactly that for square sizes.

    Halve with a box filter while both sides stay at least as long as wanted, scale the shorter side to fit with a
    bicubic one, crop the centre.

    Args:
        image_size: [height, width]. flip: mirror half of the pictures, chosen by (seed, place in the stream).
        seed: of the flips.
    """

    image_size: list[int]
    flip: bool = False
    seed: int = 0

    def __call__(self, image: Image.Image, position: int) -> Tensor:
        """A grey or RGB picture of any size → (C, height, width) uint8."""
        pixels = torch.from_numpy(np.stack([np.asarray(plane) for plane in self.crop(image).split()]))
        if self.flip and uniform_at(self.seed, Stream.AUGMENT, position) < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    def crop(self, image: Image.Image) -> Image.Image:
        height, width = self.image_size
        while image.height >= 2 * height and image.width >= 2 * width:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(height / image.height, width / image.width)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        if size[0] * size[1] > MAX_SCALED:
            raise ValueError(f"{image.width} × {image.height} pixels would have to be scaled to {size[0]} × {size[1]}")
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
