"""Pictures of what was measured: from arrays to PNG files, or to arrays for TensorBoard.

Colours are those of Okabe and Ito and of viridis, which colour-blind readers can tell apart. Figures are drawn through
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
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
MARKS = ("", "o", "s", "^", "D")
NAMED = 14
"""Lines that a legend names in full; where there are more, it numbers them."""
GREY = "#BDBDBD"
SMALL = 8
POINTS = 20_000
"""Of more points in one colour than these, only every second, third, … is drawn."""
DECADES = 12
"""Colours of a logarithmic scale span no more than so many powers of ten below the highest value."""


@dataclass(frozen=True)
class Curve:
    """One group's values: `(seeds, n)` over `x` `(n,)`; NaN where nothing was measured. `event`: where to put a ×."""

    label: str
    x: np.ndarray
    values: np.ndarray
    event: float | None = None


@dataclass(frozen=True)
class Panel:
    """Curves in one frame; `dashed` are those of a second quantity, in the colours of the same labels."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    dashed: Sequence[Curve] = ()
    log: bool = False
    x_label: str = "step"


@dataclass(frozen=True)
class HeatMap:
    """Values `(steps, blocks)`."""

    title: str
    steps: np.ndarray
    blocks: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Scatter:
    """Points of the amplification law at one writer: `x` = (T−1)·κ̂, `y` = A − 1; `event` marks those from it on."""

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
        same_rows: the frames of a row have one scale and those of a column one x, labelled at the edges.
        size: of a frame, inches.
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
    _save(figure, path, title)


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
            middle = np.exp(np.nanmean(np.log(values), axis=0)) if panel.log else np.nanmean(values, axis=0)
            axes.plot(x, middle, linestyle=line_style, linewidth=1.4 if line_style == "-" else 1.0, **style)
            if len(values) > 1 and line_style == "-":
                low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
                axes.fill_between(
                    x, low, high, color=style["color"], alpha=0.18 if len(labels) <= len(COLOURS) else 0.07, linewidth=0
                )
            if curve.event is not None:
                at = int(np.abs(x - curve.event).argmin())
                axes.plot(x[at], middle[at], "x", color=style["color"], markersize=7, markeredgewidth=2, zorder=5)
    if panel.log and drawn:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    _frame(axes, panel.title, panel.x_label, panel.y_label, drawn)


def _log_ticks(axis: Axis) -> None:
    low, high = sorted(axis.get_view_interval())
    if high < 4 * low:  # too little for the ticks of a logarithmic axis
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    elif high < 20 * low:  # 2 × 10⁰ is hard to read
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
    elif high > 1e4 * low:
        axis.set_minor_locator(NullLocator())  # hundreds of ticks take seconds


def save_heatmaps(path: Path, title: str, maps: Sequence[HeatMap], label: str, log: bool = False) -> None:
    """One small map per group, step across and block upwards, all with the same colours; grey: not finite."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(3.1 * columns + 1.2, 2.5 * rows + 0.6), layout="constrained")
    norm, extend = _norm([one.values for one in maps], log)
    drawn = []
    for place, one in enumerate(maps):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw_map(axes, one, norm)
        drawn.append(axes)
        _frame(axes, one.title, "step" if place + columns >= len(maps) else "", "" if place % columns else "block",
               bool(np.isfinite(one.values).any()), grid=False)  # fmt: skip
    bar = figure.colorbar(drawn[0].images[0], ax=drawn, extend=extend, aspect=25 * rows, pad=0.02)
    bar.set_label(label, fontsize=SMALL + 1)
    _bar_ticks(bar, norm)
    _save(figure, path, title)


def _bar_ticks(bar: Colorbar, norm: Normalize) -> None:
    if isinstance(norm, LogNorm):
        _log_ticks(bar.ax.yaxis)
    bar.ax.tick_params(which="both", labelsize=SMALL)


