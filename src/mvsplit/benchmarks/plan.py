"""The memory of a training run per process, computed from its composed config without building it.

`STATES` and `_buffers` hold the number of copies of parameters, gradients and optimiser state by strategy; `_moments`
adds up what exists at the same time. The result is the memory of all tensors at the peak of a training step. It leaves
out fragmentation, the CUDA context and NCCL (about 1 GiB together), validation and sampling. The activations of a block
are measured with the CPU's operators; fused GPU operators keep less.
"""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from mvsplit.benchmarks.model_stats import Activations, ModelStats, count_parameters, measure_activations
from mvsplit.models.recompute import Checkpointing, Schedule
from mvsplit.training.low_bit import BLOCK
from mvsplit.training.strategies import allowed_precisions
from mvsplit.training.zero_config import SUB_GROUP, BlockSizes, zero_settings
from mvsplit.utils.config import build
from mvsplit.utils.errors import UserError

SAMPLED_BATCHES = (64, 128)
"""Activations are measured at these sizes: they are linear in the batch (gradients in flight nearly so, below 8)."""
LARGEST = 2**14
"""Upper limit of the search for the largest depth and batch."""


@dataclass(frozen=True)
class States:
    """Bytes per parameter that a process holds, beside 4 of an average."""

    parameters: int
    gradients: int
    optimizer: float
    step: float
    """Temporary, in the optimiser step: the square root in AdamW, a copy of gradients or weights in float32."""


STATES = {
    ("zero3", 4): States(4, 4, 4 + 8, 4 + 4),  # its master weights are a second copy, updated from flat gradients
    ("zero3", 2): States(2, 4, 4 + 8, 4 + 4),  # gradients are accumulated in float32
    ("fsdp2", 4): States(4, 4, 8, 4),
    ("ddp", 4): States(4, 4, 8, 4),
    ("ddp", 2): States(2, 2, 8, 0),
}
"""States by strategy and bytes per weight. ZeRO-3: deepspeed/runtime/zero/stage3.py of 0.19.8."""
MOMENTS = {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 * 4 / BLOCK}
"""Bytes of a weight's two moments by `optim.moments`; 8 bits: with a scale for every 256 codes."""
ONE_TENSOR = 67
"""Temporary bytes per number of the largest tensor, where tensors are updated one by one: those of 8-bit moments and
bfloat16 weights, the most. A compiled update has fewer."""


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a config that determine its memory."""

    model: dict[str, Any]
    stats: ModelStats
    depth: int
    strategy: str
    """zero3, fsdp2, or ddp (also for a single process)."""
    options: dict[str, Any]
    """Keys of the strategy's node."""
    world: int
    batch: int
    """Samples of a micro-batch per process."""
    accumulate: int
    weight_bytes: int
    """Bytes of a stored weight."""
    compute_bytes: int
    """Bytes of a weight as it is gathered and used."""
    autocast: bool
    average: bool
    measured: int
    """Blocks whose writer gradients are measured in the same step."""
    moments: str
    """`optim.moments`, or `muon`."""
    in_backward: bool
    on_cpu: bool

    @property
    def one_by_one(self) -> bool:
        """Whether tensors are updated one by one, not all at once."""
        low_bit = self.moments != "float32" or self.weight_bytes == 2
        return self.strategy == "ddp" and (low_bit or self.in_backward)

    def states(self) -> States:
        """Of this run, per parameter."""
        states = STATES[self.strategy, self.weight_bytes]
        if self.moments == "muon":  # a momentum for each matrix of the blocks, and they hold nearly everything
            of_blocks = self.depth * self.stats.block / self.stats.total
            states = replace(states, optimizer=4 * of_blocks + 8 * (1 - of_blocks))
        elif self.moments != "float32":
            states = replace(states, optimizer=MOMENTS[self.moments])
        if self.one_by_one:
            states = replace(states, step=ONE_TENSOR * self.stats.largest / self.stats.total)
        return replace(states, gradients=0) if self.in_backward else states

    def at(self, **changes: Any) -> "PlannedRun":
        """The same run with another depth, batch or number of processes."""
        stats = self.stats.at_depth(self.depth, changes.get("depth", self.depth))
        return replace(self, stats=stats, **changes)


