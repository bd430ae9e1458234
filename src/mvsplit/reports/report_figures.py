"""The figures of a report, and how their arrays are computed from the runs' tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvsplit.reports.verdicts import GroupSummary, running_mean
from mvsplit.stability.by_depth import DEPTH, Quantity, column, grid
from mvsplit.stability.plotting import Curve, HeatMap, Panel, Scatter, save_curves, save_heatmaps, save_law


@dataclass(frozen=True)
class ReportFigure:
    """A figure's file and its caption."""

    path: Path
    title: str
    caption: str


def together(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge several `(x, y)` into one x and `(curves, x)`; NaN where a curve lacks an x."""
    x = np.unique(np.concatenate([one for one, _ in curves]))
    out = np.full((len(curves), len(x)), np.nan)
    for row, (one, y) in zip(out, curves, strict=True):
        row[np.searchsorted(x, one)] = y
    return x, out


def draw_all(
    output: Path, sections: Sequence[tuple[str, Sequence[GroupSummary]]], every: Sequence[GroupSummary]
) -> list[ReportFigure]:
    """Draw curves, profiles and the probe of t for each section, maps and law for all groups together."""
    figures = []
    for number, (question, members) in enumerate(sections):
        if len(members) == 1 and len(sections) > 1:
            continue  # the baseline alone, which is in all other sections
        tail = f"_{number + 1}_{re.sub(r'[^a-z0-9]+', '_', question.lower()).strip('_')[:40]}" if question else ""
        of = f": {question}" if question else ""
        figures += _curves(output / f"curves{tail}.png", of, members)
        figures += _profiles(output / f"profiles{tail}.png", of, members)
        figures += _time_probe(output / f"time_probe{tail}.png", of, members)
    for quantity in DEPTH:
        figures += _maps(output / f"depth_{quantity.name}.png", quantity, every)
    return figures + _law(output / "amplification.png", every)


def _curves(path: Path, of: str, groups: Sequence[GroupSummary]) -> list[ReportFigure]:
    longest = max(len(run.trace["step"]) for s in groups for run in s.group.runs)
    width = max(10, longest // 100)

    def curves(name: str, marked: bool = True) -> list[Curve]:
        made = []
        for s in groups:
            rows = [(run.trace["step"], running_mean(run.trace[name], width) if name == "loss" else run.trace[name])
                    for run in s.group.runs]  # fmt: skip
            event = float(np.median(s.collapse_steps)) if marked and s.collapse_steps else None
            made.append(Curve(s.group.label, *together(rows), event))
        return made

    panels = [
        Panel("Training loss", f"loss (mean of the last {width} steps)", curves("loss")),
        Panel("Gradient norm, before clipping", "‖∇‖", curves("grad_norm"), log=True),
        Panel("Mean over centred energy, deep blocks", "ρ", curves("rho"), log=True),
        Panel("Token cosine similarity, deep blocks", "mean cosine of two tokens", curves("token_cosine")),
        Panel("Gradients of Q (lines) and K (dashed), deep blocks", "‖∂L/∂W‖", curves("q_grad"),
              curves("k_grad", False), log=True),
        Panel("Writer gradients: G_mean (lines), G_ctr (dashed)", "Frobenius norm", curves("g_mean"),
              curves("g_ctr", False), log=True),
    ]  # fmt: skip
    title = f"Training curves{of}"
    save_curves(path, title, panels)
    caption = "Lines: mean over seeds (geometric on logarithmic axes). Bands: lowest to highest seed. ×: median"
    return [ReportFigure(path, title, f"{caption} collapse step. Only the loss is smoothed.")]


def _profiles(path: Path, of: str, groups: Sequence[GroupSummary]) -> list[ReportFigure]:
    panels = []
    for quantity in DEPTH:
        for name, share in (("first", 0.0), ("middle", 0.5), ("last", 1.0)):
            curves, at = [], set()
            for s in groups:
                rows = []
                for run in (run for run in s.group.runs if run.depth):
                    steps, blocks, values = grid(run.depth, quantity.of(run.depth))
                    place = int(share * (len(steps) - 1))
                    at.add(int(steps[place]))
                    rows.append((blocks, values[place]))
                if rows:
                    curves.append(Curve(s.group.label, *together(rows)))
            step = f", step {min(at)}" if len(at) == 1 else f", steps {min(at)} to {max(at)}" if at else ""
            panels.append(Panel(f"{quantity.title}\n{name} probe{step}", quantity.label, curves, log=quantity.log,
                                x_label="block"))  # fmt: skip
    if not any(panel.curves for panel in panels):
        return []
    title = f"Profiles over depth{of}"
    save_curves(path, title, panels, same_rows=True)
    caption = "The same quantities as in the maps, by block: mean over seeds, and a band from lowest to highest. The"
    return [ReportFigure(path, title, f"{caption} panels of a row have the same scale.")]


def _time_probe(path: Path, of: str, groups: Sequence[GroupSummary]) -> list[ReportFigure]:
    curves = []
    for s in groups:
        probes = [run.time_probe for run in s.group.runs if run.time_probe]
        last = [(probe, probe["step"] == probe["step"][-1]) for probe in probes]
        if last:
            curves.append(Curve(s.group.label, *together([(t["block"][at], column(t, "r2")[at]) for t, at in last])))
    if not curves:
        return []
    title = f"Reading t from the mean of the image tokens{of}"
    panel = Panel("Linear probe at each run's last validation", "R² of the time t", curves, x_label="block")
    save_curves(path, title, [panel], columns=1, size=(6.4, 4.0))
    caption = "R² near 1: t, which is not an input of the network, can be read from a block's token mean."
    return [ReportFigure(path, title, caption)]


def _maps(path: Path, quantity: Quantity, groups: Sequence[GroupSummary]) -> list[ReportFigure]:
    first = {s.group.label: run.depth for s in groups for run in reversed(s.group.runs) if run.depth}
    maps = [HeatMap(label, *grid(depth, quantity.of(depth))) for label, depth in first.items()]
    if not maps:
        return []
    title = f"{quantity.title}, by step and block"
    save_heatmaps(path, title, maps, quantity.label, quantity.log)
    caption = f"{quantity.reading} First seed of each group. Grey: not finite or not measured."
    return [ReportFigure(path, title, caption)]


def _law(path: Path, groups: Sequence[GroupSummary]) -> list[ReportFigure]:
    panels = []
    for writer, name in (("attention", "Attention's writer W_O"), ("ffn", "FFN's writer W_2")):
        x, y, late = [], [], []
        for s in groups:
            for run, summary in zip(s.group.runs, s.runs, strict=True):
                if run.depth:
                    x.append(column(run.depth, f"alignment_{writer}"))
                    y.append(column(run.depth, f"amplification_{writer}") - 1)
                    late.append(run.depth["step"] >= (np.inf if summary.event is None else summary.event))
        if x and np.isfinite(np.concatenate(y)).any():
            panels.append(Scatter(name, np.concatenate(x), np.concatenate(y), np.concatenate(late)))
    if not panels:
        return []
    title = "Amplification of the writers' gradients against the tokens' alignment (paper eq. 6)"
    save_law(path, title, panels)
    caption = (
        "Each point is a block at a probed step of any run. The law is A − 1 = (T − 1)·κ̂. Slopes are least-squares fits"
        " through the origin on a linear scale, so large values have the most weight. R² is 1 − residual/variance."
    )
    return [ReportFigure(path, title, caption)]
