"""Look at finished or running training.

    python src/report.py FOLDER [--output DIR]   tables and figures of runs, over their seeds
    python src/report.py guard TRACE             judges a run's statistics for a collapse

FOLDER may be one run, a sweep (`logs/train/multiruns/<time>`), or any folder with runs at any depth. TRACE is a CSV
file, a run's folder, or one with TensorBoard's event files.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from mvsplit.stability.report import Report, make_report
from mvsplit.stability.traces import read_trace
from mvsplit.stability.watch import NAMES, Watch
from mvsplit.utils import entry
from mvsplit.utils.console import console, print_table
from mvsplit.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the other scripts do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python src/report.py --help")


def main(argv: list[str]) -> None:
    """Judge a trace if the first word is `guard`, else report on a folder."""
    if argv[:1] == ["guard"]:
        guard(argv[1:])
    else:
        report(argv)


def report(argv: list[str]) -> Report:
    """Write the report, show its tables and say where it lies."""
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where runs lie")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the report; FOLDER/report if not given")
    args = parser.parse_args(argv)
    made = make_report(args.folder, args.output, shlex.join(["python", "src/report.py", *argv]))
    for title, header, rows in made.tables:
        table = Table(title=title or None, title_justify="left")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        print_table(table, markup=False)
    lines = [*made.sentences, *made.notes, f"report           {made.path}"]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return made


def guard(arguments: list[str]) -> None:
    """Judge the statistics of a run for a collapse: a line for each decision, at last all of them as a line of JSON."""
    parser = Parser(prog="report.py guard", description=guard.__doc__)
    parser.add_argument("trace", type=Path, help="CSV file, run folder, or folder with TensorBoard's event files")
    table = read_trace(parser.parse_args(arguments).trace)
    names = [name for name in NAMES if name in table]
    watch, events = Watch(), []
    for place, step in enumerate(table["step"]):
        for event in watch.observe(int(step), {name: float(table[name][place]) for name in names}):
            events.append({"step": event.step, "kind": event.kind, "why": event.why})
            print(f"step {event.step}: {event.kind}, {event.why}")
    print(json.dumps({"events": events, "steps": len(table["step"])}))


if __name__ == "__main__":
    with entry.told():
        main(sys.argv[1:])
