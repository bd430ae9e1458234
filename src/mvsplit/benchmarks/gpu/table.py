"""How results are told: a line for each case, and one table of all on the console and as Markdown."""

from pathlib import Path
from typing import Any

from rich.table import Table

from mvsplit.benchmarks.gpu.cases import Case
from mvsplit.utils.console import print_table, say

MARKS = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow", "NOT RUN": "dim"}


def told(result: dict[str, Any]) -> str:
    """What failed, why, and the plain figures, in one line."""
    broken = [f"NOT {name}" for name, held in result["checks"].items() if not held]
    figures = [f"{name} {_short(value)}" for name, value in result["figures"].items() if not isinstance(value, dict)]
    return "; ".join(part for part in (", ".join(broken), result["why"], ", ".join(figures)) if part) or "as it should"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_short(item) for item in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(rows: list[tuple[Case, dict[str, Any] | None]], machine: dict[str, Any], folder: Path) -> None:
    """One table on the console, the same as `results.md`."""
    table = Table(title=f"{machine['name']}, torch {machine['torch']}", title_justify="left")
    for column in ("section", "case", "", "figures", "s"):
        table.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    lines = [f"{machine['name']}, torch {machine['torch']}", "", "| section | case | | figures | s |", "|-|-|-|-|-:|"]
    counts = dict.fromkeys(MARKS, 0)
    for case, result in rows:
        status, text = ("NOT RUN", "") if result is None else (result["status"], told(result))
        counts[status] += 1
        seconds = "" if result is None else f"{result['seconds']:.0f}"
        safe = text.replace("[", r"\[")
        table.add_row(case.section, case.name, f"[{MARKS[status]}]{status}[/]", safe, seconds)
        lines.append(f"| {case.section} | {case.name} | {status} | {text.replace('|', chr(92) + '|')} | {seconds} |")
    print_table(table)
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    say(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if counts["NOT RUN"]:
        say("the same command goes on with what was not run")
    say(f"figures          {folder / 'results.json'}")
    say(f"table            {folder / 'results.md'}")
