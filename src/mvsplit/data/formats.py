"""What a sample's bytes mean: images, or latents of an autoencoder. One class each, selected by `data.format`.

Shapes: B batch, C channels.

A format names the members it reads (nothing else in a shard is opened, and nothing is ever unpickled), decodes one
sample on the CPU, and finishes a whole batch on the device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from mvsplit.data.captions import CaptionStates
from mvsplit.data.latent_space import LatentSpace
from mvsplit.data.transforms import decode_picture, in_colour, jpeg_damage
from mvsplit.utils.config import Seed
from mvsplit.utils.console import info_once
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Stream, normal, uniform

Transform = Callable[[Image.Image, int], Tensor]
"""(image, place in the training stream) → uint8 (C, height, width)."""
Batch = dict[str, Any]
Manifest = dict[str, Any]
TEXT = {"text": ("text.safetensors",)}
"""The part of any format that contains the caption's states (`data/captions.py`), with its suffixes."""


class Format(ABC):
    """What the reader needs of a format."""

    kind: ClassVar[str]
    """What a set's manifest, if it has one, calls it."""
    members: ClassVar[dict[str, tuple[str, ...]]]
    """Parts of a sample, with the suffixes allowed for each; `data` is required. `text` is read on request alone."""
    space: LatentSpace | None = None
    """How samples become images again, if they are latents; known once a set is bound."""
    text: CaptionStates | None = None
    """The captions' states that samples need; None: they are not read."""
    labelled: bool = True
    """Whether samples need classes."""

    def bind(self, parts: set[str], manifest: Manifest | None) -> None:
        """Check that a set with these parts and this manifest can be read.

        Raises:
            UserError: if it cannot.
        """
        if manifest is not None and (found := manifest.get("kind", self.kind)) != self.kind:
            raise UserError(f"data.format = {self.kind}: the set contains {found}, according to its manifest")
        if self.text is not None and "text" not in parts:
            raise UserError(f"data.text = {self.text.padding}: no sample of the set has states of its caption")
        self.space = self.space_of(manifest)

    def space_of(self, manifest: Manifest | None) -> LatentSpace | None:
        """How this format's samples become images; None if they are.

        Raises:
            UserError: if the manifest does not record it.
        """
        return None

    def inspect(self, data: bytes) -> str | None:
        """Damage in the bytes of `data` that reading might not notice; None if there is none."""
        return None

    def choose(self, positions: Sequence[int], train: bool) -> list[str]:
        """Which part to read for each place in the stream."""
        return ["data"] * len(positions)

    @abstractmethod
    def decode(self, data: bytes, position: int, train: bool) -> dict[str, Tensor]:
        """One sample's tensors. Any exception counts as undecodable."""

    @abstractmethod
    def blank(self) -> dict[str, Tensor]:
        """Tensors of the same shapes, for a sample that cannot be read."""

    @abstractmethod
    def finish(self, batch: Batch, train: bool) -> Batch:
        """On the device: add `image` (B, C, height, width) float32, as the network sees it."""


class Images(Format):
    """Encoded images: png, jpg, webp (`data/transforms.py`); [−1, 1] for the network.

    Args:
        image_size: [height, width] after the transform.
        channels: 1 (grey) or 3 (RGB).
        transform: of training images.
        val_transform: of validation images; by default the same.
        max_pixels: larger images are rejected before they are decoded.
    """

    kind = "images"
    members: ClassVar = {"data": ("png", "jpg", "jpeg", "webp"), **TEXT}

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
        self._colour_logged = False

    @staticmethod
    def check(image_size: list[int], channels: int, transform: dict[str, Any]) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        if channels not in (1, 3):
            raise ValueError(f"data.channels = {channels}: must be 1 (grey) or 3 (RGB)")
        if (size := transform.get("image_size", image_size)) != image_size:
            raise ValueError(f"data.format.transform.image_size = {size}: must equal data.image_size = {image_size}")

    def inspect(self, data: bytes) -> str | None:
        if self.mode == "L" and not self._colour_logged and in_colour(data):
            info_once("data.channels = 1: colour images are converted to grey")
            self._colour_logged = True
        return jpeg_damage(data, self.max_pixels)

    def decode(self, data: bytes, position: int, train: bool) -> dict[str, Tensor]:
        picture = decode_picture(data, self.mode, self.max_pixels)
        return {"image": (self.transform if train else self.val_transform)(picture, position)}

    def blank(self) -> dict[str, Tensor]:
        return {"image": torch.zeros(self.shape, dtype=torch.uint8)}

    def finish(self, batch: Batch, train: bool) -> Batch:
        return batch | {"image": batch["image"].float() / 127.5 - 1}


