"""The figure of `bench.py sampling`: metrics against seconds per sample."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mvsplit.stability.plotting import COLOURS, SMALL, draw_frame, log_ticks, save_figure

SOLVER_MARKS = {"euler": "o", "heun": "s", "multistep": "^"}


def save_tradeoff(path: Path, found: dict[str, Any]) -> None:
    """FID, and the share that is recognised or else the inception score, by seconds per sample; colours by run.

    Args:
        path: of the PNG.
        found: see `TrainedNetworks.measure`.
    """
    points = found["points"]
    second = next((key for key in ("recognised", "is") if all(key in point for point in points)), None)
    metrics = {"fid": "FID (lower is better)"}
    names = {"recognised": "share recognised as its class", "is": "inception score"}
    metrics |= {second: f"{names[second]} (higher is better)"} if second else {}
    figure = Figure(figsize=(6.6 * len(metrics), 4.8), layout="constrained")
    for place, (key, label) in enumerate(metrics.items()):
        axes = figure.add_subplot(1, len(metrics), place + 1)
        _draw(axes, points, key)
        if (real := found["real"].get(f"real_{key}")) is not None:
            axes.axhline(real, color="#666666", linestyle="--", linewidth=1, label="real held-out images")
        axes.set_xscale("log")
        axes.margins(x=0.12)
        log_ticks(axes.xaxis)
        if key == "fid":
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
        draw_frame(axes, "", "seconds per sample", label, bool(points))
        axes.legend(fontsize=SMALL, framealpha=0.8)
    save_figure(figure, path, f"Quality and cost of {found['num_samples']} samples per network and sampler")


def _draw(axes: Axes, points: list[dict[str, Any]], key: str) -> None:
    runs = list(dict.fromkeys(point["run"] for point in points))
    for number, run in enumerate(runs):
        own = [point for point in points if point["run"] == run]
        colour = COLOURS[number % len(COLOURS)]
        label = f"{own[0]['depth'] or '?'} blocks, width {own[0]['width'] or '?'}, {own[0]['step']} steps"
        for point in own:
            mark = SOLVER_MARKS[point["solver"]]
            fill = colour if point["guided"] else "white"
            axes.plot(
                point["sample_s"], point[key], mark, color=colour, markerfacecolor=fill, markersize=6, label=label
            )
            axes.annotate(
                point["sampler"], (point["sample_s"], point[key]), xytext=(4, 4), textcoords="offset points",
                fontsize=SMALL - 2, rotation=30, color=colour,
            )  # fmt: skip
            label = "_"  # once in the legend
