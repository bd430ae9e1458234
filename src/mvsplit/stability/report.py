"""The report on a folder of runs: `report.md` with tables, what can be told apart, and figures."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvsplit.stability.figures import NAMED
from mvsplit.stability.outcomes import RULES, Judged, comparisons, judge, mean
from mvsplit.stability.pictures import draw_all
from mvsplit.stability.runs import Found, Run, find_groups

HEADER = ("method", "seeds", "verdict", "collapse at step", "final loss", "token cosine", "ρ",
          "Q gradient / its median", "G_mean/G_ctr")  # fmt: skip


@dataclass(frozen=True)
class Set:
    """Groups that answer one question, with what they are compared with first; without questions, all groups."""

    question: str
    judged: list[Judged]


@dataclass(frozen=True)
class Report:
    """What was written, for the console.

    Attributes:
        path: of `report.md`. tables: title, header and rows of each. sentences: on what can be told apart.
        notes: what is missing or left out.
    """

    path: Path
    tables: list[tuple[str, list[str], list[list[str]]]]
    sentences: list[str]
    notes: list[str]


def make_report(folder: Path, output: Path | None = None, command: str = "python src/report.py") -> Report:
    """Write `report.md` and its figures, by default to `<folder>/report/`.

    Raises:
        UserError: if there is no run to report on, see `find_groups`. What is missing of a run is told, no error.
    """
    found = find_groups(folder)
    judged, step = judge(found.groups)
    sets = split(judged)
    output = output or folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    once = list({j.group.label: j for j in judged}.values())  # a variant may stand under two questions
    figures = draw_all(output, [(one.question, one.judged) for one in sets], once)
    tables = [(one.question, *table(one.judged)) for one in sets]
    sentences = [
        f"{one.question}: {sentence}" if one.question else sentence
        for one in sets
        if len(one.judged) > 1
        for sentence in comparisons(one.judged)
    ]
    notes = found.notes + missing(folder, found)
    runs = sum(len(j.outcomes) for j in once)
    parts = [
        f"# Stability report: {folder.resolve().name}",
        f"{runs} runs in {len(once)} groups (runs of a group differ only in their seed), compared at step {step},"
        " the last that all finished runs have.",
        *(_markdown(*one) for one in tables),
        "## What can be told apart",
        "\n".join(f"- {sentence}" for sentence in sentences) or "There is one group only.",
        "By final losses of living seeds: two groups are told apart if Welch's 95 % interval of the difference of"
        " their means leaves out zero. Each pair is judged by itself: of twenty equal pairs one may seem to differ.",
        "## Figures",
        *(f"### {figure.title}\n\n![{figure.title}]({figure.path.name})\n\n{figure.reading}" for figure in figures),
        "## How the verdicts are made",
        RULES.rstrip(),
        "## How this report was made",
        f"`{command}`, from {runs} runs.",
        "\n".join(f"- {note}" for note in notes) or "All runs are finished, and no file was missing.",
    ]
    path = output / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return Report(path, tables, sentences, notes)


def split(judged: Sequence[Judged]) -> list[Set]:
    """Groups by their question; the ablation's baseline (the first without overrides) stands first in each."""
    questions = list(dict.fromkeys(j.group.question for j in judged))
    if questions == [""]:
        return [Set("", list(judged))]
    base = [j for j in judged if j.group.question and not j.group.overrides][:1]
    sets = []
    for question in questions:
        own = [j for j in judged if j.group.question == question]
        sets.append(Set(question or "other runs", [*(j for j in base if j not in own), *own]))
    return sets


def table(judged: Sequence[Judged]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, one row per group."""
    header, rows = list(HEADER), []
    overrides = any(j.group.overrides for j in judged)
    if overrides:
        header.append("overrides")
    for j in judged:
        events = [float(o.event) for o in j.outcomes if o.event is not None]
        row = [
            j.group.label,
            ", ".join(map(str, j.group.seeds)),
            j.verdicts,
            _range(events, f"{np.median(events):.0f}", "{:.0f}") if events else "–",
            cell(j.values("loss")),
            cell(j.values("token_cosine")),
            *(cell(j.values(name), geometric=True) for name in ("rho", "q_ratio", "g_ratio")),
        ]
        rows.append(row + [j.group.overrides] * overrides)
    if len(judged) > NAMED:  # then the figures' legends are numbers
        header.insert(0, "line")
        rows = [[str(n + 1), *row] for n, row in enumerate(rows)]
    return header, rows


def cell(values: Iterable[float], geometric: bool = False) -> str:
    """`0.523 ± 0.012 (0.511…0.535)`: mean, standard deviation over seeds, and range; – where nothing was measured.

    A geometric mean stands without the deviation, for what spans powers of ten.
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


def missing(folder: Path, found: Found) -> list[str]:
    """What is not there though it could be: ends of runs, files, seeds. One line each."""
    notes = []
    for run in (run for group in found.groups for run in group.runs):
        name = run.folder.relative_to(folder) if run.folder != folder else run.folder.name
        if not run.finished:
            notes.append(f"{name}: {run.last_step + 1} of {run.max_steps} steps, {_why(run)}")
        notes += [f"{name}: {what}" for what in run.missing]
    counts = Counter(seed for group in found.groups for seed in group.seeds)
    usual = sorted(seed for seed, count in counts.items() if 2 * count > len(found.groups))
    for group in found.groups:
        lacking = [str(seed) for seed in usual if seed not in group.seeds]
        if lacking:
            notes.append(f"{group.label}: no run with seed {', '.join(lacking)}, which most groups have")
    return notes


def _why(run: Run) -> str:
    reports = sorted(run.folder.glob("nonfinite_step_*.json"))
    return f"ended by a loss or gradient that was not finite ({reports[-1].name})" if reports else (
        "cut short or still going on")  # fmt: skip


def _markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(([f"## {title}", ""] if title else []) + lines)
