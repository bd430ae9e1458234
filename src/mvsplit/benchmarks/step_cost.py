"""Time of a training step and of a sampling step: each optimisation switched on in turn, against plain eager.

All ways are timed in turns on the same network in one process, so that other load on the machine affects all alike.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt
from rich.table import Column, Table
from torch import Tensor

from mvsplit.benchmarks.common import RoundsConfig, check_machine, other_merge, save_figures
from mvsplit.benchmarks.sampling_by_depth import (
    NUM_CLASSES,
    check_network,
    fastest,
    first_blocks,
    random_network,
    seconds_now,
)
from mvsplit.evaluation.generation import best_device
from mvsplit.flow.graph_replay import GraphReplay
from mvsplit.flow.sampler import guided_velocity
from mvsplit.kernels.choice import KernelChoice
from mvsplit.kernels.merge_norm import Segments
from mvsplit.models.dit import DiT
from mvsplit.models.recompute import Checkpointing
from mvsplit.utils.console import print_table, progress
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT

PLAIN, RECOMPUTED = "plain eager", ", recomputed"


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_step.yaml`."""

    depths: Annotated[list[PositiveInt], Len(1)]
    width: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt
    image_shape: Annotated[list[PositiveInt], Len(3, 3)]
    batch_size: PositiveInt
    sampled: PositiveInt
    recompute: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    compile_depths: Annotated[list[PositiveInt], Len(2)] | None
    against: str | None


def check_values(config: dict[str, Any]) -> None:
    """Raise `UserError` for sizes that do not fit together, a missing GPU or compiler, or another merge not allowed."""
    check_network(config)
    check_machine(config)


@dataclass(frozen=True)
class Way:
    """How a network is run."""

    name: str
    compiled: bool = False
    fused: bool = False
    recompute: int = 0
    merge: Callable[..., Any] | None = None
    """In place of `merge_norm`."""
    replay: bool = False
    """Whether a sampling step is replayed as a CUDA graph."""

    @contextmanager
    def applied(self, network: Any) -> Iterator[None]:
        """The network runs this way in the context."""
        network.checkpointing = Checkpointing(self.recompute)
        network.kernels = KernelChoice("fused" if self.fused else "plain")
        merges = [residual for block in network.blocks for residual in (block.residual1, block.residual2)]
        for block in network.blocks:
            block.compiled = self.compiled
        if self.merge is not None:
            for residual in merges:
                residual.forward = partial(call_merge, self.merge, residual)
        try:
            yield
        finally:
            for residual in merges:
                residual.__dict__.pop("forward", None)


def call_merge(merge: Callable[..., Tensor], residual: Any, x: Tensor, update: Tensor, segments: Segments) -> Tensor:
    """`MVSplit.forward` with another implementation of `merge_norm`."""
    return merge(x, update, residual.alpha, residual.beta, segments, residual.eps)


def ways_of(config: dict[str, Any], on_gpu: bool) -> list[Way]:
    """The ways, from plain eager to all optimisations; fused kernels only on a GPU."""
    other = [Way(config["against"], merge=other_merge(config["against"]))] if config["against"] else []
    fused = [Way("+ fused kernels", fused=True)] if on_gpu else []
    compiled = [Way("compiled block", compiled=True)]
    if on_gpu:
        compiled.append(Way("compiled block + fused kernels", compiled=True, fused=True))
    ways = [Way(PLAIN), *other, *fused, *compiled]
    if config["recompute"]:
        ways += [replace(way, name=way.name + RECOMPUTED, recompute=config["recompute"]) for way in ways]
    return ways


class Case:
    """A network of one depth with its inputs."""

    def __init__(self, deepest: DiT, depth: int, config: dict[str, Any], device: torch.device) -> None:
        self.network: Any = first_blocks(deepest, depth)
        self.depth, self.device = depth, device
        self.replays: dict[str, GraphReplay] = {}
        generator = torch.Generator().manual_seed(config["seed"])
        batch, sampled, shape = config["batch_size"], config["sampled"], config["image_shape"]
        self.z = torch.randn(batch, *shape, generator=generator).to(device)
        self.t = torch.rand(batch, generator=generator).to(device)
        self.labels = torch.arange(batch, device=device) % NUM_CLASSES
        self.noise, self.classes = (
            self.z[:1].repeat(sampled, 1, 1, 1),
            torch.arange(sampled, device=device) % NUM_CLASSES,
        )

    def train(self, way: Way) -> None:
        """A forward and backward pass."""
        self.network(self.z, self.t, self.labels).square().mean().backward()
        for parameter in self.network.parameters():
            parameter.grad = None

    @torch.no_grad()
    def sample(self, way: Way) -> None:
        """A step of a guided solver."""
        network = self.replays.setdefault(way.name, GraphReplay(self.network)) if way.replay else self.network
        guided_velocity(network, self.classes, 2.0)(self.noise, 0.5)

    def seconds(self, way: Way, run: Callable[[Way], None]) -> float:
        with way.applied(self.network):
            begun = seconds_now(self.device)
            run(way)
            return seconds_now(self.device) - begun


