"""A checkpoint on disk: a folder, whole or invisible, written by any number of processes and read by any number.

    last-00000100.ckpt/
      weights-00000.safetensors …    slices of the weights (float32, also where the network runs in bfloat16)
      optimizer-00000.safetensors …  slices of the optimiser's state, `<parameter>/exp_avg` and the like
      ema-00000.safetensors …        slices of the averaged weights
      state.pt                       counters, schedules, callbacks: plain containers
      manifest.json                  step, processes, data state, and the size and sha256 of every file above
      COMPLETE                       the manifest's sha256

A slice is part of a flattened tensor and says where it begins, so nothing in the files depends on how many processes
or which strategy wrote them. The folder is written under another name, synced, and renamed at the very end. Nothing
in it is ever unpickled but state.pt, by PyTorch's loader of tensors and plain containers.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch import distributed as dist

from mvsplit.utils.errors import AgreedError, UserError

MANIFEST, COMPLETE, STATE, PARTIAL = "manifest.json", "COMPLETE", "state.pt", ".partial"
VERSION = 1
_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class Slice(NamedTuple):
    """Values (n,) of a tensor of this shape, from this place of the flattened tensor on."""

    start: int
    shape: tuple[int, ...]
    values: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> "Slice":
        return cls(0, tuple(tensor.shape), tensor.detach().reshape(-1))


Slices = Mapping[str, Slice]


# -------------------------------------------------------------------- writing


def write(path: Path, state: dict[str, Any], tensors: Mapping[str, Slices], together: bool) -> None:
    """Write a checkpoint; when this returns, it is whole and on disk.

    Args:
        state: plain containers; the one of the first process is kept. Its `global_step` is the checkpoint's step.
        tensors: kind → name → the slice that this process holds.
        together: all processes call this, each with its own slices; otherwise this one is alone.

    Raises:
        AgreedError: on all processes, if one could not write; what was there before is untouched.
    """
    rank = dist.get_rank() if together else 0
    partial = path.with_name(path.name + PARTIAL)

    def prepare() -> None:
        if rank == 0:
            for left in path.parent.glob(f"*{path.suffix}{PARTIAL}"):  # by a process that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)

    def write_files() -> dict[str, Any]:
        files = {
            f"{kind}-{rank:05d}.safetensors": _write_slices(partial / f"{kind}-{rank:05d}.safetensors", slices)
            for kind, slices in tensors.items()
        }
        if rank == 0:
            content = io.BytesIO()
            torch.save(state, content)
            with _Hashing(partial / STATE) as file:
                file.write(content.getvalue())
            files[STATE] = file.summary
        return files

    def finish() -> None:
        if rank == 0:
            about = {"version": VERSION, "step": state["global_step"], "processes": len(written)}
            about |= {"data": _data_state(state), "config_sha256": _config_hash(path)}
            files = {name: summary for each in written for name, summary in each.items()}
            with _Hashing(partial / MANIFEST) as file:
                file.write(json.dumps(about | {"files": files}, indent=1).encode())
            with _Hashing(partial / COMPLETE) as mark:
                mark.write(file.summary["sha256"].encode())
            _sync(partial)
            if path.exists():  # this step was saved before, by a run that went on from an earlier one
                remove(path)
            partial.rename(path)
            _sync(path.parent)

    def attempt(work: Callable[[], Any]) -> list[Any]:
        """What each process returned; if one failed, all raise."""
        try:
            result, error = work(), None
        except OSError as problem:
            result, error = None, f"{problem.filename or path}: {problem.strerror or problem}"
        results = [(result, error)]
        if together:
            results = [None] * dist.get_world_size()  # type: ignore[list-item]
            dist.all_gather_object(results, (result, error))
        errors = [f"{error} (rank {rank})" if together else error for rank, (_, error) in enumerate(results) if error]
        if errors:
            shutil.rmtree(partial, ignore_errors=True)
            raise AgreedError(f"the checkpoint could not be written: {errors[0]}; earlier ones are untouched")
        return [result for result, _ in results]

    attempt(prepare)
    written = attempt(write_files)
    attempt(finish)


class _Hashing:
    """A new file that hashes what is written and is on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary: dict[str, Any] = {"size": 0, "sha256": ""}
        self._hash = hashlib.sha256()

    def __enter__(self) -> "_Hashing":
        self._file: BinaryIO = self.path.open("xb")
        return self

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.summary["size"] += len(data)
        self._file.write(data)
        return len(data)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self.summary["sha256"] = self._hash.hexdigest()
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, str(self.path)) from None
        finally:
            self._file.close()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_slices(path: Path, slices: Slices) -> dict[str, Any]:
    slices = {name: part for name, part in slices.items() if part.values.numel()}
    places = {name: [part.start, *part.shape] for name, part in slices.items()}
    sizes = {name: (part.values.dtype, (part.values.numel(),)) for name, part in slices.items()}
    values = (part.values for part in slices.values())
    return write_safetensors(path, sizes, values, {"slices": json.dumps(places)})


def write_safetensors(
    path: Path,
    sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterable[Tensor],
    metadata: dict[str, str],
) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor: the library's own writer wants them all in memory at once.

    Args:
        sizes: type and shape of every tensor. values: the tensors, in that order.

    Returns:
        `size` in bytes and `sha256` of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with _Hashing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in values:
            data = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
    return file.summary