class Latents(Format):
    """Posterior mean and standard deviation of an autoencoder, as `src/encode.py` writes them (bf16 safetensors).

    A new sample z = mean + std·ε is drawn at each place of the training stream (in validation: per sample, the
    same each time), then normalised as the set's manifest says: (z − mean) / std. A set encoded with `posterior=mean`
    stores no standard deviations, so z is the mean.

    Args:
        image_size: [height, width] of the latent.
        channels: C.
        flip: use the latent of the mirrored image at half of the places.
        seed: of ε and the flips.
        normalise: as the set's manifest says; false leaves latents as they are.
    """

    kind = "latents"
    members: ClassVar = {"data": ("safetensors",), "flipped": ("flipped.safetensors",), **TEXT}

    def __init__(
        self, image_size: list[int], channels: PositiveInt, flip: bool = True, seed: Seed = 0, normalise: bool = True
    ) -> None:
        self.shape, self.flip, self.seed, self.normalise = (channels, *image_size), flip, seed, normalise

    def bind(self, parts: set[str], manifest: Manifest | None) -> None:
        super().bind(parts, manifest)
        if self.flip and "flipped" not in parts:
            raise UserError("data.format.flip = True: the set was encoded without mirrored images; use false")

    def space_of(self, manifest: Manifest | None) -> LatentSpace:
        shape = (manifest or {}).get("shape", list(self.shape))
        if self.normalise and manifest is not None and "channel_mean" in manifest and shape != list(self.shape):
            raise UserError(
                f"data.channels, data.image_size = {self.shape[0]}, {list(self.shape[1:])}: the set's latents have the"
                f" shape {shape}"
            )
        return LatentSpace.of_manifest(manifest, self.shape[0], self.normalise)

    def choose(self, positions: Sequence[int], train: bool) -> list[str]:
        if not (train and self.flip):
            return super().choose(positions, train)
        draws = uniform(self.seed, Stream.AUGMENT, torch.tensor(positions))[:, 0]
        return ["flipped" if flipped else "data" for flipped in (draws < 0.5).tolist()]

    def decode(self, data: bytes, position: int, train: bool) -> dict[str, Tensor]:
        tensors = safetensors.torch.load(data)
        mean = tensors["mean"]
        std = tensors.get("std", torch.zeros_like(mean))
        for tensor in (mean, std):
            if tensor.shape != self.shape or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise ValueError(f"latent is {tensor.dtype}, {tuple(tensor.shape)}; must be float, {self.shape}")
        mean, std = mean.bfloat16(), std.bfloat16()
        if not math.isfinite(float(mean.sum()) + float(std.sum())):  # a tenth of the time that `isfinite` takes
            raise ValueError("latent contains values that are not finite")
        return {"mean": mean, "std": std}

    def blank(self) -> dict[str, Tensor]:
        return {name: torch.zeros(self.shape, dtype=torch.bfloat16) for name in ("mean", "std")}

    def finish(self, batch: Batch, train: bool) -> Batch:
        mean, std = batch["mean"].float(), batch["std"].float()
        key = (Stream.LATENT, batch["position"]) if train else (Stream.VAL_LATENT, batch["index"])
        z = mean + std * normal(self.seed, *key, self.shape)
        if self.space is not None:
            z = self.space.normalise(z)
        rest = {name: value for name, value in batch.items() if name not in ("mean", "std")}
        return rest | {"image": z}
