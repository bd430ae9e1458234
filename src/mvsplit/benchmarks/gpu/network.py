"""Section `tests`: what one network does on the device; no training. The work itself is in `on_device.py`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt

from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome, SkipError
from mvsplit.benchmarks.gpu.commands import CaseError
from mvsplit.utils.runs import PROJECT_ROOT


@dataclass
class NetworkSizes:
    """Of the networks of this section."""

    depth: PositiveInt
    width: PositiveInt
    num_heads: PositiveInt
    batch_size: PositiveInt
    mu_eff_ms: PositiveFloat


def cases(bench: Bench) -> list[Case]:
    return [
        Case("tests", "pytest", gpu_tests, needs_gpu=True),
        Case("tests", "syncs", syncs),
        Case("tests", "precision", precision),
        Case("tests", "attention", attention),
        Case("tests", "mu_eff", mu_eff),
    ]


def gpu_tests(bench: Bench, place: Path) -> Outcome:
    """The tests that are marked `gpu`."""
    tests = PROJECT_ROOT / "tests"
    if not tests.is_dir():
        raise SkipError("tests/ is not there")
    command = ["-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", "--rootdir", str(PROJECT_ROOT)]
    job = bench.start([*command, "-c", str(PROJECT_ROOT / "pyproject.toml"), str(tests)], place, "pytest")
    status = job.wait()
    if "No module named pytest" in job.text:
        raise SkipError("pytest is not installed")
    words = ("passed", "failed", "skipped", "error")
    counts = {w: int(m.group(1)) for w in words if (m := re.search(rf"(\d+) {w}", job.last_line()))}
    if status not in (0, 1):
        raise CaseError(f"pytest ended with {status}: {job.last_line()}")
    return Outcome({"all_passed": status == 0, "some_passed": counts.get("passed", 0) > 0}, dict(counts))


def syncs(bench: Bench, place: Path) -> Outcome:
    """No operation of forward pass, loss and backward pass may wait for the device."""
    figures = bench.child(place, "host_syncs", device=bench.kind)
    return Outcome({"network_does_not_wait": not figures["network"]}, figures)


def precision(bench: Bench, place: Path) -> Outcome:
    """`src/bench.py precision`: bf16 weights, and autocast, against the same weights in float32, at full depth."""
    c = bench.of("tests")
    sizes = [f"{key}={c[key]}" for key in ("width", "num_heads", "batch_size")]
    options = [f"depths=[{c['depth']}]", f"device={bench.kind}", f"seed={bench.config['seed']}", "rounds=1", *sizes]
    bench.script("bench.py", place, ["precision", *options]).succeed()
    result = json.loads((place / "bench_precision.json").read_text())
    (rows,) = result["networks"].values()
    figures = {
        f"{way.partition(',')[0]} {name}": rows[way][key]
        for way in rows
        if "=float32" in way
        for name, key in {"output": "output", "W_qkv gradient": "qkv"}.items()
    }
    return Outcome({"within_limits": all(result["holds"].values())}, {"depth": c["depth"]} | figures)


def attention(bench: Bench, place: Path) -> Outcome:
    """Which attention kernel runs, and how long each takes at the paper's sizes."""
    figures = bench.child(place, "attention", device=bench.kind, batch_size=64 if bench.kind == "cuda" else 2)
    return Outcome({"fused": figures["ran"] not in ("", "math")}, figures)


def mu_eff(bench: Bench, place: Path) -> Outcome:
    """The spectral norm that the probe takes: its time, and NaN in, NaN out."""
    figures = bench.child(place, "spectral_norm", device=bench.kind)
    checks = {"nan_gives_nan": figures["nan"] == "nan", "right": figures["error"] < 0.01}
    if bench.kind == "cuda":
        checks["fast"] = figures["ms"] <= bench.of("tests")["mu_eff_ms"]
    return Outcome(checks, figures)