def _data_state(state: dict[str, Any]) -> Any:
    """What tells the place in the data, for whoever reads the manifest."""
    return next((value for key, value in state.items() if key.endswith("DataModule")), None)


def _config_hash(path: Path) -> str | None:
    config = path.parent.parent / "config.yaml"
    return hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None


def remove(path: Path) -> None:
    """Remove a checkpoint; killed halfway, what is left of it is no longer taken for one."""
    if path.is_dir() and not path.is_symlink():
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)


# -------------------------------------------------------------------- reading


class Saved:
    """A checkpoint to read from.

    Attributes:
        path: of the folder, links resolved. step: optimiser steps done. manifest: see above.

    Raises:
        UserError: if it is missing, not whole, or not a checkpoint of this project.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if not self.path.exists():
            raise UserError(f"ckpt_path = {path}: there is no such file or folder")
        if not self.path.is_dir():
            raise UserError(f"ckpt_path = {path}: not a checkpoint of this project, which is a folder")
        if not (self.path / COMPLETE).is_file():
            raise UserError(f"ckpt_path = {path}: not a checkpoint of this project, or one that is not complete")
        try:
            content = (self.path / MANIFEST).read_bytes()
            if hashlib.sha256(content).hexdigest() != (self.path / COMPLETE).read_text().strip():
                raise UserError(f"ckpt_path = {path}: damaged, {MANIFEST} fails its checksum")
            self.manifest: dict[str, Any] = json.loads(content)
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
                raise UserError(f"ckpt_path = {path}: damaged, {name} is not as long as it was written")

    def verify(self, *kinds: str) -> "Saved":
        """Compare the checksums of the files of these kinds, or of all.

        Raises:
            UserError: naming the first file that was changed.
        """
        names = [name for name in self.files if not kinds or name == STATE or name.rpartition("-")[0] in kinds]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python's lock to others
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
            state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"ckpt_path = {self.path}: {STATE} holds more than data or is damaged ({reason})") from None
        if not isinstance(state, dict) or state.get("global_step") != self.step:
            raise UserError(f"ckpt_path = {self.path}: {STATE} does not belong to step {self.step}")
        return state

    @property
    def kinds(self) -> set[str]:
        return {name.rpartition("-")[0] for name in self.files if name.endswith(".safetensors")}

    def tensors(self, kind: str) -> "Tensors":
        """The tensors of a kind, or none if there are none of it."""
        names = sorted(name for name in self.files if name.rpartition("-")[0] == kind)
        return Tensors([self.path / name for name in names])


class Tensors:
    """Tensors put together from the slices in some files; read when asked for.

    Attributes:
        shapes: of the whole tensors, by name. dtypes: the same for their types.

    Raises:
        UserError: if a file holds anything else, or a slice is missing.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, list[tuple[int, int, Any]]] = {}  # name → (start, stop, file) of each slice
        for path in files:
            self._open(path)
        for name, parts in self._places.items():
            parts.sort(key=lambda part: part[:2])
            ends = [0, *(stop for _, stop, _ in parts)]
            if [start for start, _, _ in parts] != ends[:-1] or ends[-1] != torch.Size(self.shapes[name]).numel():
                raise UserError(f"ckpt_path: the slices of '{name}' do not make up the whole tensor")

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(str(path), "pt")
            slices = json.loads(file.metadata()["slices"])
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                start, *shape = (int(number) for number in slices[name])
                part = file.get_slice(name)
                (length,) = part.get_shape()
                if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                    raise ValueError(f"'{name}' has two shapes")
                self.dtypes[name] = part[:0].dtype
                self._places.setdefault(name, []).append((start, start + length, file))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged, or not a file of slices ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start … stop of the flattened tensor: (stop − start,)."""
        out = torch.empty(stop - start, dtype=self.dtypes[name])
        for first, last, file in self._places[name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                out[low - start : high - start] = file.get_slice(name)[low - first : high - first]
        return out

    def whole(self, name: str) -> Tensor:
        shape = torch.Size(self.shapes[name])
        return self.read(name, 0, shape.numel()).reshape(shape)


class HeldTensors(Tensors):
    """Copies in host memory of slices that this process holds; only what lies in them can be read."""

    def __init__(self, slices: Slices) -> None:
        held = {name: part._replace(values=part.values.to("cpu", copy=True)) for name, part in slices.items()}
        self._held = held
        self.shapes = {name: part.shape for name, part in held.items()}
        self.dtypes = {name: part.values.dtype for name, part in held.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        part = self._held[name]
        return part.values[start - part.start : stop - part.start]


def newest(folder: Path, verify: bool) -> Path | None:
    """The checkpoint of the most steps in a run's `checkpoints` that is whole; others are told and passed over.

    Args:
        verify: compare checksums too.

    Raises:
        UserError: if there are some, but none is whole.
    """
    found = []
    for path in folder.glob("*.ckpt"):
        if path.is_dir() and not path.is_symlink():
            digits = path.stem.rpartition("-")[2]
            found.append((int(digits) if digits.isdigit() else -1, path.stat().st_mtime, path))
    for _, _, path in sorted(found, reverse=True):
        try:
            saved = Saved(path)
            return saved.verify().path if verify else saved.path
        except UserError as error:
            if verify:
                print(f"passed over: {str(error).removeprefix('ckpt_path = ')}", file=sys.stderr)
    if found:
        raise UserError(f"ckpt_path = last: none of the {len(found)} checkpoints in {folder} is whole")
    return None
