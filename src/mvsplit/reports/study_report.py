"""The report on a study: `report.md` with a table, comparisons and figures, from the runs that are finished."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mvsplit.reports.report import cell as cell_text
from mvsplit.reports.report import markdown_table
from mvsplit.reports.report_figures import ReportFigure, together
from mvsplit.reports.run_discovery import read_run
from mvsplit.reports.study_cells import VALLEY, Cell, rate_name, read_cells, read_plan
from mvsplit.reports.verdicts import SIGNIFICANT, against_best, p_value, running_mean
from mvsplit.stability.by_depth import mean
from mvsplit.stability.plotting import Curve, Panel, save_curves
from mvsplit.utils.errors import UserError

METRICS = {
    "sample/fid": "FID", "sample/is": "IS", "sample/recognised": "recognised", "sample/precision": "precision",
    "sample/recall": "recall", "sample/seconds": "s per sample",
}  # fmt: skip
BETTER = {"": -1, "sample/fid": -1, "sample/is": 1, "sample/recognised": 1}
"""Metrics whose trend over depth is described ("" is the loss), and the direction in which they improve."""
EDGE = " ^"
"""Marks a best rate that is the highest one tried, and lived: a higher one may be better."""
SMOOTH = 20
"""Steps that training losses in figures are averaged over."""


def make_report(folder: Path) -> Path:
    """Write `<folder>/report/report.md` and its figures. Returns its path.

    Raises:
        UserError: if the folder is not of a study, or has no finished run.
    """
    plan = read_plan(folder)
    cells = [cell for cell in read_cells(folder, plan) if cell.endings]
    if not cells:
        raise UserError(f"{folder}: no finished run yet")
    output = folder / "report"
    output.mkdir(exist_ok=True)
    of = _of_depth if plan["kind"] == "depth" else _of_residuals
    parts, figures = of(folder, output, plan, cells)
    runs = sum(len(found) for cell in cells for found in cell.endings.values())
    hours = sum(ending.seconds for cell in cells for found in cell.endings.values() for ending in found.values())
    lines = [
        f"# Study: {plan['kind']}",
        f"{runs} runs, {hours / 3600:.1f} process-hours. Each method is reported at the rate at which its first seed's"
        f" validation loss is lowest, of {', '.join(f'{rate:g}' for rate in plan['rates'])} × {plan['lr']:g}; its other"
        " seeds are trained at that rate only. Losses are of averaged weights, on held-out samples; ± is the standard"
        " deviation over the seeds that live. A run counts as dead if it ends collapsing, collapsed, stopped or without"
        " having learnt (`src/mvsplit/reports/verdicts.py`).",
        f"Rates with{EDGE} are the highest tried: a higher one may be better still.",
        *parts,
        *(f"## {figure.title}\n\n![{figure.title}]({figure.path.name})\n\n{figure.caption}" for figure in figures),
    ]
    path = output / "report.md"
    path.write_text("\n\n".join(lines) + "\n")
    return path


def died_text(cell: Cell) -> str:
    """`1 of 3`: the seeds that died at the best rate."""
    ends = cell.at_best()
    return f"{sum(not ending.alive for ending in ends)} of {len(ends)}"


def comparison(cells: Sequence[Cell]) -> str:
    """Which methods differ significantly from the one with the lowest mean loss, by Welch's t-test over seeds."""
    several = [cell for cell in cells if len(cell.losses) > 1]
    if len(several) < 2:
        return "Fewer than two methods have two seeds that live: nothing is compared."
    best, alike, higher = against_best([(cell.method, cell.losses) for cell in several], ".3f")
    parts = [f"Lowest mean loss: {best}."]
    if alike:
        parts.append(f"Not distinguishable from it with these seeds: {', '.join(alike)}.")
    if higher:
        tests = f"{len(several) - 1} tests"
        parts.append(f"Significantly higher (p < {SIGNIFICANT:g}, {tests}): {', '.join(higher)}.")
    return " ".join(parts)