def read_planned_run(config: dict[str, Any]) -> PlannedRun:
    """Read a checked training config.

    Raises:
        UserError: if the number of devices is `auto`, or for an unsupported strategy or precision.
    """
    trainer, model, optim = config["trainer"], config["model"], config["optim"]
    devices, accumulate = trainer["devices"], trainer["accumulate_grad_batches"]
    if devices == "auto":
        raise UserError("trainer.devices = auto: the planner requires a number")
    world = (len(devices) if isinstance(devices, list) else devices) * trainer["num_nodes"]
    node = trainer["strategy"]
    options = node if isinstance(node, dict) else {}
    names = {"ZeRO3": "zero3", "FSDP2": "fsdp2", "DDPStrategy": "ddp", "auto": "ddp", "ddp": "ddp"}
    name = options.get("_target_", node).rpartition(".")[2]
    if name not in names:
        raise UserError(f"trainer.strategy = {name}: must be one of {', '.join(names)} for the planner")
    precision = str(trainer["precision"])
    zero3 = names[name] == "zero3"
    known = [one for one in allowed_precisions(node) if one != "64-true"]  # not in `STATES`
    if precision not in known:
        allowed = ", ".join(known)
        raise UserError(f"trainer.precision = {precision}: must be one of {allowed} for this strategy in the planner")
    half = "16" in precision and (zero3 or "true" in precision)
    policy = names[name] == "fsdp2" and "16" in precision  # bf16 computation with float32 shards
    callbacks = {node["_target_"].rpartition(".")[2]: node for node in (config["callbacks"] or {}).values() if node}
    probe = callbacks.get("StepMonitor", {}).get("probe")
    return PlannedRun(
        model=model,
        stats=count_parameters(model),
        depth=model["depth"],
        strategy=names[name],
        options=options,
        world=world,
        batch=config["data"]["batch_size"] // (world * accumulate),
        accumulate=accumulate,
        weight_bytes=2 if half else 4,
        compute_bytes=2 if half or policy else 4,
        autocast="mixed" in precision and not zero3 and not policy,
        average="EMA" in callbacks,
        measured=(probe["blocks"] if probe["every"] else probe["watched"]) if probe else 0,
        moments="muon" if optim["_target_"].endswith(".Muon") else optim.get("moments", "float32"),
        in_backward=optim.get("in_backward", False),
        on_cpu=trainer["accelerator"] == "cpu",
    )


def _activations(run: PlannedRun) -> Activations:
    dtype = torch.bfloat16 if run.compute_bytes == 2 else torch.float32
    low, high = (_measured(json.dumps(run.model, sort_keys=True), n, dtype, run.autocast) for n in SAMPLED_BATCHES)
    share = (run.batch - SAMPLED_BATCHES[0]) / (SAMPLED_BATCHES[1] - SAMPLED_BATCHES[0])
    line = {name: round(size + share * (getattr(high, name) - size)) for name, size in vars(low).items()}
    return Activations(**{name: max(0, size) for name, size in line.items()})


@lru_cache
def _measured(model: str, batch: int, dtype: torch.dtype, autocast: bool) -> Activations:
    return measure_activations(json.loads(model), batch, dtype, autocast)


@dataclass(frozen=True)
class Buffers:
    """Bytes of gathered weights and of gradients in flight."""

    always: int = 0
    forward: int = 0
    backward: int = 0
    gathered: int = 1
    """Blocks whose weights are gathered at the same time."""


def _buffers(run: PlannedRun, recomputed: int) -> Buffers:
    block = run.stats.block * run.compute_bytes
    if run.strategy == "zero3":
        settings = zero_settings(BlockSizes(run.stats.block, recomputed), run.options["prefetch_blocks"])
        bucket = settings["reduce_bucket_size"] * 4
        # DeepSpeed prefetches up to its limit. Beside that, a block's gradients in the weights' type and in float32.
        live = min(settings["stage3_max_live_parameters"], run.stats.total) * run.weight_bytes
        return Buffers(always=bucket, forward=live, backward=live + block + run.stats.block * 4)
    if run.strategy == "fsdp2":
        gathered = min(run.depth, run.options["blocks_per_group"])
        group = gathered * block  # and a flat copy while gathering; later gradients, and a flat copy in float32
        flat = gathered * run.stats.block * 4
        return Buffers(forward=2 * group, backward=3 * group + flat, gathered=gathered)
    if run.world > 1 and not run.options.get("gradient_as_bucket_view"):
        return Buffers(always=run.stats.total * run.weight_bytes)  # buckets hold a second copy of every gradient
    return Buffers()


@dataclass(frozen=True)
class Plan:
    """Bytes per process, on its device. `total` is the peak of a step, when not all of the parts exist."""

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
    """Bytes in host memory."""
    schedule: Schedule

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average


