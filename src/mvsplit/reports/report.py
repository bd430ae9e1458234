"""The report on a folder of runs: `report.md` with tables, comparisons and figures."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvsplit.reports.report_figures import draw_all
from mvsplit.reports.run_discovery import Group, find_groups
from mvsplit.reports.verdicts import RULES, SIGNIFICANT, GroupSummary, comparisons, summarise
from mvsplit.stability.by_depth import mean
from mvsplit.stability.plotting import NAMED

HEADER = ("method", "seeds", "verdict", "collapse at step", "final loss", "token cosine", "ρ",
          "Q gradient / its median", "G_mean/G_ctr")  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was written, for the console.

    Attributes:
        path: `report.md`.
        tables: title, header and rows of each.
        sentences: comparisons of final losses.
        notes: what is missing or left out.
    """

    path: Path
    tables: list[tuple[str, list[str], list[list[str]]]]
    sentences: list[str]
    notes: list[str]


def make_report(folder: Path, output: Path | None = None, command: str = "python src/report.py") -> Report:
    """Write `report.md` and its figures, by default to `<folder>/report/`.

    Raises:
        UserError: if there is no run to report on, see `find_groups`. Missing parts of a run are only noted.
    """
    groups, notes = find_groups(folder)
    summaries, step = summarise(groups)
    sections = split(summaries)
    output = output or folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    once = list({s.group.label: s for s in summaries}.values())  # a variant may belong to two questions
    figures = draw_all(output, sections, once)
    tables = [(question, *table(members)) for question, members in sections]
    sentences = [
        f"{question}: {sentence}" if question else sentence
        for question, members in sections
        if len(members) > 1
        for sentence in comparisons(members)
    ]
    notes += missing(folder, groups)
    runs = sum(len(s.runs) for s in once)
    parts = [
        f"# Stability report: {folder.resolve().name}",
        f"{runs} runs in {len(once)} groups (the runs of a group differ only in their seed), compared at step {step},"
        " the last that all finished runs reached.",
        *(markdown_table(*one) for one in tables),
        "## Comparison of final losses",
        "\n".join(f"- {sentence}" for sentence in sentences) or "There is only one group.",
        "Runs that are alive or unsteady are compared, with Welch's t-test of each group against the one with the"
        f" lowest mean. Significant means p < {SIGNIFICANT:g}, without a correction for the number of comparisons: of"
        " twenty equal pairs, about one will appear to differ.",
        "## Figures",
        *(f"### {figure.title}\n\n![{figure.title}]({figure.path.name})\n\n{figure.caption}" for figure in figures),
        "## How the verdicts are made",
        RULES.rstrip(),
        "## How this report was made",
        f"`{command}`, from {runs} runs.",
        "\n".join(f"- {note}" for note in notes) or "All runs are finished, and no file is missing.",
    ]
    path = output / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return Report(path, tables, sentences, notes)


def split(summaries: Sequence[GroupSummary]) -> list[tuple[str, list[GroupSummary]]]:
    """Groups by question, with the ablation's baseline (the first without overrides) as the first of each."""
    questions: dict[str, list[GroupSummary]] = {}
    for s in summaries:
        questions.setdefault(s.group.question, []).append(s)
    base = [s for s in summaries if s.group.question and not s.group.overrides][:1]
    other = "other runs" if len(questions) > 1 else ""
    return [(name or other, [*(s for s in base if s not in own), *own]) for name, own in questions.items()]


def table(summaries: Sequence[GroupSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, one row per group."""
    overrides = any(s.group.overrides for s in summaries)
    header, rows = [*HEADER, *["overrides"] * overrides], []
    for s in summaries:
        events = s.collapse_steps
        row = [
            s.group.label,
            ", ".join(map(str, s.group.seeds)),
            s.verdicts,
            _range(events, f"{np.median(events):.0f}", "{:.0f}") if events else "–",
            cell(s.values("loss")),
            cell(s.values("token_cosine")),
            *(cell(s.values(name), geometric=True) for name in ("rho", "q_ratio", "g_ratio")),
        ]
        rows.append(row + [s.group.overrides] * overrides)
    if len(summaries) > NAMED:  # then the figures' legends are numbers
        header.insert(0, "line")
        rows = [[str(n + 1), *row] for n, row in enumerate(rows)]
    return header, rows


def cell(values: Iterable[float], geometric: bool = False) -> str:
    """`0.523 ± 0.012 (0.511…0.535)`: mean, standard deviation over seeds, and range; – if nothing was measured.

    A geometric mean, for values that span powers of ten, has no deviation.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    if geometric:
        return _range(finite, f"{mean(finite, geometric=min(finite) > 0):.3g}", "{:.3g}")
    spread = f" ± {np.std(finite, ddof=1):.3f}" if len(finite) > 1 else ""
    return _range(finite, f"{mean(finite):.3f}{spread}", "{:.3f}")


def _range(values: Sequence[float], middle: str, form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return middle if low == high else f"{middle} ({low}…{high})"


def missing(folder: Path, groups: Sequence[Group]) -> list[str]:
    """A line for each unfinished run, missing file and missing seed."""
    notes = []
    for run in (run for group in groups for run in group.runs):
        name = run.folder.relative_to(folder) if run.folder != folder else run.folder.name
        if not run.finished:
            reports = sorted(run.folder.glob("stability/nonfinite_step_*.json"))
            why = "interrupted or still running"
            if reports:
                why = f"ended by a non-finite loss or gradient ({reports[-1].name})"
            notes.append(f"{name}: {run.last_step + 1} of {run.max_steps} steps, {why}")
        notes += [f"{name}: {what}" for what in run.missing]
    counts = Counter(seed for group in groups for seed in group.seeds)
    usual = sorted(seed for seed, count in counts.items() if 2 * count > len(groups))
    for group in groups:
        lacking = [str(seed) for seed in usual if seed not in group.seeds]
        if lacking:
            notes.append(f"{group.label}: no run with seed {', '.join(lacking)}, unlike most groups")
    return notes


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, below its title."""
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(([f"## {title}", ""] if title else []) + lines)
