"""Tables that a run leaves in its folder `stability/` (`trace.csv`, `depth.csv`, `time_probe.csv`): writing, reading.

Also reads such statistics of runs from elsewhere, as tables or from TensorBoard.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mvsplit.stability.watch import NAMES
from mvsplit.utils.errors import UserError

CHEAP = ("loss", "grad_norm", "g_mean", "g_ctr", "q_grad", "k_grad", "rho", "token_cosine")
"""Columns of `trace.csv` beside `step`, a row per optimiser step: over a few deep blocks, root-sum-squares of gradients
and means of the others."""
Table = dict[str, np.ndarray]
"""Columns by name, float64, all of one length."""
_BRANCHES = ("attention", "ffn")
_BY_BRANCH = ("var_gain", "tr_ratio", "g_mean", "g_ctr", "amplification", "alignment")
DEPTH = (
    *("rho", "rho_image", "rho_context", "token_cosine", "mu_eff", "retention", "row_diversity"),
    *(f"{name}_{branch}" for name in _BY_BRANCH for branch in _BRANCHES),
    *("q_grad", "k_grad", "alpha_mean", "alpha_max", "beta_mean", "beta_max"),
)
"""Columns of `depth.csv` beside `step` and `block`, a row per probed block; see `measures.py`."""
WORDS = ("", "na", "none", "null", "-", "--")
"""What stands in an empty cell of tables from elsewhere; `nan` and `inf` are numbers."""


class TableWriter:
    """Appends rows to a CSV file; values that are missing or not a number leave their cell empty.

    Args:
        path: of the file. columns: its header.
        first_step: rows of this step and later are dropped, which a killed run wrote after its last checkpoint.
    """

    def __init__(self, path: Path, columns: Sequence[str], first_step: int) -> None:
        self.columns = list(columns)
        kept: list[str] = []
        if path.exists():
            header, *rows = path.read_text().splitlines() or [""]
            if header == ",".join(self.columns):
                kept = [
                    row for row in rows if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) < first_step
                ]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self.columns)
        self._file.writelines(f"{row}\n" for row in kept)
        self._file.flush()

    def append(self, rows: Iterable[Mapping[str, float]]) -> None:
        for row in rows:
            values = [row.get(column, math.nan) for column in self.columns]
            self._writer.writerow([v if isinstance(v, int) else "" if math.isnan(v) else f"{v:.7g}" for v in values])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_table(path: Path, names: tuple[str, ...] | None = None, growing: bool = False) -> Table:
    """Columns of a CSV file as float64, NaN for empty cells; rows in the file's order.

    Args:
        names: read these columns only and ignore the others, whatever stands in them.
        growing: a run may be writing it at this moment: a last line without its end is left out.

    Raises:
        UserError: naming file and line, for what is not a number or not a table.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines(keepends=True)
        if growing and lines and not lines[-1].endswith("\n"):
            lines.pop()
        return _columns(path, _lines(lines), names)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a CSV table with the column 'step' is needed") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV table ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _lines(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of the lines that are not empty; commas, semicolons or tabs between cells."""
    delimiter = None
    for number, line in enumerate(file, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if delimiter is None:
            delimiter = next((mark for mark in (",", ";", "\t") if mark in line), ",")
        yield number, [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _columns(path: Path, lines: Iterator[tuple[int, list[str]]], names: tuple[str, ...] | None) -> Table:
    number, header = next(lines, (0, []))
    if not header:
        raise UserError(f"{path}: empty; a CSV table with the column 'step' is needed")
    if "step" not in header:
        raise UserError(f"{path}, line {number}: no column 'step' among {', '.join(header)[:200]}")
    wanted = [name for name in dict.fromkeys(header) if name and (names is None or name in names)]
    for name in wanted:
        if header.count(name) > 1:
            raise UserError(f"{path}, line {number}: column '{name}' stands there twice")
    places = [(name, header.index(name)) for name in wanted]
    columns: dict[str, list[float]] = {name: [] for name in wanted}
    for number, cells in lines:
        if len(cells) > len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} cells, the header has {len(header)}")
        for name, place in places:
            columns[name].append(_number(path, number, name, cells[place] if place < len(cells) else ""))
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


def _number(path: Path, line: int, name: str, cell: str) -> float:
    if cell.lower() in WORDS:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise UserError(f"{path}, line {line}: {name} = {cell[:40]!r}: a number or an empty cell is needed") from None


def read_tensorboard(folder: Path) -> Table:
    """The statistics among a folder's scalars, by the last part of their tags (`train/loss`): one row per step.

    Raises:
        UserError: if there are no event files, or none of the statistics in them.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    folders = sorted({file.parent for file in Path(folder).rglob("*tfevents*")})
    if not folders:
        raise UserError(f"{folder}: no event files of TensorBoard")
    found: dict[str, dict[int, float]] = {}
    ranks: dict[str, int] = {}
    for place in folders:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            name, rank = tag.rpartition("/")[2], _rank(tag)
            if name not in NAMES or rank < ranks.get(name, 0):
                continue
            if rank > ranks.get(name, 0):  # a better one than before
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
    """Of several tags with one name the training's own is meant: val/loss is another thing than train/loss."""
    prefix = tag.rpartition("/")[0].rpartition("/")[2]
    return {"stability": 3, "train": 2, "": 1}.get(prefix, -1 if prefix in ("val", "test", "hparam") else 0)


def read_trace(path: Path) -> Table:
    """A run's statistics, sorted by step, of each step the last row: what the guard judges.

    Args:
        path: a CSV file, a run folder with `stability/trace.csv`, or a folder of TensorBoard's.

    Raises:
        UserError: for whatever the user can mend.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_dir():
        inside = [file for file in (path / "stability" / "trace.csv", path / "trace.csv") if file.is_file()]
        if not inside:
            return read_tensorboard(path)
        path = inside[0]
    table = read_table(path, ("step", *NAMES))
    if len(table) < 2:
        raise UserError(f"{path}: nothing to judge; at least one of the columns {', '.join(NAMES)} is needed")
    if not len(table["step"]):
        raise UserError(f"{path}: nothing to judge, there are no rows below the header")
    whole = np.isfinite(table["step"])
    if not whole.any():
        raise UserError(f"{path}: nothing to judge, no row has a step")
    if (np.abs(table["step"][whole]) > 2**53).any():
        raise UserError(f"{path}: a step beyond 2^53")
    if not any(np.isfinite(table[name]).any() for name in table if name != "step"):
        raise UserError(
            f"{path}: nothing to judge, all cells of {', '.join(n for n in table if n != 'step')} are empty"
        )
    steps = table["step"][whole].astype(np.int64)
    last = {int(step): place for place, step in enumerate(steps)}  # what a resumed run wrote again comes later
    order = [last[step] for step in sorted(last)]
    return {name: values[whole][order] for name, values in table.items()}
