"""Statistics to replay the detector on: a run's own table, one from another program, or TensorBoard's scalars."""

import math
from pathlib import Path

import numpy as np

from mvsplit.stability.detector import NAMES
from mvsplit.stability.tables import Table, read_table
from mvsplit.utils.errors import UserError


def read_tensorboard(folder: Path) -> Table:
    """The statistics among a folder's TensorBoard scalars, one row per step; the last part of a tag is their name.

    Raises:
        UserError: if there are no event files, or they hold none of the statistics.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    folders = sorted({file.parent for file in Path(folder).rglob("*tfevents*")})
    if not folders:
        raise UserError(f"{folder}: no TensorBoard event files")
    found: dict[str, dict[int, float]] = {}
    ranks: dict[str, int] = {}
    for place in folders:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            name, rank = tag.rpartition("/")[2], _rank(tag)
            if name not in NAMES or rank < ranks.get(name, 0):
                continue
            if rank > ranks.get(name, 0):  # this tag takes precedence
                found[name] = {}
            ranks[name] = rank
            scalars = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            found.setdefault(name, {}).update((event.step, event.value) for event in scalars)
    if not found:
        raise UserError(f"{folder}: none of the scalars {', '.join(NAMES)}, with or without a prefix such as train/")
    steps = sorted({step for values in found.values() for step in values})
    table = {name: np.array([values.get(step, math.nan) for step in steps]) for name, values in found.items()}
    return {"step": np.array(steps, dtype=np.float64)} | table


def _rank(tag: str) -> int:
    """Precedence of tags with the same name: training comes first, validation is never meant."""
    prefix = tag.rpartition("/")[0].rpartition("/")[2]
    return {"stability": 3, "train": 2, "": 1}.get(prefix, -1 if prefix in ("val", "test", "hparam") else 0)


def read_trace(path: Path) -> Table:
    """A run's statistics, sorted by step; where a step has several rows, the last one.

    Args:
        path: a CSV file, a run folder with `stability/trace.csv`, or a folder with TensorBoard event files.

    Raises:
        UserError: if there are no usable statistics.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        inside = [file for file in (path / "stability" / "trace.csv", path / "trace.csv") if file.is_file()]
        if not inside:
            return read_tensorboard(path)
        path = inside[0]
    table = read_table(path, ("step", *NAMES))
    if len(table) < 2:
        raise UserError(f"{path}: no statistics; at least one of the columns {', '.join(NAMES)} is required")
    if not len(table["step"]):
        raise UserError(f"{path}: no rows below the header")
    whole = np.isfinite(table["step"])
    if not whole.any():
        raise UserError(f"{path}: no row has a step")
    if (np.abs(table["step"][whole]) > 2**53).any():
        raise UserError(f"{path}: steps must not exceed 2^53")
    names = [name for name in table if name != "step"]
    if not any(np.isfinite(table[name]).any() for name in names):
        raise UserError(f"{path}: all cells of {', '.join(names)} are empty")
    steps = table["step"][whole].astype(np.int64)
    last = {int(step): place for place, step in enumerate(steps)}  # rows rewritten by a resumed run come later
    order = [last[step] for step in sorted(last)]
    return {name: values[whole][order] for name, values in table.items()}
