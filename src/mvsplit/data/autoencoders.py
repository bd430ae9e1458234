"""From pictures to latents and back, for `src/encode.py`; chosen by `autoencoder`.

Shapes: B batch; pictures (B, channels, height, width) in [−1, 1]; latents (B, C, height / f, width / f).
"""

import hashlib
import os
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Seed


class Autoencoder(nn.Module):
    """What `src/encode.py` asks of an autoencoder. Latents are as it gives them: the set's statistics scale them."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, of one shape."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, not clamped to [−1, 1]."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What the latents depend on, for the manifest; plain values."""
        raise NotImplementedError


class Identity(Autoencoder):
    """Latents are the pixels themselves, without any spread."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros_like(images)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def identity(self) -> dict[str, Any]:
        return {"name": "Identity"}


class Tiny(Autoencoder):
    """An orthogonal linear map of 2 × 2 patches, with a spread of its own: tests a pipeline in no time.

    Args:
        channels: of the pictures; latents have 4·channels. seed: of the map.
    """

    def __init__(self, channels: PositiveInt = 3, seed: Seed = 0) -> None:
        super().__init__()
        self.settings = {"channels": channels, "seed": seed}
        size = 4 * channels
        draws = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("rotation", torch.linalg.qr(draws[0])[0].float()[..., None, None])
        self.register_buffer("spread", draws[1].float()[..., None, None] / size)
        self.rotation: Tensor
        self.spread: Tensor

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.pixel_unshuffle(images, 2)
        return F.conv2d(patches, self.rotation), F.softplus(F.conv2d(patches, self.spread) - 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv_transpose2d(latents, self.rotation), 2)

    def identity(self) -> dict[str, Any]:
        return {"name": "Tiny", **self.settings}


class Diffusers(Autoencoder):
    """A variational autoencoder of `diffusers` (extra `latents`): safetensors only, nothing is ever unpickled.

    FLUX.2's latents are folded 2 × 2 into channels, as its pipeline does (32 × 32 × 32 → 128 × 16 × 16 for 256 pixels).

    Args:
        path: a folder, or a repository of huggingface.co. subfolder, revision: within it.
        model: its class in diffusers.
        dtype: in which it computes.

    Raises:
        UserError: if diffusers is not installed or the weights cannot be had.
    """

    def __init__(
        self,
        path: str,
        model: Literal["AutoencoderKL", "AutoencoderKLFlux2"] = "AutoencoderKL",
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        try:
            import diffusers
        except ImportError:
            raise UserError(
                "autoencoder: diffusers' models need another package: pip install 'mvsplit[latents]'"
            ) from None
        if not hasattr(diffusers, model):
            raise UserError(f"autoencoder.model = {model}: diffusers {diffusers.__version__} is too old for it")
        try:
            self.vae: Any = getattr(diffusers, model).from_pretrained(
                path,
                subfolder=subfolder,
                revision=revision,
                use_safetensors=True,
                torch_dtype=getattr(torch, dtype),
                low_cpu_mem_usage=False,  # it would ask for another package
            )
        except (OSError, ValueError) as error:
            name = os.path.join(path, subfolder or "")
            raise UserError(f"autoencoder.path = {name}: {' '.join(str(error).split())[:300]}") from None
        self.vae.requires_grad_(False).eval()
        self.settings = {"model": model, "path": path, "subfolder": subfolder, "revision": revision, "dtype": dtype}
        self.fold = int(self.vae.config.patch_size[0]) if model == "AutoencoderKLFlux2" else 1

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        needed = self.vae.config.in_channels
        if images.shape[1] != needed:
            raise UserError(f"data.channels = {images.shape[1]}: {self.settings['path']} encodes {needed}")
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        if any(side % self.fold for side in posterior.mean.shape[-2:]):
            raise UserError(
                f"data.image_size = {list(images.shape[-2:])}: gives latents of {list(posterior.mean.shape[-2:])},"
                f" which must be divisible by {self.fold}"
            )
        mean, std = (F.pixel_unshuffle(part.float(), self.fold) for part in (posterior.mean, posterior.std))
        return mean, std

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(F.pixel_shuffle(latents, self.fold).to(self.vae.dtype)).sample.float()

    def identity(self) -> dict[str, Any]:
        return {"name": "Diffusers", **self.settings, "weights": _digest(self.vae.state_dict())}


def _digest(weights: dict[str, Tensor]) -> str:
    """Hash of all weights: a path tells where they came from, not what they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
