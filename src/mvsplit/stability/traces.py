"""The tables that a run leaves in its folder `stability/`: `trace.csv`, `depth.csv`, `time_probe.csv`."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

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


def read_table(path: Path) -> Table:
    """Read a CSV file of numbers; an empty cell is NaN.

    A last line without its end is still being written, or was cut short by a kill: it is left out.

    Raises:
        UserError: naming file and line, for what is not a number, or a line of another length than the header.
    """
    try:
        lines = path.read_text().rpartition("\n")[0].splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text") from None
    if not lines:
        raise UserError(f"{path}: empty, not even a header")
    names = lines[0].split(",")
    values = np.full((len(lines) - 1, len(names)), np.nan)
    for row, line in enumerate(lines[1:]):
        cells = line.split(",")
        try:
            if len(cells) != len(names):
                raise ValueError
            values[row] = [float(cell) if cell.strip() else np.nan for cell in cells]
        except ValueError:
            raise UserError(f"{path}, line {row + 2}: not {len(names)} numbers: {line[:80]!r}") from None
    return {name: values[:, column] for column, name in enumerate(names)}
