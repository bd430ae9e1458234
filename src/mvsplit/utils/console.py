"""Console output: lines, tables and progress."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import track as rich_track
from rich.table import Table

T = TypeVar("T")


def info(text: str) -> None:
    """One plain line, on the console and in the run's text log."""
    logging.getLogger("mvsplit").info(text)


@lru_cache(maxsize=1000)
def info_once(text: str) -> None:
    """The same, unless this text was logged before."""
    info(text)


def console() -> Console:
    """A console on the current standard output, which tests and sweeps replace."""
    return Console(file=sys.stdout)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar and the time left; without one for few items."""
    if len(items) < 8:
        return items
    return rich_track(items, description, console=console())


@contextmanager
def progress(
    description: str, total: int, done: int = 0, line_every_s: float = 15.0
) -> Iterator[Callable[[int], None]]:
    """Progress of long work, with the time left: a bar, or regular lines if the output is not a terminal.

    Args:
        description: of the work.
        total: number of items.
        done: number of items done earlier.
        line_every_s: seconds between two lines.

    Yields:
        A function to call with the number of items done since the last call.
    """
    out = console()
    if out.is_terminal:
        columns = (TextColumn(description), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
        with Progress(*columns, TimeRemainingColumn(), console=out) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    began = last_line = time.monotonic()
    now_done = done

    def advance(count: int) -> None:
        nonlocal last_line, now_done
        now_done += count
        now = time.monotonic()
        if count and now - last_line > line_every_s:
            last_line = now
            left = timedelta(seconds=round((now - began) / (now_done - done) * (total - now_done)))
            info(f"{description}: {now_done}/{total}, about {left} left")

    yield advance


def show_table(title: str, rows: dict[str, str]) -> None:
    """Two columns: name and value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(table, markup=False)


def print_table(table: Table, markup: bool = True) -> None:
    """Print a table; in a log it is not folded to the width of a terminal."""
    out = console()
    if not out.is_terminal:
        out.width = 200
    out.print(table, markup=markup, highlight=False)