def _of_residuals(
    folder: Path, output: Path, plan: dict[str, Any], cells: list[Cell]
) -> tuple[list[str], list[ReportFigure]]:
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    header = ("method", "best rate", "loss", "dead there", "valley", "dies at")
    parts = []
    for setting in settings:
        own = sorted((c for c in cells if c.setting == setting), key=lambda c: mean(c.losses) if c.losses else np.inf)
        parts += [markdown_table(setting, header, [_residual_row(cell) for cell in own]), comparison(own)]
    parts.append(f"The valley holds the rates whose loss is at most {VALLEY:g} × the lowest, with the first seed.")
    panels = []
    for setting in settings:
        own = [cell for cell in cells if cell.setting == setting]
        for title, label, of in (
            ("validation loss", "loss", lambda ending: ending.loss),
            ("share of seeds that die", "share", lambda ending: float(not ending.alive)),
            ("token cosine of the deep blocks", "cosine", lambda ending: ending.cosine),
        ):
            curves = [_by_rate(cell, plan["lr"], of, share=label == "share") for cell in own]
            name = f"{setting}: {title}"
            panels.append(Panel(name, label, curves, x_label="learning rate", log_x=True, dots=True))
    path, title = output / "rates.png", "Loss and deaths by learning rate"
    save_curves(path, title, panels, size=(5.0, 3.6))
    caption = "Lines: mean over the seeds at that rate; ×: the lowest rate above the best at which the method dies."
    return parts, [ReportFigure(path, title, caption)]


def _residual_row(cell: Cell) -> list[str]:
    best, failure, valley = cell.best_rate, cell.first_failure, cell.valley
    return [
        cell.method,
        "none lives" if best is None else f"× {best:g}{EDGE * cell.at_edge}",
        cell_text(cell.losses),
        died_text(cell),
        f"× {', '.join(f'{rate:g}' for rate in valley)}" if valley else "–",
        f"× {failure[0]:g}: {failure[1].failure}" if failure else "no rate tried",
    ]


def _by_rate(cell: Cell, lr: float, of: Any, share: bool) -> Curve:
    rates = sorted(cell.endings)
    values = np.full((len(cell.seeds), len(rates)), np.nan)
    for column, rate in enumerate(rates):
        for row, seed in enumerate(cell.seeds):
            if seed in cell.endings[rate]:
                values[row, column] = of(cell.endings[rate][seed])
    if share:
        values = np.nanmean(values, axis=0, keepdims=True)
    failure = cell.first_failure
    marked = failure is not None and np.isfinite(values[:, rates.index(failure[0])]).any()
    return Curve(cell.method, lr * np.array(rates), values, lr * failure[0] if failure and marked else None)


def _of_depth(
    folder: Path, output: Path, plan: dict[str, Any], cells: list[Cell]
) -> tuple[list[str], list[ReportFigure]]:
    kinds = {f"At equal steps ({plan['steps']})": [cell for cell in cells if cell.source is None]}
    if anchor := plan["equal_compute"]:
        own = [cell for cell in cells if cell.source is not None or cell.size[0] == anchor]
        kinds[f"At equal compute (blocks × steps of {anchor} blocks)"] = own
    header = ("method", "blocks", "steps", "rate", "dead", "loss", *METRICS.values())
    parts = []
    for title, own in kinds.items():
        own.sort(key=lambda cell: (list(plan["methods"]).index(cell.method), cell.size[0]))
        if not own:
            continue
        shown = [cell for cell in own if cell.at_best()]
        parts.append(markdown_table(title, header, [_depth_row(cell, plan) for cell in shown]))
        parts.append("\n".join(f"- {line}" for line in _trends(own, list(plan["methods"]))))
    return parts, _depth_figures(folder, output, plan, kinds)


def _depth_row(cell: Cell, plan: dict[str, Any]) -> list[str]:
    lives = cell.best_rate is not None or cell.source is not None
    rate = f"× {cell.reported_rate:g}{EDGE * cell.at_edge}" if lives else "none lives"
    metrics = [_mean_text(cell.values(name)) for name in METRICS]
    return [cell.method, f"{cell.size[0]}", f"{cell.size[1]}", rate, died_text(cell),
            _mean_text(cell.losses), *metrics]  # fmt: skip


def _mean_text(values: Sequence[float]) -> str:
    """`0.523 ± 0.012`, three digits; – without values."""
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.3g}{spread}"


def _trends(cells: Sequence[Cell], methods: Sequence[str]) -> list[str]:
    """A sentence for each method and metric: how it changes from each depth to the next."""
    lines = []
    for method in methods:
        own = [cell for cell in cells if cell.method == method]
        for metric, direction in BETTER.items():
            by_depth = {cell.size[0]: cell.values(metric) for cell in own if len(cell.values(metric)) > 1}
            if len(by_depth) > 1:
                lines.append(f"{method}, {METRICS.get(metric, 'loss')}: {trend(by_depth, direction)}.")
    return lines


