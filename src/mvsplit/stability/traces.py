"""The tables that a run leaves in `<run folder>/stability/`."""

from pathlib import Path

import numpy as np

from mvsplit.utils.errors import UserError

Table = dict[str, np.ndarray]
"""Columns by name, float64, all of one length."""


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
