"""Section `speed`: kernels, steps, sampling and the monitor's cost, by their own benchmarks."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from mvsplit.benchmarks.gpu.cases import Bench, Outcome, Run

BANDWIDTH, UTILISATION, SAMPLING = 0.8, 0.45, 5.0
"""On an H100-class GPU: the merge's least share of a copy's bandwidth, forward and backward; the least utilisation of a
recomputed step; how many times faster a guided sampling step with one sample must be than plain eager."""


def speed(bench: Bench) -> dict[str, Run]:
    return dict(CASES)


def _figures(bench: Bench, place: Path, benchmark: str, name: str) -> dict[str, Any]:
    """Run a benchmark with the section's overrides and read its file. It fails if a limit of its own does not hold."""
    seed = f"seed={bench.config['seed']}"
    bench.script("bench.py", place, [benchmark, *bench.of("speed")[name], seed])
    return json.loads((place / f"bench_{benchmark}.json").read_text())


def kernels(bench: Bench, place: Path) -> Outcome:
    """Fused operations against plain and compiled ones, and what Triton makes of them."""
    found = _figures(bench, place, "kernels", "kernels")
    rows = {(row["operation"], row["width"], row["form"]): row for row in found["kernels"]}
    checks = {"nothing_spilled": not any(row["spills"] for row in found.get("offline", []))}
    figures: dict[str, Any] = {"copy_gb_s": found["copy_gb_s"]}
    for (operation, width, form), row in rows.items():
        name = f"{operation}/{width}/{form}"
        figures[name] = {
            key: row[key] for key in ("forward_s", "backward_s", "forward_share", "backward_share", "ratio")
        }
        figures[f"{name} ×"] = row["ratio"]
        if form == "fused" and operation == "merge_norm":
            checks[f"merge_{width}_near_copy"] = min(row["forward_share"], row["backward_share"]) >= BANDWIDTH
    return Outcome(checks if bench.kind == "cuda" else {}, figures)


def step(bench: Bench, place: Path, name: str) -> Outcome:
    """Each optimisation switched on in turn, for training and guided sampling."""
    found = _figures(bench, place, "step", name)
    kind = "sample" if name == "sampling" else "train"
    rows = [row for row in found["steps"] if row["kind"] == kind]
    figures: dict[str, Any] = {"peak_gflops": found["peak_gflops"]}
    for row in rows:
        figures[f"{row['blocks']} {row['way']} ×"] = row["ratio"]
        figures[f"{row['blocks']} {row['way']} utilisation"] = row["utilisation"]
    best = max(rows, key=lambda row: row["images_per_s"] if kind == "sample" else row["utilisation"])
    recomputed = [row["utilisation"] for row in rows if row["way"].endswith("recomputed")]
    checks = {"sampling_faster": best["ratio"] >= SAMPLING}
    if kind == "train":
        checks = {"recomputed_step_utilised": max(recomputed, default=0.0) >= UTILISATION}
    return Outcome(checks if bench.kind == "cuda" else {}, figures)


def monitor(bench: Bench, place: Path) -> Outcome:
    """What probe, detector and guard cost of a step."""
    found = _figures(bench, place, "stability", "monitor")
    figures = {key: value for key, value in found.items() if isinstance(value, float)}
    return Outcome(found["holds"] if bench.kind == "cuda" else {}, figures)


CASES: dict[str, Run] = {
    "kernels": kernels,
    "step": partial(step, name="step"),
    "sampling": partial(step, name="sampling"),
    "monitor": monitor,
}
