"""A checkpoint on disk: a folder, whole or invisible, written by any number of processes and read by any number.

    step-00000100.ckpt/
      weights-00000.safetensors …    slices of the weights (float32, even if the network runs in bfloat16)
      optimizer-00000.safetensors …  slices of the optimiser's state, `<parameter>/exp_avg` and the like
      ema-00000.safetensors …        slices of the averaged weights
      state.pt                       counters, schedules, callbacks: plain containers
      manifest.json                  step, processes, data state, and the size and sha256 of every file above
      COMPLETE                       the manifest's sha256

A slice is part of a flattened tensor and records where it begins, so the files depend neither on the number of
processes nor on the strategy that wrote them. The folder is written under another name, synced, and renamed at the very
end (`checkpoint_writer.py`). Only state.pt is ever unpickled, and only into tensors and plain containers
(`state_file.py`).
"""

import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from mvsplit.training.state_file import read_state
from mvsplit.training.tensor_files import SafetensorsFile
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import MAX_REASON, parse_json, read_small

MANIFEST, COMPLETE, STATE, PARTIAL = "manifest.json", "COMPLETE", "state.pt", ".partial"
CHECKPOINT_FILE = re.compile(rf"{MANIFEST}|{COMPLETE}|{STATE}|\w+-\d{{5}}\.safetensors")
"""Names of a checkpoint's files."""
VERSION = 1


class Slice(NamedTuple):
    """Values (n,) of a tensor of this shape, beginning at this index of the flattened tensor."""

    start: int
    shape: tuple[int, ...]
    values: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> "Slice":
        return cls(0, tuple(tensor.shape), tensor.detach().reshape(-1))


Slices = Mapping[str, Slice]


def copied(slices: Slices) -> Slices:
    """Copies in host memory, which training does not change."""
    return {name: part._replace(values=part.values.to("cpu", copy=True)) for name, part in slices.items()}


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, or −1 if there is none."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def is_checkpoint_in(path: Path, inside: Path) -> bool:
    """Whether this is a checkpoint directly in that folder, after following links."""
    try:
        real = path.resolve()
        return real.parent == inside.resolve() and not path.is_symlink() and (real / MANIFEST).is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def remove(path: Path, inside: Path) -> None:
    """Remove a checkpoint that is directly in the folder `inside`; leave anything else, whatever a state claims.

    If this is killed halfway, the remainder has the name of an unfinished checkpoint, which the next save removes.
    """
    if is_checkpoint_in(path, inside):
        real = path.resolve()
        left = real.with_name(f"{real.stem}.removed{real.suffix}{PARTIAL}")
        real.rename(left)
        shutil.rmtree(left)


def remove_unfinished(inside: Path, suffix: str) -> None:
    """Remove what killed processes left in a folder: unfinished checkpoints, which hold no other files."""
    for left in inside.glob(f"*{suffix}{PARTIAL}"):
        is_folder = left.is_dir() and not left.is_symlink()
        if is_folder and all(CHECKPOINT_FILE.fullmatch(file.name) for file in left.iterdir()):
            shutil.rmtree(left)


