"""Tables that a run keeps in its folder `stability/` (`trace.csv`, `depth.csv`, `time_probe.csv`): writing, reading."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import read_small

CHEAP = ("loss", "grad_norm", "g_mean", "g_ctr", "q_grad", "k_grad", "rho", "token_cosine")
"""Columns of `trace.csv` after `step`, one row per step. Over a few deep blocks: root-sum-squares of gradients,
means of the others."""
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
MAX_TABLE = 256 << 20
"""Largest table that is read, in bytes; a million steps of `trace.csv` take 100 MiB."""
WORDS = ("", "na", "none", "null", "-", "--")
"""Contents of an empty cell in tables of other programs; `nan` and `inf` are numbers."""


class TableWriter:
    """Appends rows to a CSV file; values that are missing or not a number leave their cell empty.

    Args:
        path: of the file.
        columns: its header.
        first_step: rows of this step and later are dropped: a killed run wrote them after its last checkpoint.
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
        names: read these columns only and ignore the others, whatever they contain.
        growing: a run may be writing the file: an incomplete last line is left out.

    Raises:
        UserError: naming file and line, for what is not a number or not a table.
    """
    try:
        lines = read_small(Path(path), MAX_TABLE).decode("utf-8-sig").splitlines(keepends=True)
        if growing and lines and not lines[-1].endswith("\n"):
            lines.pop()
        return _columns(path, _lines(lines), names)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; must be a CSV table with a column 'step'") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV table ({error})") from None


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
        raise UserError(f"{path}: empty; must be a CSV table with a column 'step'")
    if "step" not in header:
        raise UserError(f"{path}, line {number}: no column 'step' among {', '.join(header)[:200]}")
    wanted = [name for name in dict.fromkeys(header) if name and (names is None or name in names)]
    for name in wanted:
        if header.count(name) > 1:
            raise UserError(f"{path}, line {number}: column '{name}' occurs twice")
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
        raise UserError(f"{path}, line {line}: {name} = {cell[:40]!r}: must be a number or empty") from None
