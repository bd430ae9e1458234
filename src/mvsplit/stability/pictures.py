"""Which figures a report has, and how their arrays come out of the runs' tables."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvsplit.stability.figures import Curve, HeatMap, Panel, Scatter, save_curves, save_heatmaps, save_law
from mvsplit.stability.outcomes import Judged, running_mean
from mvsplit.stability.runs import Run
from mvsplit.stability.traces import Table


@dataclass(frozen=True)
class Picture:
    """A figure's file, and a line that helps to read it."""

    path: Path
    title: str
    reading: str


@dataclass(frozen=True)
class Quantity:
    """Something in `depth.csv`: how it comes out of the table, and how it is drawn."""

    name: str
    title: str
    label: str
    log: bool
    of: Callable[[Table], np.ndarray]
    reading: str


def column(table: Table, name: str) -> np.ndarray:
    return table.get(name, np.full(len(table["step"]), np.nan))


def _both_writers(table: Table, name: str) -> np.ndarray:
    """Root sum of squares over the attention's and the FFN's writer; NaN where neither is measured."""
    parts = np.stack([column(table, f"{name}_{writer}") for writer in ("attention", "ffn")])
    return np.where(np.isfinite(parts).any(axis=0), np.sqrt(np.nansum(parts**2, axis=0)), np.nan)


def g_ratio(table: Table) -> np.ndarray:
    """G_mean/G_ctr over both writers of a block."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return _both_writers(table, "g_mean") / _both_writers(table, "g_ctr")


DEPTH = (
    Quantity("rho", "Mean over centred energy", "ρ = ‖JX‖ / ‖PX‖", True, lambda t: column(t, "rho"),
             "Where ρ is high, all tokens of a sample are nearly their mean. A collapse shows as a change of colour"
             " from one step on."),
    Quantity("token_cosine", "Token cosine similarity", "mean cosine of two tokens", False,
             lambda t: column(t, "token_cosine"), "At 1 a block's tokens all point the same way."),
    Quantity("g_ratio", "Writer gradients, G_mean over G_ctr", "G_mean / G_ctr", True, g_ratio,
             "Above 1, what all tokens share outweighs what they differ in, in the gradient of W_O and W_2 (eq. 5)."),
    Quantity("q_grad", "Gradient of the query projections", "‖∂L/∂W_Q‖", True, lambda t: column(t, "q_grad"),
             "Dark from some step on: attention no longer learns."),
)  # fmt: skip


def grid(table: Table, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, blocks, and the values as `(steps, blocks)`; NaN where there is no row."""
    steps, row = np.unique(table["step"], return_inverse=True)
    blocks, place = np.unique(table["block"], return_inverse=True)
    out = np.full((len(steps), len(blocks)), np.nan)
    out[row, place] = values
    return steps, blocks, out


