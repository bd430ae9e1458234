"""Look at finished or running training: `python src/report.py guard TRACE` judges its statistics for a collapse."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from mvsplit.stability.traces import read_trace
from mvsplit.stability.watch import NAMES, Watch
from mvsplit.utils import entry
from mvsplit.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with a command in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.format_usage().strip()}")


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


COMMANDS = {"guard": guard}


def main(arguments: list[str]) -> None:
    """Call the command that the first word names."""
    name = arguments[0] if arguments else None
    if name not in COMMANDS:
        raise UserError(
            f"report: {name!r} is no command; allowed are {', '.join(COMMANDS)}, as in report.py guard TRACE"
        )
    COMMANDS[name](arguments[1:])


if __name__ == "__main__":
    with entry.told():
        main(sys.argv[1:])
