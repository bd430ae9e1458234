"""What a sample's bytes mean: pictures, or latents of an autoencoder. One class each, chosen by `data.format`.

Shapes: B batch, C channels.

A format names the members it reads (nothing else in a shard is opened, and nothing is ever unpickled), decodes one
sample on the CPU, and finishes a whole batch on the device.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import safetensors.torch
import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Seed, Stream, normal, uniform

Transform = Callable[[Image.Image, int], Tensor]
"""(picture, place in the training stream) → uint8 (C, height, width)."""
Batch = dict[str, Any]
Manifest = dict[str, Any]
PAGE = 2048
"""Zeros in a row that no JPEG's compressed data holds, but a page that was never written does."""


class Format(Protocol):
    """What the reader asks of a format."""

    members: ClassVar[dict[str, tuple[str, ...]]]
    """Parts of a sample and the suffixes that each may have; `data` is required."""

    def bind(self, parts: set[str], manifest: Manifest | None) -> None:
        """Check that a set with these parts and this manifest can be read.

        Raises:
            UserError: if it cannot.
        """

    def inspect(self, data: bytes) -> str | None:
        """What is visibly wrong with the bytes of `data`, without decoding them; None if nothing is."""

    def choose(self, positions: Sequence[int], train: bool) -> list[str]:
        """Which part to read for each place in the stream."""

    def decode(self, data: bytes, position: int, train: bool) -> dict[str, Tensor]:
        """One sample's tensors. Whatever it raises counts as undecodable."""

    def blank(self) -> dict[str, Tensor]:
        """Tensors of the same shapes, for a place that cannot be filled."""

    def finish(self, batch: Batch, train: bool) -> Batch:
        """On the device: add `image` (B, C, height, width) float32, as the network sees it."""


class Images:
    """Encoded pictures: png, jpg, webp; [−1, 1] for the network.

    Args:
        image_size: [height, width] that the transforms give. channels: 1 (grey) or 3 (RGB).
        transform: of training pictures. val_transform: of the others; by default the same.
        max_pixels: larger pictures are refused before they are decoded.
    """

    members: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("png", "jpg", "jpeg", "webp")}

    def __init__(
        self,
        image_size: list[int],
        channels: PositiveInt,
        transform: Transform,
        val_transform: Transform | None = None,
        max_pixels: PositiveInt = 1 << 26,
    ) -> None:
        self.shape, self.max_pixels = (channels, *image_size), max_pixels
        self.mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
        self.transform, self.val_transform = transform, val_transform or transform

    @staticmethod
    def check(image_size: list[int], channels: int, transform: dict[str, Any]) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        if channels not in (1, 3):
            raise ValueError(f"data.channels = {channels}: allowed are 1 (grey) and 3 (RGB)")
        if (size := transform.get("image_size", image_size)) != image_size:
            raise ValueError(f"data.format.transform.image_size = {size}: data.image_size is {image_size}")

    def bind(self, parts: set[str], manifest: Manifest | None) -> None:
        check_kind(manifest, "images", "pictures")

    def inspect(self, data: bytes) -> str | None:
        return jpeg_damage(data)

    def choose(self, positions: Sequence[int], train: bool) -> list[str]:
        return ["data"] * len(positions)

    def decode(self, data: bytes, position: int, train: bool) -> dict[str, Tensor]:
        picture = decode_picture(data, self.mode, self.max_pixels)
        return {"image": (self.transform if train else self.val_transform)(picture, position)}

    def blank(self) -> dict[str, Tensor]:
        return {"image": torch.zeros(self.shape, dtype=torch.uint8)}

    def finish(self, batch: Batch, train: bool) -> Batch:
        return batch | {"image": batch["image"].float() / 127.5 - 1}


