"""How a network's latents become images again: by which autoencoder, and from which normalisation.

A set's manifest records it, each checkpoint carries it on (`Saved.manifest`), a converted file too.

Shapes: B batch, C channels of the latents.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mvsplit.data.autoencoders import Autoencoder
from mvsplit.utils.errors import UserError

HUGE = 1e30
"""Means must be below it and standard deviations above its inverse: float32 can divide by them."""
PLACES = ("path", "subfolder", "revision")
"""Where an autoencoder's weights were: they may have been moved."""


MAX_IDENTITY = 10_000
"""Largest credible identity of an autoencoder, in characters."""


@dataclass(frozen=True)
class LatentSpace:
    """What a network of latents was trained on.

    Args:
        encoder: identity of the autoencoder that made the set; None for a set without a manifest.
        mean: of each channel, subtracted from the latents; None if they are used as they are.
        std: of each channel, which they are divided by.
        own: they are normalised by the autoencoder's own statistics, which are not recorded: `completed` reads them.
            Of the autoencoder, only what is recorded is compared.
    """

    encoder: dict[str, Any] | None
    mean: list[float] | None = None
    std: list[float] | None = None
    own: bool = False

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any] | None, channels: int, normalise: bool) -> "LatentSpace":
        """That of a set, checked.

        Args:
            manifest: of the set, if it has one; it may come from anywhere.
            channels: C.
            normalise: as the manifest says; false leaves latents as they are.

        Raises:
            UserError: if the manifest has no valid statistics.
        """
        encoder = _identity((manifest or {}).get("encoder"))
        if not normalise:
            return cls(encoder)
        if manifest is None or "channel_mean" not in manifest:
            raise UserError("data.format.normalise = True: the set has no manifest with channel statistics; use false")
        chosen = manifest.get("normalisation")
        if chosen is None:  # written before there was a choice
            chosen = {"mean": manifest["channel_mean"], "std": manifest.get("channel_std")}
        mean, std = (chosen.get(key) for key in ("mean", "std")) if isinstance(chosen, dict) else (None, None)
        return cls(encoder, *_checked(mean, std, channels))

    @classmethod
    def parse(cls, content: Any, channels: int) -> "LatentSpace":
        """From what `asdict` makes of it, checked.

        Raises:
            UserError: if it is not valid.
        """
        content = content if isinstance(content, dict) else {}
        encoder, mean, std = (content.get(key) for key in ("encoder", "mean", "std"))
        if content.get("own") is True:
            if mean is not None or std is not None or not isinstance(encoder, dict):
                raise UserError("latents: own = True: must have an encoder, and neither mean nor std")
            return cls(_identity(encoder), own=True)
        if "mean" in content and mean is None and std is None:
            return cls(_identity(encoder))
        return cls(_identity(encoder), *_checked(mean, std, channels))

    def plain(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {key: value for key, value in asdict(self).items() if key != "own" or value}

    def normalise(self, z: Tensor) -> Tensor:
        """An autoencoder's latents (B, C, height, width) → what the network sees."""
        assert not self.own, "use the completed space"
        if self.mean is None or self.std is None:
            return z
        mean, std = (z.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (z - mean) / std

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        assert not self.own, "use the completed space"
        if self.mean is None or self.std is None:
            return x
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return x * std + mean

    def check(self, autoencoder: Autoencoder) -> None:
        """Refuse to decode with another autoencoder than the one that made the latents.

        Raises:
            UserError: naming what differs.
        """
        mine, theirs = autoencoder.identity(), self.encoder
        if theirs is None:
            raise UserError("autoencoder: the latents' set has no manifest that names its autoencoder; use null")
        keys = theirs.keys() if self.own else mine.keys() | theirs.keys()
        for key in sorted(keys - set(PLACES), key=lambda key: (key != "name", key)):
            if mine.get(key) != theirs.get(key):
                origin = f", from {theirs['path']}" if "path" in theirs else ""
                raise UserError(
                    f"autoencoder: not the one that encoded the latents: {key} = {mine.get(key)}, but theirs is"
                    f" {str(theirs.get(key))[:100]}{str(origin)[:100]}"
                )

    def completed(self, autoencoder: Autoencoder) -> "LatentSpace":
        """With the autoencoder's own statistics, if they normalise the latents.

        Raises:
            UserError: if it has none.
        """
        if not self.own:
            return self
        own = autoencoder.normalisation()
        if own is None:
            raise UserError("autoencoder: the latents are normalised by its own statistics, but it has none")
        return replace(self, mean=own[0], std=own[1], own=False)


def _checked(mean: Any, std: Any, channels: int) -> tuple[list[float], list[float]]:
    """Channel statistics from elsewhere, if they can normalise.

    Raises:
        UserError: if they cannot.
    """
    for values in (mean, std):
        numbers = isinstance(values, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < HUGE for x in values
        )
        if not numbers or len(values) != channels:
            raise UserError("data.folder: the channel statistics in the set's manifest are not valid numbers")
    if min(std) < 1 / HUGE:
        raise UserError("data.folder: a standard deviation in the set's manifest is not positive")
    return mean, std


def _identity(encoder: Any) -> dict[str, Any] | None:
    """An autoencoder's identity from elsewhere; None if it is not one. Every checkpoint will contain it."""
    if not isinstance(encoder, dict):
        return None
    if len(json.dumps(encoder)) > MAX_IDENTITY:
        raise UserError("data.folder: the identity of the autoencoder in the set's manifest is not credible")
    return encoder


class LatentDecoder:
    """Turns latents as a network sees them into images.

    Args:
        space: of the network's latents.
        autoencoder: that made them, checked by its identity.

    Raises:
        UserError: if it is another one.
    """

    def __init__(self, space: LatentSpace, autoencoder: Autoencoder) -> None:
        space.check(autoencoder)
        self.space, self.autoencoder = space.completed(autoencoder), autoencoder
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "LatentDecoder":
        """Move the autoencoder."""
        self.autoencoder.to(device)
        self.device = device
        return self

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(channels, height, width) of the images of such latents (C, h, w), found by decoding one."""
        return tuple(self(torch.zeros(1, *latent_shape)).shape[1:])

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → images (B, 1 or 3, height, width), in [−1, 1] or slightly beyond."""
        return self.autoencoder.decode(self.space.restore(latents.to(self.device, torch.float32)))
