"""Report on finished or running training.

    python src/report.py FOLDER [--output DIR]   tables and figures of runs, over their seeds
    python src/report.py guard TRACE             replay the collapse detector over a run's statistics

FOLDER may be one run, a sweep (`logs/train/multiruns/<time>`), or any folder with runs at any depth. TRACE is a CSV
file, a run folder, or a folder with TensorBoard event files.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.table import Column, Table

from mvsplit.utils import entry
from mvsplit.utils.console import console, print_table
from mvsplit.utils.errors import UserError

if TYPE_CHECKING:  # imported below, once the command line is parsed: mistakes are reported at once
    from mvsplit.reports.report import Report


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like the other scripts."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python src/report.py --help")


def main(argv: list[str]) -> None:
    """Replay the detector if the first word is `guard`, otherwise report on a folder."""
    if argv[:1] == ["guard"]:
        guard(argv[1:])
    else:
        report(argv)


def report(argv: list[str]) -> "Report":
    """Write the report, print its tables and its path."""
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the report; default: FOLDER/report")
    args = parser.parse_args(argv)
    from mvsplit.reports.report import make_report

    made = make_report(args.folder, args.output, shlex.join(["python", "src/report.py", *argv]))
    for title, header, rows in made.tables:
        columns = [Column(name, overflow="fold") for name in header]
        table = Table(*columns, title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        print_table(table, markup=False)
    lines = [*made.sentences, *made.notes, f"report           {made.path}"]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return made


def guard(argv: list[str]) -> None:
    """Replay the detector over a trace: a line for each event, then all of them as one line of JSON.

    The thresholds of a run folder are those of the run's config.
    """
    parser = Parser(prog="report.py guard", description=guard.__doc__)
    parser.add_argument("trace", type=Path, help="CSV file, run folder, or folder with TensorBoard event files")
    path = parser.parse_args(argv).trace
    from mvsplit.reports.run_discovery import read_config, thresholds_of
    from mvsplit.reports.traces import read_trace
    from mvsplit.reports.verdicts import replay

    table = read_trace(path)
    is_run = (path / "stability" / "trace.csv").is_file() and (path / "config.yaml").is_file()
    _, events = replay(table, thresholds_of(read_config(path) if is_run else {}))
    for event in events:
        print(f"step {event.step}: {event.kind}, {event.why}")
    print(json.dumps({"events": [vars(event) for event in events], "steps": len(table["step"])}))


if __name__ == "__main__":
    with entry.report_user_errors():
        main(sys.argv[1:])