def together(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Several `(x, y)` as one x and `(curves, x)`; NaN where a curve has no such x."""
    x = np.unique(np.concatenate([one for one, _ in curves]))
    out = np.full((len(curves), len(x)), np.nan)
    for row, (one, y) in zip(out, curves, strict=True):
        row[np.searchsorted(x, one)] = y
    return x, out


def draw_all(output: Path, sets: Sequence[tuple[str, Sequence[Judged]]], judged: Sequence[Judged]) -> list[Picture]:
    """Draw curves, profiles and the probe of t for each set of groups, maps and law for all groups together."""
    pictures = []
    for number, (question, members) in enumerate(sets):
        if len(members) == 1 and len(sets) > 1:
            continue  # the baseline by itself: it stands in all others
        tail = f"_{number + 1}_{re.sub(r'[^a-z0-9]+', '_', question.lower()).strip('_')[:40]}" if question else ""
        of = f": {question}" if question else ""
        pictures += _curves(output / f"curves{tail}.png", of, members)
        pictures += _profiles(output / f"profiles{tail}.png", of, members)
        pictures += _time_probe(output / f"time_probe{tail}.png", of, members)
    for quantity in DEPTH:
        pictures += _maps(output / f"depth_{quantity.name}.png", quantity, judged)
    return pictures + _law(output / "amplification.png", judged)


def _curves(path: Path, of: str, judged: Sequence[Judged]) -> list[Picture]:
    longest = max(len(run.trace["step"]) for j in judged for run in j.group.runs)
    width = max(10, longest // 100)

    def curves(name: str, marked: bool = True) -> list[Curve]:
        made = []
        for j in judged:
            events = [o.event for o in j.outcomes if o.event is not None]
            rows = [(run.trace["step"], running_mean(run.trace[name], width) if name == "loss" else run.trace[name])
                    for run in j.group.runs]  # fmt: skip
            made.append(Curve(j.group.label, *together(rows), float(np.median(events)) if events and marked else None))
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
    title = f"Courses of training{of}"
    save_curves(path, title, panels)
    return [Picture(path, title, "Lines: mean over seeds (geometric on logarithmic axes); bands: lowest to highest"
                    " seed; ×: the median step of the collapse. Only the loss is smoothed.")]  # fmt: skip


def _profiles(path: Path, of: str, judged: Sequence[Judged]) -> list[Picture]:
    when = (("first", 0.0), ("middle", 0.5), ("last", 1.0))
    panels = []
    for quantity in DEPTH:
        for name, share in when:
            curves, at = [], set()
            for j in judged:
                rows = []
                for run in (run for run in j.group.runs if len(run.depth.get("step", ()))):
                    steps, blocks, values = grid(run.depth, quantity.of(run.depth))
                    place = int(share * (len(steps) - 1))
                    at.add(int(steps[place]))
                    rows.append((blocks, values[place]))
                if rows:
                    curves.append(Curve(j.group.label, *together(rows)))
            step = f", step {min(at)}" if len(at) == 1 else f", steps {min(at)} to {max(at)}" if at else ""
            panels.append(Panel(f"{quantity.title}\n{name} probe{step}", quantity.label, curves, log=quantity.log,
                                x_label="block"))  # fmt: skip
    if not any(panel.curves for panel in panels):
        return []
    title = f"Profiles over depth{of}"
    save_curves(path, title, panels, same_rows=True)
    return [Picture(path, title, "The same quantities as in the maps, against the block: mean over seeds, and band from"
                    " lowest to highest; scales are the same along a row.")]  # fmt: skip


def _time_probe(path: Path, of: str, judged: Sequence[Judged]) -> list[Picture]:
    curves = []
    for j in judged:
        tables = [run.time_probe for run in j.group.runs if len(run.time_probe.get("step", ()))]
        if tables:
            last = [
                (t["block"][t["step"] == t["step"][-1]], column(t, "r2")[t["step"] == t["step"][-1]]) for t in tables
            ]
            curves.append(Curve(j.group.label, *together(last)))
    if not curves:
        return []
    title = f"Reading t from the mean of the image tokens{of}"
    panel = Panel("Linear probe at each run's last validation", "R² of the time t", curves, x_label="block")
    save_curves(path, title, [panel], columns=1, size=(6.4, 4.0))
    return [Picture(path, title, "Near 1, a block's token mean says how noisy the input is; the network is not told.")]


def _first_with_depth(j: Judged) -> Run | None:
    return next((run for run in j.group.runs if len(run.depth.get("step", ()))), None)


def _maps(path: Path, quantity: Quantity, judged: Sequence[Judged]) -> list[Picture]:
    runs = [(j.group.label, run) for j in judged if (run := _first_with_depth(j)) is not None]
    if not runs:
        return []
    maps = [HeatMap(label, *grid(run.depth, quantity.of(run.depth))) for label, run in runs]
    title = f"{quantity.title}, by step and block"
    save_heatmaps(path, title, maps, quantity.label, quantity.log)
    return [Picture(path, title, f"{quantity.reading} First seed of each group; grey: not finite, or not measured.")]


def _law(path: Path, judged: Sequence[Judged]) -> list[Picture]:
    panels = []
    for writer, name in (("attention", "Attention's writer W_O"), ("ffn", "FFN's writer W_2")):
        x, y, late = [], [], []
        for j in judged:
            for run, outcome in zip(j.group.runs, j.outcomes, strict=True):
                if run.depth:
                    x.append(column(run.depth, f"alignment_{writer}"))
                    y.append(column(run.depth, f"amplification_{writer}") - 1)
                    late.append(run.depth["step"] >= (np.inf if outcome.event is None else outcome.event))
        if x and np.isfinite(np.concatenate(y)).any():
            panels.append(Scatter(name, np.concatenate(x), np.concatenate(y), np.concatenate(late)))
    if not panels:
        return []
    title = "Amplification of the writers' gradients against the tokens' alignment (paper eq. 6)"
    save_law(path, title, panels)
    return [Picture(path, title, "Each point is a block at a probed step, of any run. The law says A − 1 = (T − 1)·κ̂."
                    " Slopes are least squares through the origin on the values as they are, so the largest weigh most;"
                    " R² is 1 − residual/variance.")]  # fmt: skip
