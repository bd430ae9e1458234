"""What a training run needs per process, computed from its composed config before anything is built.

How many copies of parameters, gradients and optimiser state a strategy holds is in `STATES` and `_buffers`; what is
there at the same time, in `_moments`. Counted is what tensors hold at the worst moment of a training step. Not counted:
what the allocator loses to fragments, the CUDA context and NCCL (about 1 GiB together), validation and pictures. What a
block keeps is measured with the CPU's operators; a GPU's fused ones keep less.
"""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from mvsplit.benchmarks.sizes import Activations, Sizes, count_parameters, measure_activations
from mvsplit.models.recompute import Checkpointing, Schedule
from mvsplit.training.strategies import allowed_precisions
from mvsplit.training.zero_config import SUB_GROUP, zero_settings
from mvsplit.training.zero_config import Sizes as ZeroSizes
from mvsplit.utils.config import build
from mvsplit.utils.errors import UserError

SAMPLED_BATCHES = (64, 128)
"""Where activations are measured; what they take is linear in the batch (gradients in flight only nearly, below 8)."""
LARGEST = 2**14
"""Where the search for the largest depth and batch ends."""


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
    ("zero3", 2): States(2, 4, 4 + 8, 4, 4 + 4),  # gradients are added up in float32
    ("fsdp2", 4): States(4, 4, 8, 4, 4),
    ("ddp", 4): States(4, 4, 8, 4, 4),
    ("ddp", 2): States(2, 2, 4, 4, 4),
}
"""By strategy and bytes of a weight. ZeRO-3: deepspeed/runtime/zero/stage3.py of 0.19.8."""


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
    accumulate: int
    weight_bytes: int
    """Of a weight as it is kept. compute_bytes: as it is gathered and computed with."""
    compute_bytes: int
    autocast: bool
    average: bool
    measured: int
    """Blocks whose writers' gradients are measured at once."""
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
    known = [allowed for allowed in allowed_precisions(node) if allowed != "64-true"]  # `STATES` has no line for it
    if precision not in known:
        raise UserError(f"trainer.precision = {precision}: with this strategy the planner knows {', '.join(known)}")
    half = "16" in precision and (zero3 or "true" in precision)
    policy = names[name] == "fsdp2" and "16" in precision  # computes in bf16 with float32 shards
    callbacks = {node["_target_"].rpartition(".")[2]: node for node in (config["callbacks"] or {}).values() if node}
    probe = callbacks.get("StabilityProbe")
    return Job(
        model=model,
        sizes=count_parameters(model),
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
        on_cpu=trainer["accelerator"] == "cpu",
    )


def _activations(job: Job) -> Activations:
    dtype = torch.bfloat16 if job.compute_bytes == 2 else torch.float32
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


def _buffers(job: Job, recomputed: int) -> Buffers:
    block = job.sizes.block * job.compute_bytes
    if job.strategy == "zero3":
        settings = zero_settings(ZeroSizes(job.sizes.block, recomputed), job.options["prefetch_blocks"])
        bucket = settings["reduce_bucket_size"] * 4
        # DeepSpeed gathers as far ahead as it may: what it may hold is what it holds. Then a block's gradients, in the
        # weights' type and in float32.
        live = min(settings["stage3_max_live_parameters"], job.sizes.total) * job.weight_bytes
        return Buffers(always=bucket, forward=live, backward=live + block + job.sizes.block * 4)
    if job.strategy == "fsdp2":
        gathered = min(job.depth, job.options["blocks_per_group"])
        group = gathered * block  # with a flat copy while it is gathered; then its gradients, and flat in float32
        flat = gathered * job.sizes.block * 4
        return Buffers(forward=2 * group, backward=3 * group + flat, gathered=gathered)
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


def _moments(
    job: Job, made: Activations, schedule: Schedule, buffers: Buffers, gradients: int, inputs: int, measures: int
) -> dict[str, int]:
    """Bytes of gradients, activations and gathered weights where one of them is at its most.

    Args:
        gradients: of all parameters. inputs: of the recomputed groups, as far as they stay on the device. measures:
            what `callbacks.stability` holds at the end of the backward pass.
    """
    kept, group = job.depth - schedule.recomputed, schedule.largest_group
    # Lightning gives the last step's gradients up between forward and backward, unless they are to be added to.
    stay = gradients if job.strategy == "zero3" or job.accumulate > 1 else 0
    blocks = {  # that hold their activations, and what else is there
        "end of the forward pass": (
            kept,
            gradients + inputs + schedule.recomputed * made.casts + buffers.forward,
        ),
        "start of the backward pass": (max(kept, group), stay + inputs + made.working + buffers.forward),
        "first gradients": (max(kept - buffers.gathered, group), stay + inputs + made.working + buffers.backward),
        "end of the backward pass": (max(min(1, kept), group), gradients + measures + made.working + buffers.backward),
    }
    return {moment: count * made.block + other + made.around for moment, (count, other) in blocks.items()}


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
        step = min(step, SUB_GROUP * per.step)
    if job.options.get("offload_optimizer", "none") != "none" and not job.on_cpu:
        host, gradients, optimizer, step = host + gradients + optimizer, 0, 0, 0
    if job.options.get("offload_parameters", "none") != "none" and not job.on_cpu:
        host, parameters, average = host + parameters + average, 0, 0

    node = job.model.get("checkpointing")
    checkpointing: Checkpointing = build(node) if node else Checkpointing()
    buffers = _buffers(job, checkpointing.likely_group(job.depth))
    schedule = checkpointing.schedule(job.depth, made.block, made.trunk)
    inputs = schedule.groups * made.trunk
    if checkpointing.offload and not job.on_cpu:
        host, inputs = host + inputs, 0
    if job.strategy == "zero3":
        # Autograd keeps a view of each weight for the backward pass, and with it what was gathered. Recomputed blocks
        # have that for one group at a time; others are as if they were not sharded, until their backward pass.
        made = replace(made, block=made.block + job.sizes.block * job.weight_bytes)
    # Two matrices in float32 for each writer, from its backward pass until the gradient is complete.
    measures = 2 * 4 * min(job.measured, job.depth) * job.sizes.writers
    moments = _moments(job, made, schedule, buffers, gradients, inputs, measures)
    moments["optimiser step"] = gradients + step
    moment = max(moments, key=lambda name: moments[name])
    return Plan(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        activations=inputs + max(job.depth - schedule.recomputed, schedule.largest_group) * made.block + made.around,
        buffers=buffers.always + max(buffers.forward, buffers.backward + measures),
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