def draw_map(axes: Axes, one: HeatMap, norm: Normalize, pixels: int = 400) -> None:
    """A heat map as an image of at most so many cells each way: the nearest measured one for each."""
    steps, blocks = one.steps, one.blocks
    across, (left, right) = _nearest(steps, pixels)
    up, (low, high) = _nearest(blocks, pixels)
    values = one.values[np.ix_(across, up)].T
    axes.imshow(_shown(values, norm), norm=norm, cmap=_colours(), origin="lower", aspect="auto",
                interpolation="nearest", extent=(left, right, low, high))  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A line through the origin. `r2` is 1 − residual / variance about the mean: below 0 if a constant does better."""

    slope: float
    r2: float
    count: int


def fit_through_origin(x: np.ndarray, y: np.ndarray) -> Fit:
    """Least squares on the values as they are; pairs that are not finite are left out."""
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 2 or not (x**2).sum():
        return Fit(math.nan, math.nan, len(x))
    slope = float((x * y).sum() / (x**2).sum())
    variance = float(((y - y.mean()) ** 2).sum())
    return Fit(slope, 1 - float(((y - slope * x) ** 2).sum()) / variance if variance else math.nan, len(x))


def save_law(path: Path, title: str, panels: Sequence[Scatter]) -> None:
    """The amplification law (paper eq. 6) on logarithmic axes; slopes are least squares through the origin."""
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    for place, one in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        shown = (one.x > 0) & (one.y > 0)
        for mask, colour, name in (
            (~one.event, COLOURS[0], "before, or no event"),
            (one.event, COLOURS[3], "from it on"),
        ):
            fit = fit_through_origin(one.x[mask], one.y[mask])
            text = f"{name}: no points" if not fit.count else (
                f"{name}: slope {fit.slope:.3g}, R² {fit.r2:.3g} (n = {fit.count})")  # fmt: skip
            some = np.flatnonzero(mask & shown)
            some = some[:: len(some) // POINTS + 1]
            axes.plot(one.x[some], one.y[some], "o", color=colour, markersize=3, alpha=0.45,
                      markeredgewidth=0, label=text)  # fmt: skip
        if shown.any():
            ends = np.array([one.x[shown].min(), one.x[shown].max()])
            slope = fit_through_origin(one.x, one.y).slope
            axes.plot(ends, ends, color="#666666", linestyle="--", linewidth=1, label="the law: slope 1")
            axes.plot(ends, slope * ends, color="#000000", linewidth=1.2, label=f"fit of all: slope {slope:.3g}")
            axes.set(xscale="log", yscale="log")
        hidden = int((np.isfinite(one.x) & np.isfinite(one.y) & ~shown).sum())
        title_ = f"{one.title} ({hidden} points ≤ 0 not shown, but fitted)" if hidden else one.title
        _frame(axes, title_, "(T − 1)·κ̂  (alignment)", "A − 1  (amplification)", bool(shown.any()))
        axes.legend(fontsize=SMALL, loc="upper left", frameon=True, framealpha=0.9, markerscale=2)
    _save(figure, path, title)


def heatmap_image(values: np.ndarray, steps: np.ndarray, blocks: np.ndarray, label: str, log: bool) -> np.ndarray:
    """A heat map of values `(steps, blocks)` for TensorBoard: `(3, H, W)` uint8."""
    figure = Figure(figsize=(5.0, 3.4), dpi=100)
    axes = figure.add_axes((0.12, 0.14, 0.68, 0.76))
    norm, extend = _norm([values], log)
    draw_map(axes, HeatMap(label, steps, blocks, values), norm)
    _frame(axes, label, "step", "block", bool(np.isfinite(values).any()), grid=False)
    bar = figure.colorbar(axes.images[0], cax=figure.add_axes((0.83, 0.14, 0.035, 0.76)), extend=extend)
    _bar_ticks(bar, norm)
    return _pixels(figure)


def profile_image(values: np.ndarray, steps: np.ndarray, blocks: np.ndarray, label: str, log: bool) -> np.ndarray:
    """The same values against the block, at the first, middle and last step: `(3, H, W)` uint8."""
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


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _style(place: int, points: int = 0) -> dict[str, Any]:
    """Colour and, from the ninth line on, a mark beside it."""
    mark, every = MARKS[place // len(COLOURS) % len(MARKS)], max(1, points // 8)
    return {"color": COLOURS[place % len(COLOURS)], "marker": mark, "markersize": 4,
            "markevery": (place * every // 16 % every, every)}  # fmt: skip


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    numbered = len(labels) > NAMED
    names = [f"{n + 1}" if numbered else textwrap.fill(label, 34) for n, label in enumerate(labels)]
    handles = [Line2D([], [], linewidth=2, label=name, **_style(n)) for n, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=SMALL + 1, frameon=False,
                  title="line of the table" if numbered else None)  # fmt: skip


def _frame(axes: Axes, title: str, x_label: str, y_label: str, drawn: bool, grid: bool = True) -> None:
    axes.set_title(
        "\n".join(textwrap.fill(line, 52 if grid else 38) for line in title.splitlines()), fontsize=SMALL + 1
    )
    axes.set_xlabel(x_label, fontsize=SMALL + 1)
    axes.set_ylabel(y_label, fontsize=SMALL + 1)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(True, color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)
    if not drawn:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#666666")


def _colours() -> Colormap:
    return colormaps["viridis"].with_extremes(bad=GREY)


def _norm(maps: Sequence[np.ndarray], log: bool) -> tuple[Normalize, str]:
    """One scale for all, and at which end values lie beyond it."""
    values = np.concatenate([one[np.isfinite(one)] for one in maps])
    usable = values[values > 0] if log else values
    if not len(usable):
        return Normalize(0, 1), "neither"
    low, high = float(usable.min()), float(usable.max())
    if not log:
        return Normalize(low, high if high > low else low + 1), "neither"
    floor = max(low, high * 10.0**-DECADES)
    return LogNorm(floor, high if high > floor else floor * 10), "min" if float(values.min()) < floor else "neither"


def _shown(values: np.ndarray, norm: Normalize) -> np.ma.MaskedArray:
    """What is not finite is masked; a zero on a logarithmic scale is low, not missing."""
    values = np.ma.masked_invalid(values)
    return np.ma.maximum(values, float(norm.vmin or 0)) if isinstance(norm, LogNorm) else values


def _nearest(places: np.ndarray, pixels: int) -> tuple[np.ndarray, tuple[float, float]]:
    """For each pixel the index of the nearest place, and where the first and last pixel begin and end."""
    if len(places) == 1:
        return np.zeros(1, dtype=int), (float(places[0]) - 0.5, float(places[0]) + 0.5)
    middles = (places[1:] + places[:-1]) / 2
    low, high = float(2 * places[0] - middles[0]), float(2 * places[-1] - middles[-1])
    at = low + (np.arange(pixels) + 0.5) * (high - low) / pixels
    return np.searchsorted(middles, at), (low, high)