def flop_per_sample(network: DiT, depth: int) -> int:
    """Floating-point operations of the blocks' matrix products in a forward pass of one sample."""
    tokens, width = network.num_tokens, network.width
    weights = sum(p.numel() for p in network.blocks[0].parameters() if p.ndim == 2)
    return depth * (2 * tokens * weights + 4 * tokens**2 * width)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / fastest(lambda: a @ a, device)


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Measure, print and save all figures (`bench_step.json`)."""
    device = best_device() if config["device"] == "auto" else torch.device(config["device"])
    dtype = getattr(torch, config["precision"])
    network = random_network(config, max(config["depths"]), device)
    ways, cases = ways_of(config, device.type == "cuda"), [Case(network, d, config, device) for d in config["depths"]]
    sampling = [way for way in ways if not way.recompute]
    if device.type == "cuda":
        sampling += [replace(way, name=f"{way.name}, replayed", replay=True) for way in (sampling[0], sampling[-1])]
    turns = [(case, "train", way) for case in cases for way in ways]
    turns += [(case, "sample", way) for case in cases for way in sampling]
    seconds: dict[tuple[int, str, str], list[float]] = {}
    with progress("timing", (config["rounds"] + 1) * len(turns)) as advance:
        for number in range(config["rounds"] + 1):
            for case, kind, way in turns if number % 2 else reversed(turns):
                taken = case.seconds(way, case.train if kind == "train" else case.sample)
                if number:  # the first compiles and allocates
                    seconds.setdefault((case.depth, kind, way.name), []).append(taken)
                advance(1)
    peak = peak_flops(device, dtype)
    result: dict[str, Any] = {
        "machine": {"device": device.type, "cpus": os.cpu_count(), "system": platform.platform()},
        "settings": {key: config[key] for key in ("width", "image_shape", "batch_size", "sampled", "precision")},
        "peak_gflops": peak / 1e9,
        "steps": [
            figures(network, depth, kind, way, times, seconds[depth, kind, baseline(way)], config, peak)
            for (depth, kind, way), times in sorted(
                seconds.items(), key=lambda item: (item[0][1] != "train", item[0][0])
            )
        ],
    }
    if config["compile_depths"]:
        result["compile_s"] = {depth: compile_seconds(config, depth) for depth in config["compile_depths"]}
    show(result)
    save_figures(result, output_dir / "bench_step.json")
    return result


def baseline(way: str) -> str:
    """Plain eager, with recomputation if this way has it."""
    return PLAIN + RECOMPUTED if way.endswith(RECOMPUTED) else PLAIN


def figures(
    network: DiT,
    depth: int,
    kind: str,
    way: str,
    times: list[float],
    plain: list[float],
    config: dict[str, Any],
    peak: float,
) -> dict[str, Any]:
    """What is reported of one way: medians, the ratio to plain eager in the same rounds, and its range."""
    median = statistics.median(times)
    ratios = sorted(before / now for before, now in zip(plain, times, strict=True))
    samples = config["batch_size"] if kind == "train" else config["sampled"]
    passes = 3 if kind == "train" else 2  # forward and backward; both branches of the guidance
    return {
        "blocks": depth, "kind": kind, "way": way, "seconds": median, "ms_per_block": 1e3 * median / depth,
        "images_per_s": samples / median, "ratio": statistics.median(ratios), "ratios": [ratios[0], ratios[-1]],
        "utilisation": passes * samples * flop_per_sample(network, depth) / median / peak,
    }  # fmt: skip


COMPILING = """
import json, sys, mvsplit
from mvsplit.benchmarks import step_cost
print(step_cost.first_step(json.loads(sys.argv[1]), int(sys.argv[2])))
"""


def compile_seconds(config: dict[str, Any], depth: int) -> float:
    """Seconds that the first training step takes longer than the second, without anything compiled before."""
    keys = ("seed", "width", "num_heads", "patch_size", "image_shape", "batch_size", "sampled", "precision")
    values = json.dumps({key: config[key] for key in keys})
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": str(PROJECT_ROOT / "src")}
        command = [sys.executable, "-c", COMPILING, values, str(depth)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"compiling {depth} blocks failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def first_step(config: dict[str, Any], depth: int) -> float:
    """Called in a process of its own: the difference between the first step and the faster of two more."""
    device = torch.device("cpu")
    case = Case(random_network(config, depth, device), depth, config, device)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        case.seconds(Way("compiled", compiled=True), case.train)
        times.append(time.perf_counter() - begun)
    return times[0] - min(times[1:])


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    names = ("blocks", "way", "ms", "ms per block", "images/s", "× plain", "range", "utilisation")
    for kind, title in (("train", "Training step"), ("sample", "Guided sampling step")):
        columns = [Column(name, justify="left" if name == "way" else "right") for name in names]
        table = Table(*columns, title=title, title_justify="left")
        for row in result["steps"]:
            if row["kind"] == kind:
                table.add_row(
                    str(row["blocks"]), row["way"], f"{1e3 * row['seconds']:.0f}", f"{row['ms_per_block']:.2f}",
                    f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}",
                    f"{row['ratios'][0]:.2f}–{row['ratios'][1]:.2f}", f"{100 * row['utilisation']:.0f} %",
                )  # fmt: skip
        print_table(table)
    if compiling := result.get("compile_s"):
        table = Table(Column("blocks", justify="right"), Column("compiling, s", justify="right"))
        for depth, seconds in compiling.items():
            table.add_row(str(depth), f"{seconds:.1f}")
        print_table(table)
