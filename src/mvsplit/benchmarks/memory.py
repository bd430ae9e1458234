"""What a training run needs per process, computed before anything is built, and held against a real run.

The composed training config is the only description: the network is built on the meta device and counted, one of its
blocks runs on fake tensors, where what autograd keeps of it is counted too (`models/recompute.py`). How many copies of
parameters, gradients and optimiser state a strategy holds is in `STATES` and `_buffers`.

Counted is what tensors hold at the worst moment of a training step. Not counted: what the allocator loses to
fragments, the CUDA context and NCCL (about 1 GiB together), validation and pictures. Where no GPU is at hand, what a
block keeps is measured with the CPU's operators; a GPU's fused ones keep less.
"""

import csv
import json
import os
import subprocess
import sys
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le, Len
from pydantic import PositiveFloat, PositiveInt
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.flow.objective import velocity_loss
from mvsplit.models.recompute import Checkpointing, Schedule, saved_bytes
from mvsplit.training.run import TrainConfig, check_machine
from mvsplit.utils.config import build
from mvsplit.utils.console import console, say, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.runs import PROJECT_ROOT

GIB = 2**30
SAMPLED_BATCHES = (64, 128)
"""Where activations are measured; what they take is linear in the batch (gradients in flight only nearly, below 8)."""
LARGEST = 2**14
"""Where the search for the largest depth and batch ends."""
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For measured CPU runs: freed tensors go back to the system. Left to itself, glibc raises this threshold to 32 MiB and
keeps freed blocks below it: a peak would then show its leftovers too (10 to 18 % in two runs of 1.5 and 2.4 GiB)."""
AUTO = {"every": "auto", "fraction": 1.0, "budget_gib": None}
SHORT_RUN = [
    "task_name=measured", "logger=csv", "trainer.max_steps=3", "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0", "test=false",
]  # fmt: skip
"""Steps that reach the peak (optimiser state is there from the second) and nothing else."""
BASE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch._dynamo, torch.distributed.tensor, torch.utils.tensorboard
import train
if "zero3" in sys.argv: import deepspeed
from mvsplit.callbacks.throughput import host_peak_gib
layer = torch.nn.Linear(8, 8)
layer(torch.randn(2, 8)).sum().backward()
torch.optim.AdamW(layer.parameters(), foreach=True).step()
print(host_peak_gib())
"""
"""A process that has imported everything and built nothing of size."""


@dataclass
class TableConfig:
    gpus: Annotated[list[PositiveInt], Len(1)]
    depths: Annotated[list[PositiveInt], Len(1)]


@dataclass
class Config(TrainConfig):
    """Top-level keys of `bench_memory.yaml`: those of `train.yaml` and the benchmark's own."""

    device_gib: PositiveFloat
    usable: Annotated[float, Gt(0), Le(1)]
    measure: bool
    table: TableConfig


# ------------------------------------------------------------------- a network


@dataclass(frozen=True)
class Sizes:
    """Parameters of a network, by number."""

    total: int
    block: int

    def at_depth(self, depth: int, change_to: int) -> "Sizes":
        return replace(self, total=self.total + (change_to - depth) * self.block)


def count_parameters(model: dict[str, Any]) -> Sizes:
    """Of a checked `model` node, built on the meta device."""
    with torch.device("meta"):
        network = build(model)()
    count = [sum(p.numel() for p in part.parameters()) for part in (network, network.blocks[0])]
    return Sizes(*count)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations for a micro-batch: of a block, of the trunk between blocks, of what is around the blocks,
    of gradients on their way through a block, and of a block's weights cast by autocast.
    """

    block: int
    trunk: int
    around: int
    working: int
    casts: int


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages made inside it that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure_activations(model: dict[str, Any], batch: int, dtype: torch.dtype, autocast: bool) -> Activations:
    """Run a network of one block on fake tensors: shapes and storages without memory or arithmetic.

    Args:
        model: a checked `model` node. batch: micro-batch per process. dtype: of the weights. autocast: to bf16.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        network = build(model | {"depth": 1} | ({"checkpointing": None} if "checkpointing" in model else {}))()
        image = torch.zeros(batch, *network.input_shape)
        null = getattr(network.context, "null", None)
        condition = torch.zeros(batch, dtype=torch.long) if null is None else null.expand(batch, -1, -1)
        seen: list[Any] = []
        network.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else nullcontext():
            _, everything = saved_bytes(
                lambda: velocity_loss(network, image, image.clone(), torch.zeros(batch), condition), network
            )
            block, (x, *others) = network.blocks[0], seen
            x = x.detach().requires_grad_()
            _, saved = saved_bytes(lambda: block(x, *others), block, others)
            with _Live() as live:
                block(x, *others).sum().backward()
    casts = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2) if autocast else 0
    return Activations(
        block=saved,
        trunk=x.nbytes,
        around=max(0, everything - saved) + 3 * image.nbytes,  # data, noise and their mixture stay as well
        working=max(0, live.peak - (saved - x.nbytes)),
        casts=casts,
    )


