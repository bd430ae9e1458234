"""Weights of published networks: files of tensors, checked before they are used. Nothing is ever unpickled."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from torch import Tensor

from mvsplit.data.faults import reason_of
from mvsplit.utils.errors import UserError

MAX_BYTES = 8 << 30
"""Largest file of weights, also when it is unpacked."""


def downloaded(url: str, hash_prefix: str | None = None) -> Path:
    """The local copy of a public file in PyTorch's cache (`TORCH_HOME`), downloaded if it is missing.

    Args:
        url: of the file.
        hash_prefix: start of its sha256, if known.

    Raises:
        UserError: if it cannot be downloaded.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
        except (OSError, URLError, RuntimeError) as error:
            raise UserError(
                f"features.weights = None: {url} cannot be downloaded ({reason_of(error)}); download it elsewhere"
                " and use features.weights=<its path>"
            ) from None
    return path


def file_sha256(path: Path) -> str:
    """Hash of a file's content.

    Raises:
        UserError: if it is not a regular file that can be read.
    """
    if not path.is_file():  # it could also be a device or a pipe
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def load_weights(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Tensors by name from safetensors or from PyTorch's format, and the file's sha256.

    Args:
        path: of the file.
        sha256: that it must have.

    Raises:
        UserError: if it cannot be read, has another hash or contains anything but tensors.
    """
    try:
        digest = file_sha256(path)
    except UserError as error:
        raise UserError(f"features.weights = {error}") from None
    if sha256 is not None and digest != sha256.lower():
        raise UserError(f"features.weights = {path}: its sha256 is {digest}, must be features.sha256 = {sha256}")
    try:
        _check_size(path)
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # in many ways: it may be any file
        raise UserError(f"features.weights = {path}: not a file of tensors ({reason_of(error)})") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in found.items()):
        raise UserError(
            f"features.weights = {path}: must contain tensors by name, as a state_dict does, and nothing else"
        )
    return dict(found), digest


def _check_size(path: Path) -> None:
    """Raise `ValueError` for a file that would fill the memory: a zip archive's members may be compressed."""
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(member.file_size for member in archive.infolist()))
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes; at most {MAX_BYTES} are allowed")


def check_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: Path, network: str) -> None:
    """Check that the weights are exactly those of a network, as dense floating-point tensors.

    Raises:
        UserError: naming the first that is missing, does not belong to it, or has another shape.
    """
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"features.weights = {path}: has no '{name}', which {network} needs")
        if name not in shapes:
            raise UserError(f"features.weights = {path}: contains '{name}', which {network} does not have")
        tensor = weights[name]
        if tensor.shape != shapes[name]:
            raise UserError(
                f"features.weights = {path}: '{name}' has the shape {list(tensor.shape)}, must be {list(shapes[name])}"
            )
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(f"features.weights = {path}: '{name}' must be a dense tensor of floating-point numbers")


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
