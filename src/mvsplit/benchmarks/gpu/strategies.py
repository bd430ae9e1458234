"""Section `strategies`: `src/train.py` with default callbacks and the final test, in every way a device can be used.

All of them train the same network on the same samples: their losses after it agree.
"""

from functools import partial
from pathlib import Path

from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome
from mvsplit.benchmarks.gpu.commands import Run, apart


def cases(bench: Bench) -> list[Case]:
    return [Case("strategies", name, partial(train, name=name)) for name in bench.of("strategies")]


def train(bench: Bench, place: Path, name: str) -> Outcome:
    """One run; its test loss beside that of the first case."""
    variants: dict[str, list[str]] = bench.of("strategies")
    job = bench.train(place, variants[name]).succeed()
    metrics = job.metrics()
    figures = {"test_loss": job.test_loss(), "steps_per_s": metrics["time/steps_per_s"]}
    checks = {}
    if name != next(iter(variants)):
        figures["apart"] = apart(figures["test_loss"], reference(bench).test_loss())
        checks["loss_agrees"] = figures["apart"] <= bench.config["loss_tolerance"]
    if bench.kind == "cuda":
        figures["device_peak_gib"] = metrics.get("memory/device_peak_gib", 0.0)
        checks["device_peak_is_told"] = figures["device_peak_gib"] > 0
    return Outcome(checks, figures)


def reference(bench: Bench) -> Run:
    """The run of the first strategy.

    Raises:
        CaseError: if it fails.
    """
    name, overrides = next(iter(bench.of("strategies").items()))
    return bench.run_of("strategies", name, overrides)
