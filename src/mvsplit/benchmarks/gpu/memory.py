"""Section `memory`: what a step takes of memory and time at several depths, beside what the planner says."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len, MinLen
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from mvsplit.benchmarks import made
from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome, SkipError
from mvsplit.benchmarks.gpu.commands import CaseError

SAMPLES = 256
FULL = 0.97
"""Share of the device's memory from which on a plan does not fit: the context needs the rest."""
STEPS = 7
FEW = ("best", "every", "last", "sample_grid", "time_probe")
"""Callbacks that a few steps need not."""
MEASURE = "mvsplit.benchmarks.gpu.callbacks.Measure"


@dataclass
class MemorySizes:
    """What is measured: all depths × strategies × modes."""

    network: list[str]
    latents: Annotated[list[PositiveInt], Len(3)]
    depths: list[PositiveInt]
    strategies: dict[str, list[str]]
    modes: Annotated[dict[str, list[str]], MinLen(1)]
    planned: Annotated[list[PositiveFloat], Len(2)]
    deepest: dict[str, list[str]]
    tries: NonNegativeInt


def cases(bench: Bench) -> list[Case]:
    sizes = bench.of("memory")
    measured = [
        Case("memory", f"{strategy}/{depth}/{mode}", partial(measure, strategy=strategy, depth=depth, mode=mode))
        for depth in sizes["depths"]
        for strategy in sizes["strategies"]
        for mode in sizes["modes"]
    ]
    deepest = [Case("memory", f"deepest/{n}", partial(find_deepest, name=n), needs_gpu=True) for n in sizes["deepest"]]
    return measured + deepest


def training_overrides(bench: Bench, place: Path, depth: int, given: list[str]) -> list[str]:
    """Of a few steps on latents, which are made if they are not there. given: more of them."""
    sizes = bench.of("memory")
    channels, *sides = sizes["latents"]
    data = bench.folder / "data" / f"latents_{channels}_{sides[0]}_{sides[1]}"
    if not data.is_dir():
        bench.child(place, "make_latents", folder=str(data), shape=sizes["latents"], seed=bench.config["seed"])
    short = [f"trainer.max_steps={STEPS}", "trainer.limit_val_batches=0", "test=false"]
    silent = [f"callbacks.{name}=null" for name in FEW]
    return [
        "data=imagenet_latents", f"data.folder={data}", "data.val=train-*.tar", "data.format.normalise=false",
        "data.format.flip=false",
        f"data.image_size={sides}", f"data.channels={channels}", f"data.num_classes={made.CLASSES}",
        *sizes["network"], f"model.depth={depth}", *short, *silent, *given,
    ]  # fmt: skip


def make_latents(folder: str, shape: list[int], seed: int) -> dict[str, Any]:
    """A set of random latents (see `child.py`)."""
    made.write_set(Path(folder), made.latents(SAMPLES, shape, False, seed), SAMPLES, SAMPLES // 2)
    return {"samples": SAMPLES}


def plan(overrides: list[str]) -> dict[str, Any]:
    """What the planner says of a training run (see `child.py`)."""
    import torch
    from hydra import compose, initialize_config_dir

    from mvsplit.benchmarks.plan import largest_depth, plan, read_job
    from mvsplit.utils.config import to_plain
    from mvsplit.utils.entry import plain_overrides
    from mvsplit.utils.runs import PROJECT_ROOT, register_resolvers

    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        config = compose("train.yaml", plain_overrides([*overrides, "paths.output_dir=."]))
    job = read_job(to_plain(config))
    planned = plan(job)
    gib = {name: size / 2**30 for name, size in vars(planned).items() if isinstance(size, int)}
    room = torch.cuda.get_device_properties(0).total_memory * FULL if torch.cuda.is_available() else 0.0
    return {"planned_gib": gib["total"], "parts": gib, "largest": largest_depth(job, room) if room else 0}


def _train(bench: Bench, place: Path, overrides: list[str]) -> dict[str, Any] | None:
    """What `Measure` found; None if the device's memory was too small."""
    measure = [f"+callbacks.measure._target_={MEASURE}", "+callbacks.measure.folder=${paths.output_dir}"]
    job = bench.train(place, [*overrides, *measure], changed=True)
    status = job.wait()
    if status and "out of memory" in job.text:
        return None
    if status:
        raise CaseError(f"ended with {status}: {job.last_line()}")
    return json.loads((place / "measured.json").read_text())


def measure(bench: Bench, place: Path, strategy: str, depth: int, mode: str) -> Outcome:
    """A few steps."""
    sizes = bench.of("memory")
    overrides = training_overrides(bench, place, depth, [*sizes["strategies"][strategy], *sizes["modes"][mode]])
    planned = bench.child(place, "plan", overrides=[*bench.of("training"), *overrides])
    figures: dict[str, Any] = {"planned_gib": planned["planned_gib"]}
    if bench.kind == "cuda" and planned["planned_gib"] > FULL * bench.machine["gib"]:
        raise SkipError(f"planned {planned['planned_gib']:.1f} GiB do not fit into {bench.machine['gib']:.1f}")
    found = _train(bench, place, overrides)
    if found is None:
        return Outcome({"fits_as_planned": False}, figures)
    figures |= found | {f"{name}_ms_per_block": found[f"{name}_ms"] / depth for name in ("step", "host")}
    figures |= {f"side_{name}": value for name, value in figures.pop("side").items()}
    checks = {}
    if "allocated_gib" in found:
        low, high = sizes["planned"]
        figures["planned_over_allocated"] = planned["planned_gib"] / found["allocated_gib"]
        checks["planned"] = low <= figures["planned_over_allocated"] <= high
    return Outcome(checks, figures | {"parts": planned["parts"]})


def find_deepest(bench: Bench, place: Path, name: str) -> Outcome:
    """The deepest network that trains, from where the planner puts it."""
    sizes = bench.of("memory")
    given = sizes["deepest"][name]
    planned = bench.child(place, "plan", overrides=[*bench.of("training"), *training_overrides(bench, place, 1, given)])
    tried: dict[int, bool] = {}

    def trains(depth: int) -> bool:
        tried[depth] = _train(bench, place / str(depth), training_overrides(bench, place, depth, given)) is not None
        return tried[depth]

    low, high = bracket(trains, planned["largest"], sizes["tries"])
    figures = {"planned": planned["largest"], "trains": low, "does_not": high, "tried": [f"{d}" for d in tried]}
    return Outcome({"trains": low > 0, "as_deep_as_planned": low >= 0.85 * planned["largest"]}, figures)


def bracket(trains: Callable[[int], bool], guess: int, tries: int) -> tuple[int, int | None]:
    """The largest number known to do and the smallest known not to, after so many tries around a guess."""
    low, high = 0, None
    depth = guess
    for _ in range(tries):
        if depth <= low or (high is not None and depth >= high):
            break
        if trains(depth):
            low = depth
        else:
            high = depth
        depth = round(low * 1.15) if high is None else (low + high) // 2 if low else round(high * 0.85)
    return low, high
