"""Figures of the measurements: from arrays to PNG files, or to arrays for TensorBoard.

The colours, those of Okabe and Ito and viridis, are distinct for colour-blind readers. Figures are drawn through
matplotlib's objects, without pyplot, whose global state a training process must not share.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
MARKS = ("", "o", "s", "^", "D")
NAMED = 16
"""Lines that a legend names in full; more are numbered."""
GREY = "#BDBDBD"
COLOUR_MAP = colormaps["viridis"].with_extremes(bad=GREY)
SMALL = 8
POINTS = 20_000
"""Points drawn in one colour; of more, only every second, third, … is drawn."""
DECADES = 12
"""Powers of ten below the highest value that the colours of a logarithmic scale span at most."""


@dataclass(frozen=True)
class Curve:
    """One group's values: `(seeds, n)` over `x` `(n,)`; NaN: not measured. `event`: position of a ×."""

    label: str
    x: np.ndarray
    values: np.ndarray
    event: float | None = None


@dataclass(frozen=True)
class Panel:
    """Curves in one frame; `dashed`: curves of a second quantity, in the colours of the same labels.

    `log` and `log_x`: logarithmic axes. `dots`: mark each value.
    """

    title: str
    y_label: str
    curves: Sequence[Curve]
    dashed: Sequence[Curve] = ()
    log: bool = False
    x_label: str = "step"
    log_x: bool = False
    dots: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values `(steps, blocks)`."""

    title: str
    steps: np.ndarray
    blocks: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Scatter:
    """Points of the amplification law at one writer: `x` = (T−1)·κ̂, `y` = A − 1. `event`: since the collapse."""

    title: str
    x: np.ndarray
    y: np.ndarray
    event: np.ndarray


def save_curves(
    path: Path,
    title: str,
    panels: Sequence[Panel],
    columns: int = 3,
    same_rows: bool = False,
    size: tuple[float, float] = (4.2, 3.1),
) -> None:
    """Frames side by side: mean over seeds as a line, lowest to highest as a band; one legend for all.

    Args:
        same_rows: share the y scale in each row, and label only the outer axes.
        size: of a frame, in inches.
    """
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(size[0] * columns + 2.2, size[1] * rows + 0.4), layout="constrained")
    for place, panel in enumerate(panels):
        first = figure.axes[place - place % columns] if same_rows and place % columns else None
        axes = figure.add_subplot(rows, columns, place + 1, sharey=first)
        draw_panel(axes, panel, labels)
        if same_rows:
            axes.label_outer()
    _legend(figure, labels)
    save_figure(figure, path, title)


def draw_panel(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    """Draw the curves of one frame; a label's place in `labels` gives its colour."""
    drawn = False
    for curves, line_style in ((panel.curves, "-"), (panel.dashed, (0, (4, 2)))):
        for curve in curves:
            values = np.where(np.isfinite(curve.values) & ((curve.values > 0) | (not panel.log)), curve.values, np.nan)
            seen = np.isfinite(values).any(axis=0)
            if not seen.any():
                continue
            drawn = True
            x, values = curve.x[seen], values[:, seen]
            style = _style(labels.index(curve.label), len(x))
            if panel.dots:
                style |= {"marker": style["marker"] or ".", "markevery": 1}
            middle = np.exp(np.nanmean(np.log(values), axis=0)) if panel.log else np.nanmean(values, axis=0)
            axes.plot(x, middle, linestyle=line_style, linewidth=1.4 if line_style == "-" else 1.0, **style)
            if len(values) > 1 and line_style == "-":
                low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
                alpha = 0.18 if len(labels) <= len(COLOURS) else 0.07
                axes.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)
            if curve.event is not None:
                at = int(np.abs(x - curve.event).argmin())
                axes.plot(x[at], middle[at], "x", color=style["color"], markersize=7, markeredgewidth=2, zorder=5)
    if panel.log and drawn:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    if panel.log_x and drawn:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    draw_frame(axes, panel.title, panel.x_label, panel.y_label, drawn)


def log_ticks(axis: Axis) -> None:
    """Ticks that can be read, whichever range a logarithmic axis shows."""
    low, high = sorted(axis.get_view_interval())
    if high < 4 * low:  # too narrow for logarithmic ticks
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    elif high < 20 * low:  # 2 × 10⁰ is hard to read
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
    elif high > 1e4 * low:
        axis.set_minor_locator(NullLocator())  # hundreds of ticks take seconds


