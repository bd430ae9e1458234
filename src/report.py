"""Tables and figures of runs, over their seeds: `python src/report.py FOLDER [--output DIR]`.

FOLDER may be one run, a sweep (`logs/train/multiruns/<time>`), or any folder with runs at any depth.
"""

import argparse
import shlex
import sys
from pathlib import Path

from rich.table import Table

from mvsplit.stability.report import Report, make_report
from mvsplit.utils import entry
from mvsplit.utils.console import console, print_table


def main(argv: list[str]) -> Report:
    """Write the report, show its tables and say where it lies."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where runs lie")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the report; FOLDER/report if not given")
    args = parser.parse_args(argv)
    report = make_report(args.folder, args.output, shlex.join(["python", "src/report.py", *argv]))
    for title, header, rows in report.tables:
        table = Table(*header, title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        print_table(table, markup=False)
    lines = [*report.sentences, *report.notes, f"report           {report.path}"]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return report


if __name__ == "__main__":
    with entry.told():
        main(sys.argv[1:])
