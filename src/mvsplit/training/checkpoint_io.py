"""How every strategy saves and loads: Lightning's side of the checkpoint folders, and writing in the background."""

import math
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import distributed as dist

from mvsplit.training.checkpoint_format import Saved, copied, remove
from mvsplit.training.checkpoint_writer import CheckpointWriter
from mvsplit.utils.console import info

ROOM = 0.8
"""Share of the available host memory that the copies for a background write may take."""
FAILED, UNDER_WAY, DONE = range(3)
"""Progress of a background write; over several processes the smallest value counts."""


class SaveOptions(NamedTuple):
    """Lightning's `storage_options`.

    Args:
        background: write in a thread, if there is room in host memory for a copy.
        finished: called on the first process when the checkpoint is in place, in the thread that wrote it.
        group: the processes that write together; None if the first writes alone.
        copies: processes of this machine that copy their tensors at the same time.
    """

    background: bool = False
    finished: Callable[[], None] | None = None
    group: dist.ProcessGroup | None = None
    copies: int = 1


class FolderCheckpoints(CheckpointIO):
    """Checkpoints as folders, one at a time. Removes only checkpoints in folders that this process has saved to."""

    def __init__(self) -> None:
        self.saved_to: set[Path] = set()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._reported = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        options = storage_options if isinstance(storage_options, SaveOptions) else SaveOptions()
        self.finish()
        path, tensors = Path(path), checkpoint.pop("tensors")
        size = sum(part.values.nbytes for slices in tensors.values() for part in slices.values())
        background = options.background and self._has_room(size, options)
        if background:
            tensors = {kind: copied(slices) for kind, slices in tensors.items()}
        new_folder = path.parent not in self.saved_to
        self.saved_to.add(path.parent)
        writer = CheckpointWriter(path, checkpoint, tensors, options.group, new_folder, options.finished)
        if background:
            # A daemon: a second Ctrl-C ends the process without waiting for it.
            self._thread = threading.Thread(target=self._write, args=(writer,), name="checkpoint writer", daemon=True)
            self._thread.start()
        else:
            writer.run()

    def _write(self, writer: CheckpointWriter) -> None:
        try:
            writer.run()
        except BaseException as error:
            self._error = error  # raised by the main thread

    def _has_room(self, size: int, options: SaveOptions) -> bool:
        """Whether all processes have room for their copies; logs one line if not."""
        available = available_memory()
        room = torch.tensor(int(size * options.copies <= ROOM * available))
        if options.group is not None:
            dist.all_reduce(room, dist.ReduceOp.MIN, options.group)
        if not room and not self._reported and (options.group is None or dist.get_rank() == 0):
            gib = size * options.copies / 2**30
            info(
                f"callbacks.checkpoint.async_save = true: no room for a copy of {gib:.1f} GiB in host memory"
                f" ({available / 2**30:.1f} GiB available here); training waits while checkpoints are written"
            )
        self._reported = self._reported or not room
        return bool(room)

    def progress(self, wait: bool = False) -> int:
        """`FAILED`, `UNDER_WAY` or `DONE`: the last background write of this process.

        Args:
            wait: until it ends.
        """
        if self._thread is None:
            return DONE
        if wait:
            self._thread.join()
        return UNDER_WAY if self._thread.is_alive() else FAILED if self._error is not None else DONE

    def finish(self) -> None:
        """Wait for the background write, if there is one.

        Raises:
            AgreedError: if it failed.
        """
        self.progress(wait=True)
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        for inside in self.saved_to:
            remove(Path(path), inside)


def available_memory() -> float:
    """Bytes of host memory that can still be allocated here, infinite where that cannot be read.

    A container or SLURM job may have less than the machine (cgroup v2); its page cache counts as available.
    """
    try:
        machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = float(machine["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf
    try:
        group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2])
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(available, limit - used + int(cache["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no limit is `max`
        return available


def read_checkpoint(path: Any) -> dict[str, Any]:
    """What Lightning passes to the hooks that load: counters and the like; `tensors(kind)` reads the rest on demand.

    The first process has chosen the checkpoint and verified its checksums; the others follow it.
    """
    if dist.is_initialized():
        chosen = [str(path)]
        dist.broadcast_object_list(chosen)
        path = chosen[0]
    saved = Saved(Path(path))
    return saved.state() | {"tensors": saved.tensors}


class ShardedSaving(Strategy):
    """Saving and loading for strategies under which each process holds a part of every tensor."""

    _writers: Any = None  # their process group, made at the first save

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # else one process would assemble whole weights; the module adds the local shards

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        filepath = self.broadcast(filepath)
        options = storage_options if isinstance(storage_options, SaveOptions) else SaveOptions()
        if dist.is_initialized():
            if self._writers is None:  # a separate group, apart from training's collectives, for background writes
                self._writers = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            options = options._replace(group=self._writers, copies=self.num_processes)
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(checkpoint_path)
