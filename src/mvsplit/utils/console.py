"""What the user reads while and after something runs."""

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

T = TypeVar("T")


def say(text: str) -> None:
    """One plain line, on the console and in the run's text log."""
    logging.getLogger("mvsplit").info(text)


def console() -> Console:
    """A console on the present standard output (tests and sweeps exchange it)."""
    return Console(file=sys.stdout)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar and time left; short work shows none."""
    if len(items) < 8:
        return items
    return rich_track(items, description, console=console())


def show_table(title: str, rows: dict[str, str]) -> None:
    """Two columns: name and value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    out = console()
    if not out.is_terminal:
        out.width = 200
    out.print(table, markup=False, highlight=False)