def save_heatmaps(path: Path, title: str, maps: Sequence[HeatMap], label: str, log: bool = False) -> None:
    """One small map per group, step by block, all on one colour scale; grey: not finite."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(3.1 * columns + 1.2, 2.5 * rows + 0.6), layout="constrained")
    norm, extend = _norm([one.values for one in maps], log)
    for place, one in enumerate(maps):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw_map(axes, one, norm)
        labels = "step" if place + columns >= len(maps) else "", "" if place % columns else "block"
        draw_frame(axes, one.title, *labels, bool(np.isfinite(one.values).any()), grid=False)
    _colour_bar(figure, norm, extend, label, ax=figure.axes, aspect=25 * rows, pad=0.02)
    save_figure(figure, path, title)


def _colour_bar(figure: Figure, norm: Normalize, extend: str, label: str = "", **place: Any) -> None:
    bar = figure.colorbar(figure.axes[0].images[0], extend=extend, **place)
    bar.set_label(label, fontsize=SMALL + 1)
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax.yaxis)
    bar.ax.tick_params(which="both", labelsize=SMALL)


def draw_map(axes: Axes, one: HeatMap, norm: Normalize, pixels: int = 400) -> None:
    """A heat map as an image of up to `pixels` cells each way, each showing the nearest measurement."""
    across, (left, right) = _nearest(one.steps, pixels)
    up, (low, high) = _nearest(one.blocks, pixels)
    values = np.ma.masked_invalid(one.values[np.ix_(across, up)].T)
    if isinstance(norm, LogNorm):  # a zero is low, not missing
        values = np.ma.maximum(values, float(norm.vmin or 0))
    axes.imshow(values, norm=norm, cmap=COLOUR_MAP, origin="lower", aspect="auto",
                interpolation="nearest", extent=(left, right, low, high))  # fmt: skip


def fit_through_origin(x: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
    """Least squares on a linear scale; ignores pairs that are not finite.

    Returns:
        Slope; R² = 1 − residual / variance about the mean, negative if a constant fits better; number of pairs.
    """
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 2 or not (x**2).sum():
        return math.nan, math.nan, len(x)
    slope = float((x * y).sum() / (x**2).sum())
    variance = float(((y - y.mean()) ** 2).sum())
    return slope, 1 - float(((y - slope * x) ** 2).sum()) / variance if variance else math.nan, len(x)


def save_law(path: Path, title: str, panels: Sequence[Scatter]) -> None:
    """The amplification law (paper eq. 6) on logarithmic axes; slopes are least squares through the origin."""
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    for place, one in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        shown = (one.x > 0) & (one.y > 0)
        for mask, colour, name in ((~one.event, COLOURS[0], "before"), (one.event, COLOURS[3], "after")):
            slope, r2, count = fit_through_origin(one.x[mask], one.y[mask])
            text = f"slope {slope:.3g}, R² {r2:.3g} (n = {count})" if count else "no points"
            some = np.flatnonzero(mask & shown)
            some = some[:: len(some) // POINTS + 1]
            dots: dict[str, Any] = {"color": colour, "markersize": 3, "alpha": 0.45, "markeredgewidth": 0}
            axes.plot(one.x[some], one.y[some], "o", label=f"{name} a collapse: {text}", **dots)
        if shown.any():
            ends = np.array([one.x[shown].min(), one.x[shown].max()])
            slope = fit_through_origin(one.x, one.y)[0]
            axes.plot(ends, ends, color="#666666", linestyle="--", linewidth=1, label="law: slope 1")
            axes.plot(ends, slope * ends, color="#000000", linewidth=1.2, label=f"fit to all: slope {slope:.3g}")
            axes.set(xscale="log", yscale="log")
        hidden = int((np.isfinite(one.x) & np.isfinite(one.y) & ~shown).sum())
        title_ = f"{one.title} ({hidden} points ≤ 0 are fitted but not shown)" if hidden else one.title
        draw_frame(axes, title_, "(T − 1)·κ̂  (alignment)", "A − 1  (amplification)", bool(shown.any()))
        axes.legend(fontsize=SMALL, loc="upper left", frameon=True, framealpha=0.9, markerscale=2)
    save_figure(figure, path, title)


def heatmap_image(values: np.ndarray, steps: np.ndarray, blocks: np.ndarray, label: str, log: bool) -> np.ndarray:
    """A heat map of values `(steps, blocks)` for TensorBoard: `(3, H, W)` uint8."""
    figure = Figure(figsize=(5.0, 3.4), dpi=100)
    axes = figure.add_axes((0.12, 0.14, 0.68, 0.76))
    norm, extend = _norm([values], log)
    draw_map(axes, HeatMap(label, steps, blocks, values), norm)
    draw_frame(axes, label, "step", "block", bool(np.isfinite(values).any()), grid=False)
    _colour_bar(figure, norm, extend, cax=figure.add_axes((0.83, 0.14, 0.035, 0.76)))
    return _pixels(figure)


def profile_image(values: np.ndarray, steps: np.ndarray, blocks: np.ndarray, label: str, log: bool) -> np.ndarray:
    """Profiles of values `(steps, blocks)` by block at the first, middle and last step: `(3, H, W)` uint8."""
    figure = Figure(figsize=(5.0, 3.4), dpi=100)
    axes = figure.add_axes((0.15, 0.14, 0.81, 0.76))
    places = dict.fromkeys((0, (len(steps) - 1) // 2, len(steps) - 1))
    curves = [Curve(f"step {steps[place]:.0f}", blocks, values[place][None]) for place in places]
    labels = [curve.label for curve in curves]
    draw_panel(axes, Panel(label, "", curves, log=log, x_label="block"), labels)
    axes.legend(handles=[Line2D([], [], label=name, **_style(n)) for n, name in enumerate(labels)], fontsize=SMALL,
                framealpha=0.8)  # fmt: skip
    return _pixels(figure)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1))


def save_figure(figure: Figure, path: Path, title: str) -> None:
    """Write a PNG with this title."""
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _style(place: int, points: int = 0) -> dict[str, Any]:
    """A colour and, from the ninth line on, a marker."""
    mark, every = MARKS[place // len(COLOURS) % len(MARKS)], max(1, points // 8)
    return {"color": COLOURS[place % len(COLOURS)], "marker": mark, "markersize": 4,
            "markevery": (place * every // 16 % every, every)}  # fmt: skip


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    numbered = len(labels) > NAMED
    names = [f"{n + 1}" if numbered else textwrap.fill(label, 34) for n, label in enumerate(labels)]
    handles = [Line2D([], [], linewidth=2, label=name, **_style(n) | {"markevery": 1}) for n, name in enumerate(names)]
    title = "line of the table" if numbered else None
    figure.legend(handles=handles, loc="outside right upper", fontsize=SMALL + 1, frameon=False, title=title)


def draw_frame(axes: Axes, title: str, x_label: str, y_label: str, drawn: bool, grid: bool = True) -> None:
    """Title, labels and grid of a frame; a line that says so if nothing is drawn in it."""
    lines = [textwrap.fill(line, 52 if grid else 38) for line in title.splitlines()]
    axes.set_title("\n".join(lines), fontsize=SMALL + 1)
    axes.set_xlabel(x_label, fontsize=SMALL + 1)
    axes.set_ylabel(y_label, fontsize=SMALL + 1)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(True, color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)
    if not drawn:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#666666")


def _norm(maps: Sequence[np.ndarray], log: bool) -> tuple[Normalize, str]:
    """A common scale, and the end at which values exceed it."""
    values = np.concatenate([one[np.isfinite(one)] for one in maps])
    usable = values[values > 0] if log else values
    if not len(usable):
        return Normalize(0, 1), "neither"
    low, high = float(usable.min()), float(usable.max())
    if not log:
        return Normalize(low, high if high > low else low + 1), "neither"
    floor = max(low, high * 10.0**-DECADES)
    return LogNorm(floor, high if high > floor else floor * 10), "min" if float(values.min()) < floor else "neither"


def _nearest(places: np.ndarray, pixels: int) -> tuple[np.ndarray, tuple[float, float]]:
    """For each pixel the index of the nearest place; and the outer edges of the first and last pixel."""
    if len(places) == 1:
        return np.zeros(1, dtype=int), (float(places[0]) - 0.5, float(places[0]) + 0.5)
    middles = (places[1:] + places[:-1]) / 2
    low, high = float(2 * places[0] - middles[0]), float(2 * places[-1] - middles[-1])
    at = low + (np.arange(pixels) + 0.5) * (high - low) / pixels
    return np.searchsorted(middles, at), (low, high)
