"""From images to latents and back; selected by `autoencoder`.

Shapes: B batch; images (B, channels, height, width) in [−1, 1]; latents (B, C, height / f, width / f).
"""

import hashlib
import math
import os
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.utils.config import Seed
from mvsplit.utils.errors import UserError

MAPS = 6
"""Feature maps of the decoder's last blocks that exist at the same time, with the convolutions' work space."""


class Autoencoder(nn.Module):
    """Latents are stored unscaled; the manifest of their set says what normalises them (`data/latent_space.py`)."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, of the same shape."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images, not clamped to [−1, 1]."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Everything that the latents depend on, as plain values, for the manifest."""
        raise NotImplementedError

    def normalisation(self) -> tuple[list[float], list[float]] | None:
        """The mean and standard deviation that its authors normalise each channel by; None if there are none."""
        return None


class Identity(Autoencoder):
    """Latents are the pixels themselves, with standard deviation 0."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros_like(images)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def identity(self) -> dict[str, Any]:
        return {"name": "Identity"}


class Tiny(Autoencoder):
    """An orthogonal linear map of 2 × 2 patches, with random standard deviations: for quick tests of a pipeline.

    Args:
        channels: of the images; latents have 4·channels.
        seed: of the map.
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
        path: a folder, or a repository of huggingface.co.
        model: its class in diffusers.
        subfolder: of the folder or repository.
        revision: of the repository.
        dtype: of the computation.
        memory_gib: for decoding: images are decoded in batches that fit, and in tiles if a single one does not.

    Raises:
        UserError: if diffusers is not installed or the weights cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        model: Literal["AutoencoderKL", "AutoencoderKLFlux2"] = "AutoencoderKL",
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        memory_gib: PositiveFloat = 4.0,
    ) -> None:
        super().__init__()
        try:
            import diffusers
        except ImportError:
            raise UserError("autoencoder: diffusers models need another package: pip install -e '.[latents]'") from None
        if not hasattr(diffusers, model):
            raise UserError(f"autoencoder.model = {model}: diffusers {diffusers.__version__} is too old for it")
        try:
            self.vae: Any = getattr(diffusers, model).from_pretrained(
                path,
                subfolder=subfolder,
                revision=revision,
                use_safetensors=True,
                torch_dtype=getattr(torch, dtype),
                low_cpu_mem_usage=False,  # it would need another package
            )
        except (OSError, ValueError) as error:
            name = os.path.join(path, subfolder or "")
            raise UserError(f"autoencoder.path = {name}: {' '.join(str(error).split())[:300]}") from None
        self.vae.requires_grad_(False).eval()
        self.settings = {"model": model, "path": path, "subfolder": subfolder, "revision": revision, "dtype": dtype}
        self.memory = memory_gib * 2**30
        self.fold = int(self.vae.config.patch_size[0]) if model == "AutoencoderKLFlux2" else 1

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        needed = self.vae.config.in_channels
        if images.shape[1] != needed:
            raise UserError(f"data.channels = {images.shape[1]}: must be {needed} for {self.settings['path']}")
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        if any(side % self.fold for side in posterior.mean.shape[-2:]):
            raise UserError(
                f"data.image_size = {list(images.shape[-2:])}: gives latents of {list(posterior.mean.shape[-2:])},"
                f" which must be divisible by {self.fold}"
            )
        mean, std = (F.pixel_unshuffle(part.float(), self.fold) for part in (posterior.mean, posterior.std))
        return mean, std

    def decode(self, latents: Tensor) -> Tensor:
        latents = F.pixel_shuffle(latents, self.fold).to(self.vae.dtype)
        count = int(self.memory // self.bytes_per_image(latents))
        if not count:
            self.vae.enable_tiling()
        return torch.cat([self.vae.decode(part).sample.float() for part in latents.split(max(1, count))])

    def bytes_per_image(self, latents: Tensor) -> float:
        """About what decoding one of these latents (B, C, h, w) holds at a time: a few maps of the last block."""
        channels = self.vae.config.block_out_channels
        pixels = math.prod(latents.shape[-2:]) * 4.0 ** (len(channels) - 1)
        return MAPS * pixels * max(channels[:2]) * latents.element_size()

    def normalisation(self) -> tuple[list[float], list[float]]:
        """`bn` of FLUX.2; `shift_factor` and 1 / `scaling_factor` of Stable Diffusion and FLUX.1."""
        if hasattr(self.vae, "bn"):
            mean, variance = self.vae.bn.running_mean.double(), self.vae.bn.running_var.double()
            return mean.tolist(), (variance + self.vae.config.batch_norm_eps).sqrt().tolist()
        count, config = self.vae.config.latent_channels, self.vae.config
        return [config.shift_factor or 0.0] * count, [1 / config.scaling_factor] * count

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()  # of all weights: a path names their origin, not their values
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {"name": "Diffusers", **self.settings, "weights": digest.hexdigest()[:16]}