class Latents:
    """Posterior mean and standard deviation of an autoencoder, as `src/encode.py` writes them (bf16 safetensors).

    A sample z = mean + std·ε is drawn anew at each place of the training stream (in validation: per sample, the
    same each time), then normalised by the set's channel statistics: (z − channel_mean) / channel_std.

    Args:
        image_size: [height, width] of the latent. channels: C.
        flip: use the latent of the mirrored picture for half of the places. seed: of ε and the flips.
        normalise: take the channel statistics from the set's manifest; false leaves latents as they are.
    """

    members: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("safetensors",), "flipped": ("flipped.safetensors",)}

    def __init__(
        self, image_size: list[int], channels: PositiveInt, flip: bool = True, seed: Seed = 0, normalise: bool = True
    ) -> None:
        self.shape, self.flip, self.seed, self.normalise = (channels, *image_size), flip, seed, normalise
        self.statistics: tuple[list[float], list[float]] | None = None  # channel means, standard deviations

    def bind(self, parts: set[str], manifest: Manifest | None) -> None:
        check_kind(manifest, "latents", "latents")
        if self.flip and "flipped" not in parts:
            raise UserError("data.format.flip = True: these latents were encoded without mirrored ones; allowed: false")
        if not self.normalise:
            return
        if manifest is None or "channel_mean" not in manifest:
            raise UserError(
                "data.format.normalise = True: the set has no manifest with channel statistics; allowed is false"
            )
        shape: Any = manifest.get("shape")
        mean: Any = manifest.get("channel_mean")
        std: Any = manifest.get("channel_std")
        if shape != list(self.shape):
            raise UserError(
                f"data.channels, data.image_size = {self.shape[0]}, {list(self.shape[1:])}: the set's latents have the"
                f" shape {shape}"
            )
        for values in (mean, std):
            numbers = isinstance(values, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in values)
            if not numbers or len(values) != self.shape[0]:
                raise UserError("data.folder: the channel statistics in the set's manifest are no list of numbers")
        if min(std) <= 0:
            raise UserError("data.folder: a standard deviation in the set's manifest is not above 0")
        self.statistics = (mean, std)

    def inspect(self, data: bytes) -> str | None:
        return None

    def choose(self, positions: Sequence[int], train: bool) -> list[str]:
        if not (train and self.flip):
            return ["data"] * len(positions)
        draws = uniform(self.seed, Stream.AUGMENT, torch.tensor(positions))[:, 0]
        return ["flipped" if flipped else "data" for flipped in (draws < 0.5).tolist()]

    def decode(self, data: bytes, position: int, train: bool) -> dict[str, Tensor]:
        tensors = safetensors.torch.load(data)
        mean, std = tensors["mean"], tensors["std"]
        for tensor in (mean, std):
            if tensor.shape != self.shape or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise ValueError(f"a latent of {tuple(tensor.shape)} {tensor.dtype}; {self.shape} is needed")
        return {"mean": mean.bfloat16(), "std": std.bfloat16()}

    def blank(self) -> dict[str, Tensor]:
        return {name: torch.zeros(self.shape, dtype=torch.bfloat16) for name in ("mean", "std")}

    def finish(self, batch: Batch, train: bool) -> Batch:
        mean, std = batch["mean"].float(), batch["std"].float()
        key = (Stream.LATENT, batch["position"]) if train else (Stream.VAL_LATENT, batch["index"])
        z = mean + std * normal(self.seed, *key, self.shape)
        if self.statistics is not None:
            channel_mean, channel_std = (z.new_tensor(values).view(-1, 1, 1) for values in self.statistics)
            z = (z - channel_mean) / channel_std
        rest = {name: value for name, value in batch.items() if name not in ("mean", "std")}
        return rest | {"image": z}


def check_kind(manifest: Manifest | None, kind: str, name: str) -> None:
    """Check that a set that says what it holds is of the format that the config names."""
    if manifest is not None and (holds := manifest.get("kind", kind)) != kind:
        raise UserError(f"data.format: {name} are wanted, the set's manifest says that it holds {holds}")


def decode_picture(data: bytes, mode: Literal["L", "RGB"], max_pixels: int) -> Image.Image:
    """An encoded picture.

    By Pillow: torchvision's own decoder dies of a damaged PNG with the whole process, and ADM's crop is defined by
    Pillow's filters.

    Raises:
        ValueError, OSError, SyntaxError and others: if it is damaged, too large, or has more than 8 bits a channel.
    """
    if (damage := jpeg_damage(data)) is not None:
        raise ValueError(damage)
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} × {image.height} pixels; {max_pixels} are allowed")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("an animation")
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise ValueError(f"{image.mode} pixels; 8 bits a channel are read")
        return image.convert(mode)


def jpeg_damage(data: bytes) -> str | None:
    """Damage that decoders let pass: compressed data with a page of zeros in it, or without the end mark.

    Returns:
        What is wrong; None if nothing is, or if it is no JPEG.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place = 2  # walk over the segments before the picture: thumbnails and notes in them may hold anything
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        if data[place + 1] == 0xFF:  # a fill byte
            place += 1
            continue
        place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
    if data.find(bytes(PAGE), place, len(data.rstrip(b"\0"))) >= 0:
        return "zeros in the middle of its data"
    if data.rfind(b"\xff\xd9", place) < 0:
        return "its end is missing or zeroed"
    return None