class Saved:
    """A checkpoint to read from.

    Attributes:
        path: of the folder, links resolved.
        step: optimiser steps done.
        manifest: see above.
        files: name → `size` and `sha256`, of the manifest.

    Raises:
        UserError: if it is missing, not whole, or not a checkpoint of this project.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if not self.path.exists():
            raise UserError(f"ckpt_path = {path}: no such file or folder")
        if not self.path.is_dir():
            raise UserError(f"ckpt_path = {path}: not a checkpoint of this project, since it is not a folder")
        if not (self.path / COMPLETE).is_file():
            raise UserError(f"ckpt_path = {path}: not a checkpoint of this project, or an incomplete one")
        try:
            content, mark = read_small(self.path / MANIFEST), read_small(self.path / COMPLETE)
            if hashlib.sha256(content).hexdigest().encode() != mark.strip():
                raise UserError(f"ckpt_path = {path}: damaged, {MANIFEST} fails its checksum")
            self.manifest: dict[str, Any] = parse_json(content, MANIFEST)
            if self.manifest["version"] > VERSION:
                raise UserError(f"ckpt_path = {path}: written by a newer version of this project")
            self.step = int(self.manifest["step"])
            self.files: dict[str, dict[str, Any]] = self.manifest["files"]
            sizes = {name: (int(about["size"]), str(about["sha256"])) for name, about in self.files.items()}
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"ckpt_path = {path}: damaged, {MANIFEST} cannot be read ({error})") from None
        for name, (size, _) in sizes.items():
            file = self.path / name
            if Path(name).name != name or not file.is_file() or file.stat().st_size != size:
                raise UserError(f"ckpt_path = {path}: damaged, {name} and the manifest differ in size")

    def verify(self, *kinds: str) -> "Saved":
        """Compare the checksums of the files of these kinds, or of all files.

        Raises:
            UserError: naming the first file that has changed.
        """
        names = [name for name in self.files if not kinds or name == STATE or name.rpartition("-")[0] in kinds]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases Python's lock
            for name, found in zip(names, pool.map(self._hash, names), strict=True):
                if found != self.files[name]["sha256"]:
                    raise UserError(f"ckpt_path = {self.path}: damaged, {name} fails its checksum")
        return self

    def _hash(self, name: str) -> str:
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def state(self) -> dict[str, Any]:
        """Counters, schedules, callbacks.

        Raises:
            UserError: if state.pt holds anything but tensors and plain containers.
        """
        try:
            state = read_state(self.path / STATE)
        except ValueError as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"ckpt_path = {self.path}: {STATE} is damaged or unsafe ({reason})") from None
        if not isinstance(state, dict) or state.get("global_step") != self.step:
            raise UserError(f"ckpt_path = {self.path}: {STATE} does not belong to step {self.step}")
        return state

    @property
    def kinds(self) -> set[str]:
        return {name.rpartition("-")[0] for name in self.files if name.endswith(".safetensors")}

    def tensors(self, kind: str) -> "Tensors":
        """The tensors of a kind; empty if the checkpoint has none."""
        names = sorted(name for name in self.files if name.rpartition("-")[0] == kind)
        return Tensors([self.path / name for name in names])


class Tensors:
    """Tensors assembled from the slices in some files, read on demand.

    Attributes:
        shapes: of the whole tensors, by name.
        dtypes: of the tensors, by name.

    Raises:
        UserError: if a file holds anything else, or a slice is missing.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, list[tuple[int, int, Any]]] = {}  # name → (start, stop, (file, offset)) of each slice
        for path in files:
            self._open(path)
        for name, parts in self._places.items():
            parts.sort(key=lambda part: part[:2])
            ends = [0, *(stop for _, stop, _ in parts)]
            if [start for start, _, _ in parts] != ends[:-1] or ends[-1] != math.prod(self.shapes[name]):
                raise UserError(f"ckpt_path: the slices of '{name}' do not cover the whole tensor")

    def _open(self, path: Path) -> None:
        try:
            file = SafetensorsFile(path)
            slices = parse_json(file.metadata["slices"], str(path))
            for name, part in file.tensors.items():
                start, *shape = (int(number) for number in slices[name])
                (length,) = part.shape
                if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                    raise ValueError(f"'{name}' has two shapes")
                if self.dtypes.setdefault(name, part.dtype) != part.dtype:
                    raise ValueError(f"'{name}' has two types")
                self._places.setdefault(name, []).append((start, start + length, (file, part.offset)))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged, or not a file of slices ({str(error)[:MAX_REASON]})") from None

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Entries [start, stop) of the flattened tensor: (stop − start,), converted to a type if one is given."""
        stored = self.dtypes[name]
        out = torch.empty(stop - start, dtype=dtype or stored)
        for first, last, (file, offset) in self._places[name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                file.fill(out[low - start : high - start], offset + (low - first) * stored.itemsize, stored)
        return out

    def whole(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = torch.Size(self.shapes[name])
        return self.read(name, 0, shape.numel(), dtype).reshape(shape)


class LocalTensors(Tensors):
    """Copies in host memory of this process's slices; only entries within them can be read."""

    def __init__(self, slices: Slices) -> None:
        self._local = copied(slices)
        self.shapes = {name: part.shape for name, part in self._local.items()}
        self.dtypes = {name: part.values.dtype for name, part in self._local.items()}

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        part = self._local[name]
        values = part.values[start - part.start : stop - part.start]
        return values if dtype is None else values.to(dtype)


def newest(folder: Path, verify: bool) -> Path | None:
    """The newest whole checkpoint in a run's `checkpoints`; damaged ones are reported and skipped.

    Args:
        folder: a run's `checkpoints`.
        verify: compare checksums too.

    Raises:
        UserError: if there are some, but none is whole.
    """
    found = []
    for path in folder.glob("*.ckpt"):
        if path.is_dir() and not path.is_symlink():
            found.append((step_of(path), path.stat().st_mtime, path))
    for _, _, path in sorted(found, reverse=True):
        try:
            saved = Saved(path)
            return saved.verify().path if verify else saved.path
        except UserError as error:
            if verify:
                print(f"skipped: {str(error).removeprefix('ckpt_path = ')}", file=sys.stderr)
    if found:
        raise UserError(f"ckpt_path = last: none of the {len(found)} checkpoints in {folder} is intact")
    return None
