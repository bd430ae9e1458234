"""From a decoded picture to the network's input. A transform is called as (uint8 image, place in the stream)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from mvsplit.utils.rng import Stream, uniform


@dataclass(frozen=True)
class CentreCrop:
    """Scale the shorter side to fit, crop the centre, map 0 … 255 to [−1, 1].

    Args:
        image_size: [height, width]. flip: mirror half of the pictures, chosen by (seed, place in the stream).
        seed: of the flips.
    """

    image_size: list[int]
    flip: bool = False
    seed: int = 0

    def __call__(self, image: Tensor, position: int) -> Tensor:
        """(C, any height, any width) uint8 → (C, height, width) float32."""
        height, width = self.image_size
        if image.shape[1:] != (height, width):
            scale = max(height / image.shape[1], width / image.shape[2])
            size = [max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))]
            image = T.center_crop(T.resize(image, size, antialias=True), [height, width])
        if self.flip and uniform(self.seed, Stream.AUGMENT, torch.tensor([position])).item() < 0.5:
            image = image.flip(-1)
        return image.float() / 127.5 - 1
