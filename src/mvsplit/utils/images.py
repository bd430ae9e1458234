"""From network output to images."""

from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

SMALLEST_SIDE = 64


def colour_projection(latents: Tensor) -> Tensor:
    """Latents (B, C, height, width) of about unit variance → colours (B, 3, height, width), most within [−1, 1].

    The three directions are orthogonal, and always the same: pictures of different steps can be compared.
    """
    draws = torch.randn(latents.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.linalg.qr(draws)[0].to(latents.device, torch.float32)  # (C, 3)
    return torch.einsum("bchw,cd->bdhw", latents.float(), directions) / 2


def to_uint8(pictures: Tensor) -> Tensor:
    """[−1, 1] → 0 … 255: (B, C, height, width) float → uint8. Unless C is 1 or 3, a projection to colours."""
    if pictures.shape[1] == 2 or pictures.shape[1] > 3:
        pictures = colour_projection(pictures)
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def enlarge(pictures: Tensor) -> Tensor:
    """Repeat pixels until the shorter side has at least 64."""
    factor = max(1, -(-SMALLEST_SIDE // min(pictures.shape[-2:])))
    return F.interpolate(pictures, scale_factor=factor, mode="nearest") if factor > 1 else pictures


def picture_grid(pictures: Tensor, columns: int) -> Tensor:
    """(B, C, height, width) in [−1, 1] → one uint8 RGB image (3, …), row by row, enlarged."""
    return make_grid(enlarge(to_uint8(pictures)), nrow=columns, padding=4, pad_value=64)


def save_png(picture: Tensor, path: Path, prompt: str | None = None) -> Path:
    """Write a uint8 image (C, height, width), with the prompt that it was drawn from in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = PngInfo()
    if prompt is not None:
        about.add_itxt("prompt", prompt)
    array = picture[0].numpy() if len(picture) == 1 else picture.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(path, pnginfo=about)
    return path