def trend(by_depth: dict[int, list[float]], direction: int) -> str:
    """How a metric changes from each depth to the next, and whether it improves throughout.

    Args:
        by_depth: values of several seeds by depth, rising.
        direction: 1 if higher is better, −1 if lower is.
    """
    words, improves = [], True
    for (less, before), (more, after) in pairwise(by_depth.items()):
        p = p_value(before, after)
        if p >= SIGNIFICANT:
            word, improves = "no significant change", False
        elif (mean(after) - mean(before)) * direction > 0:
            word = "better"
        else:
            word, improves = "worse", False
        words.append(f"{less} → {more} blocks {word} (p = {p:.2g})")
    return f"{'improves' if improves else 'does not improve'} with every increase in depth: {', '.join(words)}"


def _depth_figures(
    folder: Path, output: Path, plan: dict[str, Any], kinds: dict[str, list[Cell]]
) -> list[ReportFigure]:
    panels = []
    for title, cells in kinds.items():
        for metric, label in (("", "loss"), ("sample/fid", "FID"), ("sample/recognised", "recognised")):
            curves = [_over(cells, method, metric) for method in plan["methods"]]
            name = f"{title.partition(' (')[0]}: {label}"
            panels.append(
                Panel(name, label, curves, log=metric == "sample/fid", x_label="blocks", log_x=True, dots=True)
            )
    path, title = output / "depth.png", "Quality against depth"
    save_curves(path, title, panels)
    figures = [ReportFigure(path, title, "Lines: mean over the seeds that live. Bands: lowest to highest seed.")]
    every = [cell for cells in kinds.values() for cell in cells]
    by_cost = [_over(kinds[next(iter(kinds))], method, "sample/fid", "sample/seconds") for method in plan["methods"]]
    panels = [
        Panel("Training loss against compute, best rate of the first method", "loss", _losses(folder, plan, every),
              x_label="blocks × steps", log_x=True, log=True),
    ]  # fmt: skip
    path, title = output / "compute.png", "Loss against training compute, by depth"
    save_curves(path, title, panels, columns=1, size=(7.0, 4.0))
    figures.append(ReportFigure(path, title, f"One seed of each; the loss is the mean of the last {SMOOTH} steps."))
    path, title = output / "cost.png", "FID against seconds per sample, by depth"
    panel = Panel(title, "FID", by_cost, x_label="seconds per sample", log=True, log_x=True, dots=True)
    save_curves(path, title, [panel], columns=1, size=(7.0, 4.0))
    figures.append(ReportFigure(path, title, "At equal steps; each point is a depth, as measured in these runs."))
    return figures


def _over(cells: Sequence[Cell], method: str, metric: str, x_metric: str | None = None) -> Curve:
    """A metric by depth, or by the mean of another metric."""
    own = [cell for cell in cells if cell.method == method and cell.values(metric)]  # by rising depth
    x = [mean(cell.values(x_metric)) if x_metric else float(cell.size[0]) for cell in own]
    values = np.full((max((len(cell.values(metric)) for cell in own), default=1), len(own)), np.nan)
    for column, cell in enumerate(own):
        values[: len(cell.values(metric)), column] = cell.values(metric)
    return Curve(method, np.array(x), values)


def _losses(folder: Path, plan: dict[str, Any], cells: Sequence[Cell]) -> list[Curve]:
    """Training losses by compute: the longest run of each depth."""
    method, curves = next(iter(plan["methods"])), {}
    for cell in sorted((c for c in cells if c.method == method and c.at_best()), key=lambda c: c.size[1]):
        rate = cell.reported_rate
        assert rate is not None
        seed = next(seed for seed in cell.seeds if seed in cell.endings[rate])
        try:
            run = read_run(folder / cell.setting / method / rate_name(rate) / f"seed_{seed}")
        except UserError:
            continue  # stopped before its first row
        compute = (run.trace["step"] + 1) * cell.size[0]
        curve = together([(compute, running_mean(run.trace["loss"], SMOOTH))])
        curves[cell.size[0]] = Curve(f"{cell.size[0]} blocks", *curve)
    return [curves[depth] for depth in sorted(curves)]
