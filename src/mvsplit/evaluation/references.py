"""What samples are compared with: real images, or published statistics of them.

Shapes: N images, D pooled features, S spatial features.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mvsplit.evaluation.distances import Gaussian, Moments
from mvsplit.evaluation.feature_networks import FeatureNetwork
from mvsplit.evaluation.image_files import NpzImages, open_images
from mvsplit.evaluation.npz_files import members
from mvsplit.evaluation.weight_files import file_sha256, weights_sha256
from mvsplit.utils.console import info, progress
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file

MAX_FEATURES = 50_000
"""Images whose pooled features are kept: 400 MB with Inception."""


class ImageSource(Protocol):
    """A set of images, as `ImageFiles` is one."""

    shape: tuple[int, int, int]

    @property
    def fingerprint(self) -> str:
        """What identifies its content."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images, uint8 (B, C, height, width)."""


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images, in one network's features.

    Attributes:
        pooled: mean and covariance of D features, for FID.
        spatial: of S features, for sFID; None if there are none.
        features: (n, D) float32 of evenly spaced images, for KID, precision and recall; None without images.
        shape: (C, height, width) of the images; None if they are not known.
        fingerprint: of the file or the set.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    shape: tuple[int, int, int] | None
    fingerprint: str

    @classmethod
    def load(
        cls, path: str, network: FeatureNetwork, batch_size: int = 64, max_features: int = MAX_FEATURES
    ) -> "Reference":
        """From a folder of images or a .npz file; features are stored beside it for the next time.

        A file's `mu`, `sigma`, `mu_s` and `sigma_s`, as ADM's have them, are used instead of its images' own: they are
        of the whole set, of which `arr_0` is a part.

        Args:
            path: of the folder or the file.
            network: whose features are compared.
            batch_size: images at a time.
            max_features: images whose pooled features are kept.

        Raises:
            UserError: if it cannot be read, or its statistics are of another network.
        """
        found = members(Path(path), ["arr_0", "mu"]) if path.endswith(".npz") and Path(path).is_file() else {}
        if "mu" not in found:
            images = open_images(path)
            return cls.of(images, network, batch_size, max_features, Path(path))
        pooled, spatial = read_statistics(Path(path), network)
        if "arr_0" not in found:
            return cls(pooled, spatial, None, None, file_sha256(Path(path)))
        own = cls.of(NpzImages(Path(path)), network, batch_size, max_features, Path(path))
        return cls(pooled, spatial, own.features, own.shape, own.fingerprint)

    @classmethod
    def of(
        cls,
        images: ImageSource,
        network: FeatureNetwork,
        batch_size: int = 64,
        max_features: int = MAX_FEATURES,
        beside: Path | None = None,
    ) -> "Reference":
        """Of a set of images.

        Args:
            images: at least two.
            network: whose features are compared.
            batch_size: images at a time.
            max_features: images whose pooled features are kept.
            beside: the features are stored in a file beside this path, and read from it if they are of the same images
                and the same network; None stores none.

        Raises:
            UserError: if the images are too few or cannot be read.
        """
        if len(images) < 2:
            raise UserError(f"reference: {len(images)} image; at least 2 are needed")
        key = {
            "network": json.dumps(network.identity(), sort_keys=True),
            "fingerprint": images.fingerprint,
            "max_features": str(max_features),
            "version": "1",
        }
        cache = None
        if beside is not None:
            name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
            cache = beside.with_name(f"{beside.name}.{name}.safetensors")
        stored = read_cache(cache, key, network, max_features) if cache is not None else None
        if stored is None:
            stored = _measured(images, network, batch_size, max_features)
            if cache is not None:
                write_cache(cache, key, stored)
        pooled = Gaussian(stored["pooled_mean"], stored["pooled_covariance"])
        spatial = Gaussian(stored["spatial_mean"], stored["spatial_covariance"]) if "spatial_mean" in stored else None
        return cls(pooled, spatial, stored["features"], images.shape, images.fingerprint)