# ----------------------------------------------------------------------- a run


@dataclass(frozen=True)
class States:
    """Bytes per parameter of a process's share."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    step: int
    """Made for the optimiser step alone: the square root in AdamW, a copy of gradients or weights in float32."""


STATES = {
    ("zero3", 4): States(4, 4, 4 + 8, 4, 4 + 4),  # its master weights are a second copy, and step on flat gradients
    ("zero3", 2): States(2, 2, 4 + 8, 4, 4 + 4),  # gradients are kept in the parameters' type
    ("fsdp2", 4): States(4, 4, 8, 4, 4),
    ("fsdp2", 2): States(2, 2, 4, 4, 4),
    ("ddp", 4): States(4, 4, 8, 4, 4),
    ("ddp", 2): States(2, 2, 4, 4, 4),
}
"""By strategy and bytes of a weight. ZeRO-3: deepspeed/runtime/zero/stage3.py of 0.19.8."""
ZERO_STEP_LIMIT = 10**9
"""Parameters that ZeRO-3 steps at a time (`sub_group_size`)."""


@dataclass(frozen=True)
class Job:
    """What a config says about memory."""

    model: dict[str, Any]
    sizes: Sizes
    depth: int
    strategy: str
    """zero3, fsdp2, ddp (world > 1, or one process alone)."""
    options: dict[str, Any]
    """Of the strategy's node."""
    world: int
    batch: int
    """Samples of a micro-batch per process."""
    accumulates: bool
    weight_bytes: int
    autocast: bool
    average: bool
    on_cpu: bool

    def at(self, **changes: Any) -> "Job":
        """The same with another depth, batch or world."""
        sizes = self.sizes.at_depth(self.depth, changes.get("depth", self.depth))
        return replace(self, sizes=sizes, **changes)


def read_job(config: dict[str, Any]) -> Job:
    """Read a checked training config.

    Raises:
        UserError: for a number of devices or a strategy that only the machine knows.
    """
    trainer, model = config["trainer"], config["model"]
    devices = trainer["devices"]
    if devices == "auto":
        raise UserError("trainer.devices = auto: the planner needs a number")
    world = (len(devices) if isinstance(devices, list) else devices) * trainer["num_nodes"]
    accumulate = trainer["accumulate_grad_batches"]
    node = trainer["strategy"]
    options = node if isinstance(node, dict) else {}
    names = {"ZeRO3": "zero3", "FSDP2": "fsdp2", "DDPStrategy": "ddp", "auto": "ddp", "ddp": "ddp"}
    name = options.get("_target_", node).rpartition(".")[2]
    if name not in names:
        raise UserError(f"trainer.strategy = {name}: the planner knows {', '.join(names)}")
    precision = str(trainer["precision"])
    zero3 = names[name] == "zero3"
    half = "16" in precision and (zero3 or "true" in precision)
    callbacks = [node["_target_"] for node in (config["callbacks"] or {}).values() if node]
    return Job(
        model=model,
        sizes=count_parameters(model),
        depth=model["depth"],
        strategy=names[name],
        options=options,
        world=world,
        batch=config["data"]["batch_size"] // (world * accumulate),
        accumulates=accumulate > 1,
        weight_bytes=2 if half else 4,
        autocast="mixed" in precision and not zero3,
        average=any(target.endswith(".EMA") for target in callbacks),
        on_cpu=trainer["accelerator"] == "cpu" or (trainer["accelerator"] == "auto" and not torch.cuda.is_available()),
    )


