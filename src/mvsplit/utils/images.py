"""Network output to pictures that one can look at."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import write_png
from torchvision.utils import make_grid

SMALLEST_SIDE = 64


def to_uint8(pictures: Tensor) -> Tensor:
    """[−1, 1] → 0 … 255: (B, C, height, width) float → uint8. Other than 1 or 3 channels show the first as grey."""
    if pictures.shape[1] not in (1, 3):
        pictures = pictures[:, :1]
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def enlarge(pictures: Tensor) -> Tensor:
    """Repeat pixels until the shorter side has at least 64, so that small pictures can be seen."""
    factor = max(1, -(-SMALLEST_SIDE // min(pictures.shape[-2:])))
    return F.interpolate(pictures, scale_factor=factor, mode="nearest") if factor > 1 else pictures


def picture_grid(pictures: Tensor, columns: int) -> Tensor:
    """(B, C, height, width) in [−1, 1] → one uint8 RGB picture (3, …), row by row, enlarged for the eye."""
    return make_grid(enlarge(to_uint8(pictures)), nrow=columns, padding=4, pad_value=64)


def save_png(picture: Tensor, path: Path) -> Path:
    """Write a uint8 picture (C, height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(picture, str(path))
    return path