def _moments(
    run: PlannedRun, made: Activations, schedule: Schedule, buffers: Buffers, gradients: int, inputs: int, measures: int
) -> dict[str, int]:
    """Bytes of gradients, activations and gathered weights at the moments where one of them peaks.

    Args:
        gradients: of all parameters.
        inputs: of the recomputed groups, if they stay on the device.
        measures: held by the stability probe at the end of the backward pass.
    """
    kept, group = run.depth - schedule.recomputed, schedule.largest_group
    # Between forward and backward, Lightning frees the last step's gradients, unless it accumulates them.
    stay = gradients if run.strategy == "zero3" or run.accumulate > 1 else 0
    blocks = {  # moment: number of blocks holding activations, other bytes
        "end of the forward pass": (kept, gradients + inputs + schedule.recomputed * made.casts + buffers.forward),
        "start of the backward pass": (max(kept, group), stay + inputs + made.working + buffers.forward),
        "first gradients": (max(kept - buffers.gathered, group), stay + inputs + made.working + buffers.backward),
        "end of the backward pass": (max(min(1, kept), group), gradients + measures + made.working + buffers.backward),
    }
    return {moment: count * made.block + other + made.around for moment, (count, other) in blocks.items()}


def plan(run: PlannedRun, made: Activations | None = None) -> Plan:
    """The memory of a run. made: its activations; None measures them."""
    made = made or _activations(run)
    share = -(-run.stats.total // (run.world if run.strategy in ("zero3", "fsdp2") else 1))
    per = run.states()
    sizes = {name: round(share * size) for name, size in vars(per).items()} | {"average": share * 4 * run.average}
    if run.strategy == "zero3":
        sizes["step"] = min(sizes["step"], round(SUB_GROUP * per.step))
    offloaded: list[str] = []
    if run.options.get("offload_optimizer", "none") != "none" and not run.on_cpu:
        offloaded += ["gradients", "optimizer"]
        sizes["step"] = 0
    if run.options.get("offload_parameters", "none") != "none" and not run.on_cpu:
        offloaded += ["parameters", "average"]
    host = sum(sizes[name] for name in offloaded)
    sizes |= dict.fromkeys(offloaded, 0)

    node = run.model.get("checkpointing")
    checkpointing: Checkpointing = build(node) if node else Checkpointing()
    buffers = _buffers(run, checkpointing.likely_group(run.depth))
    if run.in_backward:  # a tensor's update is beside the activations, not after them
        buffers, sizes["step"] = replace(buffers, backward=buffers.backward + sizes["step"]), 0
    schedule = checkpointing.schedule(run.depth, made.block, made.trunk)
    inputs = schedule.groups * made.trunk
    if checkpointing.offload and not run.on_cpu:
        host, inputs = host + inputs, 0
    if run.strategy == "zero3":
        # Autograd keeps a view of each weight for the backward pass, and with it the gathered storage. Recomputed
        # blocks do so one group at a time; the others are in effect not sharded until their backward pass.
        made = replace(made, block=made.block + run.stats.block * run.weight_bytes)
    # Two float32 matrices for each writer, from its backward pass until the gradient is complete.
    measures = 2 * 4 * min(run.measured, run.depth) * run.stats.writers
    moments = _moments(run, made, schedule, buffers, sizes["gradients"], inputs, measures)
    moments["optimiser step"] = sizes["gradients"] + sizes["step"]
    moment = max(moments, key=lambda name: moments[name])
    return Plan(
        **sizes,
        activations=inputs + max(run.depth - schedule.recomputed, schedule.largest_group) * made.block + made.around,
        buffers=buffers.always + max(buffers.forward, buffers.backward + measures),
        total=sizes["parameters"] + sizes["optimizer"] + sizes["average"] + buffers.always + moments[moment],
        moment=moment,
        host=host,
        schedule=schedule,
    )


def largest(fits: Callable[[int], bool], limit: int = LARGEST) -> int:
    """The largest fitting number up to the limit, given that all smaller ones fit; 0 if none does."""
    if not fits(1):
        return 0
    high = 2
    while high <= limit and fits(high):
        high *= 2
    return bisect_left(range(high // 2, min(high, limit + 1)), True, key=lambda n: not fits(n)) + high // 2 - 1


def largest_fitting(key: Literal["depth", "batch"], run: PlannedRun, limit: float) -> int:
    """The largest number of blocks, or of samples per process and micro-batch, that fits into `limit` bytes.

    With `auto`, that of the schedule with the least memory: the budget is for speed and does not decide what fits.
    """
    node = run.model.get("checkpointing")
    if node and node["every"] == "auto":
        run = replace(run, model=run.model | {"checkpointing": node | {"budget_gib": None}})
    return largest(lambda size: plan(run.at(**{key: size})).total <= limit)