def _activations(job: Job) -> Activations:
    dtype = torch.bfloat16 if job.weight_bytes == 2 else torch.float32
    low, high = (_measured(json.dumps(job.model, sort_keys=True), n, dtype, job.autocast) for n in SAMPLED_BATCHES)
    share = (job.batch - SAMPLED_BATCHES[0]) / (SAMPLED_BATCHES[1] - SAMPLED_BATCHES[0])
    line = {name: round(size + share * (getattr(high, name) - size)) for name, size in vars(low).items()}
    return Activations(**{name: max(0, size) for name, size in line.items()})


@lru_cache
def _measured(model: str, batch: int, dtype: torch.dtype, autocast: bool) -> Activations:
    return measure_activations(json.loads(model), batch, dtype, autocast)


@dataclass(frozen=True)
class Buffers:
    """Bytes of whole weights and of gradients on their way."""

    always: int = 0
    forward: int = 0
    backward: int = 0
    gathered: int = 1
    """Blocks whose weights are gathered together."""


def _buffers(job: Job) -> Buffers:
    block = job.sizes.block * job.weight_bytes
    if job.strategy == "zero3":  # as `training/strategies.py` sets it, with what it prefetches
        return Buffers(always=block, forward=4 * block, backward=6 * block)  # a block's gradients, twice
    if job.strategy == "fsdp2":
        gathered = min(job.depth, job.options["blocks_per_group"])
        group = gathered * block  # with a flat copy while it is gathered; then its gradients and their flat copy
        return Buffers(forward=2 * group, backward=4 * group, gathered=gathered)
    if job.world > 1 and not job.options.get("gradient_as_bucket_view"):
        return Buffers(always=job.sizes.total * job.weight_bytes)  # buckets hold every gradient once more
    return Buffers()