def _measured(images: ImageSource, network: FeatureNetwork, batch_size: int, max_features: int) -> dict[str, Tensor]:
    """Run the network on all images."""
    pooled, spatial = Moments(), Moments()
    kept: list[Tensor] = []
    total, done = len(images), 0
    few = min(total, max_features)
    with progress("reference", total) as advance:
        for batch in images.batches(batch_size):
            found = network(batch.to(network.device))
            pooled.update(found.pooled)
            if found.spatial is not None:
                spatial.update(found.spatial)
            # Evenly spaced, not the first ones: files may be sorted by class.
            places = torch.arange(done, done + len(batch))
            chosen = (places + 1) * few // total > places * few // total
            kept.append(found.pooled.cpu()[chosen])
            done += len(batch)
            advance(len(batch))
    stored = {"pooled_mean": pooled.gaussian().mean, "pooled_covariance": pooled.gaussian().covariance}
    if spatial.count:
        stored |= {"spatial_mean": spatial.gaussian().mean, "spatial_covariance": spatial.gaussian().covariance}
    return stored | {"features": torch.cat(kept)}


def read_statistics(path: Path, network: FeatureNetwork) -> tuple[Gaussian, Gaussian | None]:
    """`mu` and `sigma` of a .npz file, and `mu_s` and `sigma_s` if it has them and the network spatial features.

    Raises:
        UserError: if they are not those of so many features.
    """
    arrays = members(path, ["mu", "sigma", "mu_s", "sigma_s"])

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in arrays:
            raise UserError(f"{path}: has no array '{name}'")
        array = arrays[name]
        if array.shape != shape:
            raise UserError(
                f"{path}: '{name}' has the shape {list(array.shape)}, must be {list(shape)} for the features of"
                f" {type(network).__name__}"
            )
        if array.dtype.kind != "f" or not np.isfinite(values := array.whole()).all():
            raise UserError(f"{path}: '{name}' must be finite numbers")
        return torch.from_numpy(values.astype(np.float64))

    def gaussian(suffix: str, size: int) -> Gaussian:
        return Gaussian(read(f"mu{suffix}", (size,)), read(f"sigma{suffix}", (size, size)))

    pooled = gaussian("", network.num_features)
    return pooled, gaussian("_s", network.num_spatial) if "mu_s" in arrays and network.num_spatial else None


def write_cache(path: Path, key: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Store features; without them the next evaluation only takes longer."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(path) as file:
            file.write(save(tensors, key | {"tensors": weights_sha256(tensors)}))
    except OSError as error:
        info(f"reference: its features are not stored for the next time ({error.strerror}: {error.filename})")


def read_cache(path: Path, key: dict[str, str], network: FeatureNetwork, max_features: int) -> dict[str, Tensor] | None:
    """Stored features; None if there are none of these images and this network, or they are damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if about | key != about or not _expected(shapes, network, max_features):
                return None
            tensors = {name: file.get_tensor(name) for name in shapes}
    except Exception as error:  # in many ways: it may be damaged
        info(f"reference: {path} is damaged and written again ({' '.join(str(error).split())[:100]})")
        return None
    if about.get("tensors") != weights_sha256(tensors):
        info(f"reference: {path} is damaged and written again (its checksum fails)")
        return None
    return tensors


def _expected(shapes: dict[str, tuple[int, ...]], network: FeatureNetwork, max_features: int) -> bool:
    """Whether these are what `write_cache` writes, before they are read into memory."""
    d, s, kept = network.num_features, network.num_spatial, shapes.get("features", (0, 0))[0]
    needed = {"pooled_mean": (d,), "pooled_covariance": (d, d), "features": (kept, d)}
    if s:
        needed |= {"spatial_mean": (s,), "spatial_covariance": (s, s)}
    return shapes == needed and kept <= max_features
