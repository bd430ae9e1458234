"""Tables and figures of runs, over their seeds: `python src/report.py FOLDER [--output DIR]`.

FOLDER may be one run, a sweep (`logs/train/multiruns/<time>`), or any folder with runs at any depth.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from mvsplit.stability.report import Report, make_report
from mvsplit.utils import entry
from mvsplit.utils.console import console, print_table
from mvsplit.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the other scripts do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python src/report.py --help")


def main(argv: list[str]) -> Report:
    """Write the report, show its tables and say where it lies."""
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where runs lie")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the report; FOLDER/report if not given")
    args = parser.parse_args(argv)
    report = make_report(args.folder, args.output, shlex.join(["python", "src/report.py", *argv]))
    for title, header, rows in report.tables:
        table = Table(title=title or None, title_justify="left")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        print_table(table, markup=False)
    lines = [*report.sentences, *report.notes, f"report           {report.path}"]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return report


if __name__ == "__main__":
    with entry.told():
        main(sys.argv[1:])