@dataclass(frozen=True)
class Plan:
    """Bytes per process, on its device. `total` is the worst moment of a step; not all parts are there at all times."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    buffers: int
    step: int
    total: int
    moment: str
    host: int
    """Bytes in host memory beside them."""
    schedule: Schedule

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average


def plan(job: Job, made: Activations | None = None) -> Plan:
    """What the job needs. made: its activations; None measures them."""
    made = made or _activations(job)
    share = -(-job.sizes.total // (job.world if job.strategy in ("zero3", "fsdp2") else 1))
    per = STATES[job.strategy, job.weight_bytes]
    parameters, gradients, optimizer, average, step = (
        share * n for n in (per.parameters, per.gradients, per.optimizer, per.average * job.average, per.step)
    )
    host = 0
    if job.strategy == "zero3":
        step = min(step, ZERO_STEP_LIMIT * per.step)
    if job.options.get("offload_optimizer") and not job.on_cpu:
        host, gradients, optimizer, step = host + gradients + optimizer, 0, 0, 0
    if job.options.get("offload_parameters") and not job.on_cpu:
        host, parameters, average = host + parameters + average, 0, 0

    buffers = _buffers(job)
    node = job.model.get("checkpointing")
    checkpointing: Checkpointing = build(node) if node else Checkpointing()
    schedule = checkpointing.schedule(job.depth, made.block, made.trunk)
    kept = job.depth - schedule.recomputed
    inputs, group = schedule.groups * made.trunk, schedule.largest_group * made.block
    if checkpointing.offload and not job.on_cpu:
        host, inputs = host + inputs, 0
    first = max(max(0, kept - buffers.gathered) * made.block, group)  # what is left at the first reduction
    last = max(min(1, kept) * made.block, group)
    # Lightning gives the last step's gradients up between forward and backward, unless they are to be added to.
    stay = gradients if job.strategy == "zero3" or job.accumulates else 0
    moments = {
        "end of the forward pass": gradients + inputs + kept * made.block + schedule.recomputed * made.casts
        + buffers.forward + made.around,
        "start of the backward pass": stay + inputs + max(kept * made.block, group) + made.working + buffers.forward
        + made.around,
        "first gradients": stay + inputs + first + made.working + buffers.backward + made.around,
        "end of the backward pass": gradients + last + made.working + buffers.backward + made.around,
        "optimiser step": gradients + step,
    }  # fmt: skip
    moment = max(moments, key=lambda name: moments[name])
    return Plan(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        activations=inputs + max(kept * made.block, group) + made.around,
        buffers=buffers.always + max(buffers.forward, buffers.backward),
        step=step,
        total=parameters + optimizer + average + buffers.always + moments[moment],
        moment=moment,
        host=host,
        schedule=schedule,
    )


def largest(fits: Callable[[int], bool], limit: int = LARGEST) -> int:
    """The largest number up to the limit that fits, if all smaller ones do; 0 if none does."""
    if not fits(1):
        return 0
    high = 2
    while high <= limit and fits(high):
        high *= 2
    return bisect_left(range(high // 2, min(high, limit + 1)), True, key=lambda n: not fits(n)) + high // 2 - 1


def _leanest(job: Job) -> Job:
    """With `auto`, the schedule of least memory: a budget is for speed, and does not say what fits."""
    node = job.model.get("checkpointing")
    if not node or node["every"] != "auto":
        return job
    return replace(job, model=job.model | {"checkpointing": node | {"budget_gib": None}})


def largest_depth(job: Job, limit: float) -> int:
    """Blocks that fit into so many bytes, everything else as it is."""
    lean = _leanest(job)
    return largest(lambda depth: plan(lean.at(depth=depth)).total <= limit)


def largest_batch(job: Job, limit: float) -> int:
    """Samples per process and micro-batch that fit into so many bytes, everything else as it is."""
    lean = _leanest(job)
    return largest(lambda batch: plan(lean.at(batch=batch)).total <= limit)


# ----------------------------------------------------------------- measurement


def base_gib(strategy: str) -> float:
    """What a CPU process holds before it builds anything, in GiB."""
    command = [sys.executable, "-c", BASE, str(PROJECT_ROOT / "src"), strategy]
    done = subprocess.run(command, env=os.environ | THRESHOLD, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measured_gib(config: dict[str, Any], overrides: list[str], folder: Path, on_cpu: bool) -> float:
    """The peak of the first rank in a short run of `src/train.py`, on the host or on the GPU, in GiB.

    Args:
        config: of the run that is planned. overrides: that lead to it from `train.yaml`. folder: for the run's output.

    Raises:
        UserError: if the run fails or tells no peak.
    """
    callbacks = config["callbacks"] or {}
    silent = [f"callbacks.{name}=null" for name in ("best", "every", "last", "sample_grid") if name in callbacks]
    command = [sys.executable, str(PROJECT_ROOT / "src" / "train.py"), *overrides, *SHORT_RUN, *silent]
    command += [f"paths.log_dir={folder}"]
    done = subprocess.run(command, env=os.environ | (THRESHOLD if on_cpu else {}), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"measure = true: the run failed: {(done.stderr.splitlines() or ['without a word'])[-1]}")
    tag = "memory/host_peak_gib" if on_cpu else "memory/device_peak_gib"
    files = folder.glob("measured/runs/*/csv/version_0/metrics.csv")
    peaks = [float(row[tag]) for file in files for row in csv.DictReader(file.open()) if row.get(tag)]
    if not peaks:
        raise UserError(f"measure = true: the run tells no {tag}; callbacks.throughput is needed")
    return max(peaks)


# --------------------------------------------------------------------- results


def report(config: dict[str, Any], overrides: list[str], output_dir: Path) -> dict[str, Any]:
    """Plan, show, and with `measure` compare; kept as `bench_memory.json` in the run folder, and returned.

    Args:
        config: checked, of `Config`. overrides: that lead to the same training config from `train.yaml`.
    """
    if config["measure"]:  # what the short run leaves out is not planned either
        check_machine(config)
    job = read_job(config)
    planned = plan(job)
    limit = config["usable"] * config["device_gib"] * GIB
    base = base_gib(job.strategy) if job.on_cpu else 0.0
    result: dict[str, Any] = {
        "parameters": job.sizes.total,
        "batch": job.batch,
        "world": job.world,
        "gib": {name: size / GIB for name, size in vars(planned).items() if isinstance(size, int)},
        "moment": planned.moment,
        "recomputed": planned.schedule.recomputed,
        "every": planned.schedule.every,
        "base_gib": base,
        "planned_gib": base + planned.total / GIB,
        "largest_depth": largest_depth(job, limit - base * GIB),
        "largest_batch": largest_batch(job, limit - base * GIB),
    }
    show(result, job, planned, config)
    if not job.on_cpu:
        result["table"] = list(table_rows(job, config["table"], limit))
        show_other_sizes(result["table"], job, config)
    if config["measure"]:
        measured = measured_gib(config, overrides, output_dir, job.on_cpu)
        result |= {"measured_gib": measured, "ratio": result["planned_gib"] / measured}
        rows = {"planned": f"{result['planned_gib']:.3f} GiB", "measured": f"{measured:.3f} GiB"}
        show_table("Peak of a rank", rows | {"planned / measured": f"{result['ratio']:.3f}"})
    path = output_dir / "bench_memory.json"
    path.write_text(json.dumps(result, indent=1))
    say(f"figures {path}")
    return result


def show(result: dict[str, Any], job: Job, planned: Plan, config: dict[str, Any]) -> None:
    """The parts and the sum."""
    gib = result["gib"]
    rows = {
        "parameters": f"{gib['parameters']:8.2f} GiB   of {job.sizes.total:,} in all",
        "gradients": f"{gib['gradients']:8.2f} GiB",
        "optimiser state": f"{gib['optimizer']:8.2f} GiB",
        "average (EMA)": f"{gib['average']:8.2f} GiB",
        "activations": f"{gib['activations']:8.2f} GiB   {planned.schedule.describe(job.depth)}",
        "buffers": f"{gib['buffers']:8.2f} GiB   weights gathered, gradients on their way",
        "while stepping": f"{gib['step']:8.2f} GiB   instead of activations",
        "worst moment": f"{gib['total']:8.2f} GiB   {planned.moment}",
    }
    if job.on_cpu:
        rows["process itself"] = f"{result['base_gib']:8.2f} GiB   measured: everything imported, nothing built"
        rows["total"] = f"{result['planned_gib']:8.2f} GiB"
    if planned.host:
        rows["in host memory"] = f"{gib['host']:8.2f} GiB   beside it, per process"
    fits = "fits" if result["planned_gib"] <= config["usable"] * config["device_gib"] else "does NOT fit"
    rows[f"of {config['device_gib']:g} GiB × {config['usable']:g}"] = f"{fits:>12}"
    rows["deepest that fits"] = f"{_number(result['largest_depth'])} blocks at {job.batch} samples"
    rows["largest batch that fits"] = f"{_number(result['largest_batch'])} samples at {job.depth} blocks"
    show_table(f"{job.depth} blocks, {job.world} × {job.batch} samples, per process", rows)


def _number(value: int) -> str:
    return f"{value:8}" + (" or more" if value == LARGEST else "")


def table_rows(job: Job, table: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
    """What other numbers of GPUs hold of other depths: GiB per GPU, samples per GPU and micro-batch."""
    keeping = lean = job
    if node := job.model.get("checkpointing"):
        keeping = replace(job, model=job.model | {"checkpointing": None})
        lean = replace(job, model=job.model | {"checkpointing": node | AUTO})
    for depth in table["depths"]:
        for gpus in table["gpus"]:
            states = plan(job.at(depth=depth, world=gpus))
            yield {
                "depth": depth,
                "parameters": job.at(depth=depth).sizes.total,
                "gpus": gpus,
                "states_gib": states.states / GIB,
                "left_gib": (limit - states.states) / GIB,
                "batch_keeping_all": largest_batch(keeping.at(depth=depth, world=gpus), limit),
                "batch": largest_batch(lean.at(depth=depth, world=gpus), limit),
            }


def show_other_sizes(rows: list[dict[str, Any]], job: Job, config: dict[str, Any]) -> None:
    title = f"GPUs of {config['device_gib']:g} GiB at width {job.model['width']}, per GPU"
    table = Table(title=title, title_justify="left")
    columns = ("blocks", "parameters", "GPUs", "states, GiB", "left, GiB", "largest batch, all kept", "recomputed")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        batches = [str(row[key]) if row[key] else "–" for key in ("batch_keeping_all", "batch")]
        sizes = [f"{row['states_gib']:.1f}", f"{max(0.0, row['left_gib']):.1f}"]
        table.add_row(str(row["depth"]), f"{row['parameters']:,}", str(row["gpus"]), *sizes, *batches)
    out = console()
    if not out.is_terminal:
        out.width = 200
    out.print(table, highlight=False)
