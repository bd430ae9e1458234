"""Sections `tests` and `share`: one network, measured by `on_device.py`. Section `memory`: steps at several depths."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from mvsplit.benchmarks.common import override
from mvsplit.benchmarks.gpu.cases import Bench, Outcome, Run, SkipError
from mvsplit.benchmarks.gpu.overrides import MEASURE, UNSAVED
from mvsplit.utils.run_dirs import PROJECT_ROOT

FULL = 0.97
"""Share of the device's memory that a plan may use: the context needs the rest."""
PLANNED = 0.85, 1.2
"""Allowed range of planned over allocated memory."""


def tests(bench: Bench) -> dict[str, Run]:
    functions = {"syncs": "host_syncs", "attention": "attention", "mu_eff": "spectral_norm"}
    measured = {name: partial(on_device, function=function) for name, function in functions.items()}
    return {"pytest": gpu_tests, "precision": precision, **measured}


def share(bench: Bench) -> dict[str, Run]:
    return {"fsdp": partial(on_device, function="fsdp_share", seed=bench.config["seed"], **bench.of("share"))}


def on_device(bench: Bench, place: Path, function: str, **arguments: Any) -> Outcome:
    return Outcome(**bench.child(place, function, device=bench.kind, **arguments))


def gpu_tests(bench: Bench, place: Path) -> Outcome:
    """The tests that are marked `gpu`."""
    if bench.kind != "cuda":
        raise SkipError("needs a GPU")
    config = ["-c", str(PROJECT_ROOT / "pyproject.toml"), "--rootdir", str(PROJECT_ROOT), "-p", "no:cacheprovider"]
    line = ["-m", "pytest", "-m", "gpu", "-n", "0", "-q", *config, str(PROJECT_ROOT / "tests")]
    job = bench.start(line, place, "pytest")
    status, summary = job.wait(), job.last_line()
    if "No module named pytest" in job.text or "file or directory not found" in job.text:
        raise SkipError("pytest or tests/ is missing")
    return Outcome({"all_passed": status == 0, "some_passed": " passed" in summary}, {"pytest": summary})


def precision(bench: Bench, place: Path) -> Outcome:
    """`src/bench.py precision` at full depth: bf16 weights, and autocast, against the same weights in float32."""
    sizes = [f"{key}={value}" for key, value in bench.of("tests").items()]
    options = ["rounds=1", f"device={bench.kind}", f"seed={bench.config['seed']}"]
    bench.script("bench.py", place, ["precision", *sizes, *options])
    result = json.loads((place / "bench_precision.json").read_text())
    (rows,) = result["networks"].values()
    figures = {f"{way} {name}": row[name] for way, row in rows.items() for name in ("output", "qkv")}
    return Outcome({"within_limits": all(result["holds"].values())}, figures)


def memory(bench: Bench) -> dict[str, Run]:
    sizes = bench.of("memory")
    cases: dict[str, Run] = {
        f"{strategy}/{depth}/{mode}": partial(measure, depth=depth, given=[*device, *memory])
        for depth in sizes["depths"]
        for strategy, device in sizes["strategies"].items()
        for mode, memory in sizes["modes"].items()
    }
    return cases | {f"deepest/{name}": partial(find_deepest, given=given) for name, given in sizes["deepest"].items()}


def latents_run(bench: Bench, place: Path, depth: int, given: list[str]) -> list[str]:
    """Overrides for a few steps on latents, which are created if missing. given: further overrides."""
    sizes = bench.of("memory")
    channels, *sides = sizes["latents"]
    data = bench.folder / "data" / f"latents_{channels}_{sides[0]}_{sides[1]}"
    if not data.is_dir():
        bench.child(place, "make_latents", folder=str(data), shape=sizes["latents"], seed=bench.config["seed"])
    return [
        "data=imagenet_latents", override("data.folder", data), "data.val=train-*.tar", "data.format.normalise=false",
        "data.format.flip=false", f"data.image_size={sides}", f"data.channels={channels}", "data.num_classes=10",
        *sizes["network"], f"model.depth={depth}", *UNSAVED, *given,
    ]  # fmt: skip


def _plan(bench: Bench, place: Path, overrides: list[str]) -> dict[str, Any]:
    device = [f"device_gib={bench.machine.get('gib', 1.0)}", f"usable={FULL}", "table.gpus=[1]", "table.depths=[1]"]
    bench.script("bench.py", place, ["memory", *bench.of("training"), *overrides, *device])
    return json.loads((place / "bench_memory.json").read_text())


def _train(bench: Bench, place: Path, overrides: list[str]) -> dict[str, Any] | None:
    """The figures of `probes.Measure`; None if the device's memory was too small."""
    job = bench.train(place, [*overrides, *MEASURE], probed=True)
    if job.wait() and "out of memory" in job.text:
        return None
    job.succeed()
    return json.loads((place / "measured.json").read_text())


def measure(bench: Bench, place: Path, depth: int, given: list[str]) -> Outcome:
    """Measure a few steps."""
    overrides = latents_run(bench, place, depth, given)
    planned = _plan(bench, place, overrides)
    total, figures = planned["planned_gib"], {"planned_gib": planned["planned_gib"], "parts": planned["gib"]}
    if bench.kind == "cuda" and total > FULL * bench.machine["gib"]:
        raise SkipError(f"the plan of {total:.1f} GiB exceeds the device's {bench.machine['gib']:.1f}")
    found = _train(bench, place, overrides)
    if found is None:
        return Outcome({"fits_as_planned": False}, figures)
    found |= {f"side_{name}": value for name, value in found.pop("side").items()} | figures
    found |= {f"{name}_ms_per_block": found[f"{name}_ms"] / depth for name in ("step", "host")}
    if "allocated_gib" not in found:
        return Outcome({}, found)
    found["planned_over_allocated"] = total / found["allocated_gib"]
    return Outcome({"planned": PLANNED[0] <= found["planned_over_allocated"] <= PLANNED[1]}, found)


def find_deepest(bench: Bench, place: Path, given: list[str]) -> Outcome:
    """The deepest network that trains, among some around the planned depth."""
    planned = _plan(bench, place, latents_run(bench, place, 1, given))["largest_depth"]
    deepest = 0
    for depth in (round(share * planned) for share in (PLANNED[0], 1.0, 1.15)):
        if _train(bench, place / str(depth), latents_run(bench, place, depth, given)) is None:
            break
        deepest = depth
    return Outcome({"as_deep_as_planned": deepest > 0}, {"planned": planned, "trains": deepest})
