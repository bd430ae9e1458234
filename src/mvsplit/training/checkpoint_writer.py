"""Writes checkpoints (`checkpoint_format.py`): whole or invisible, agreed on by all processes that write together."""

import copy
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch import distributed as dist

from mvsplit.training.checkpoint_format import (
    COMPLETE,
    MANIFEST,
    PARTIAL,
    STATE,
    VERSION,
    Slices,
    remove,
    remove_unfinished,
)
from mvsplit.training.tensor_files import DTYPES
from mvsplit.utils.errors import AgreedError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriter:
    """One checkpoint to write. `run()` may be called later, in a thread: the state is serialised here and now.

    Args:
        path: where the checkpoint will be.
        state: plain containers; the first process's is kept. Its `global_step` is the checkpoint's step.
        tensors: kind → name → this process's slice. They must not change until `run()` returns.
        group: the processes that write together, each its own slices; None if this process writes alone.
        new_folder: create the parent folder. False for later saves: if it is missing, the run has been removed.
        finished: called on the first process when the checkpoint is in place.
    """

    def __init__(
        self,
        path: Path,
        state: dict[str, Any],
        tensors: Mapping[str, Slices],
        group: dist.ProcessGroup | None = None,
        new_folder: bool = True,
        finished: Callable[[], None] | None = None,
    ) -> None:
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        self.tensors, self.group, self.new_folder, self.finished = tensors, group, new_folder, finished
        self.rank = dist.get_rank(group) if group is not None else 0
        self.processes = dist.get_world_size(group) if group is not None else 1
        content = io.BytesIO()
        if self.rank == 0:
            torch.save(state, content)
        self.state = content.getvalue()
        self.about = {"version": VERSION, "step": state["global_step"], "processes": self.processes}
        config = path.parent.parent / "config.yaml"
        config_sha256 = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
        self.about |= {"data": _data_state(state), "config_sha256": config_sha256}

    def run(self) -> None:
        """Write the checkpoint; when this returns, it is whole and on disk.

        Raises:
            AgreedError: on all processes, if one could not write; earlier checkpoints are untouched.
        """
        self._attempt(self._prepare)
        written = self._attempt(self._write_files)
        self._attempt(lambda: self._finish({name: summary for files in written for name, summary in files.items()}))

    def _prepare(self) -> None:
        if self.rank == 0:
            remove_unfinished(self.path.parent, self.path.suffix)
            self.partial.mkdir(parents=self.new_folder)

    def _write_files(self) -> dict[str, Any]:
        files = {}
        for kind, slices in self.tensors.items():
            name = f"{kind}-{self.rank:05d}.safetensors"
            files[name] = _write_slices(self.partial / name, slices)
        if self.rank == 0:
            with HashedFile(self.partial / STATE) as file:
                file.write(self.state)
            files[STATE] = file.summary
        return files

    def _finish(self, files: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        with HashedFile(self.partial / MANIFEST) as file:
            file.write(json.dumps(self.about | {"files": files}, indent=1).encode())
        with HashedFile(self.partial / COMPLETE) as mark:
            mark.write(file.summary["sha256"].encode())
        _sync(self.partial)
        if self.path.exists():  # this step was saved before, by a run that resumed from an earlier one
            remove(self.path, self.path.parent)
        if os.path.lexists(self.path):  # not a checkpoint, or its manifest is missing
            self.path.rename(f"{self.path}.unreadable")
        self.partial.rename(self.path)
        _sync(self.path.parent)
        if self.finished is not None:
            self.finished()

    def _attempt(self, work: Callable[[], Any]) -> list[Any]:
        """What each process returned; if one failed, all raise."""
        try:
            result, error = work(), None
        except OSError as problem:
            result, error = None, f"{problem.filename or self.path}: {problem.strerror or problem}"
        results: list[Any] = [(result, error)]
        if self.group is not None:
            results = [None] * self.processes
            dist.all_gather_object(results, (result, error), self.group)
            results = [(found, problem and f"{problem} (rank {rank})") for rank, (found, problem) in enumerate(results)]
        errors = [problem for _, problem in results if problem]
        if errors:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise AgreedError(f"the checkpoint could not be written: {errors[0]}; earlier ones are untouched")
        return [found for found, _ in results]


class HashedFile:
    """A new file that is hashed while it is written, and on disk when it is closed.

    Attributes:
        summary: `size` in bytes and `sha256`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary: dict[str, Any] = {"size": 0, "sha256": ""}
        self._hash = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
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
    """Write a safetensors file tensor by tensor: the library's own writer needs all of them in memory at once.

    Args:
        path: of the new file.
        sizes: type and shape of every tensor.
        values: the tensors, in that order.
        metadata: of the file.

    Returns:
        `size` in bytes and `sha256` of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in values:
            data = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
            del tensor, data  # before the next one is made
    return file.summary


def _data_state(state: dict[str, Any]) -> Any:
    """The position in the data for the manifest, without the list of shards."""
    found: Any = next((value for key, value in state.items() if key.endswith("DataModule")), None)
    position = {key: value for key, value in found.items() if key != "shards"} if isinstance(found, dict) else found
    return copy.deepcopy(position)
