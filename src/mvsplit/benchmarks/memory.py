"""Plan the memory of a training run, show it, and hold it against the peak of a real one."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le, Len
from pydantic import PositiveFloat, PositiveInt
from rich.table import Table

from mvsplit.benchmarks.common import train_apart
from mvsplit.benchmarks.plan import LARGEST, Job, Plan, largest_batch, largest_depth, plan, read_job
from mvsplit.training.run import TrainConfig
from mvsplit.utils.console import print_table, say, show_table
from mvsplit.utils.errors import UserError

GIB = 2**30
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For measured CPU runs: freed tensors go back to the system. Left to itself, glibc raises this threshold to 32 MiB and
keeps freed blocks below it: a peak would then show its leftovers too (10 to 18 % in two runs of 1.5 and 2.4 GiB)."""
AUTO = {"every": "auto", "fraction": 1.0, "budget_gib": None}
SHORT_RUN = [
    "task_name=measured", "logger=csv", "trainer.max_steps=3", "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0", "test=false",
]  # fmt: skip
SILENT = ("best", "every", "last", "sample_grid")
"""Steps that reach the peak (optimiser state is there from the second) and nothing else."""


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


# ----------------------------------------------------------------- measurement


def base_gib(job: Job, overrides: list[str], folder: Path) -> float:
    """What a CPU process of such a run holds without a network to speak of, in GiB: the peak of one of `model=tiny`."""
    trainer = [o for o in overrides if o.lstrip("+").startswith("trainer")]
    tiny = ["data=digits", "model=tiny", f"data.batch_size={16 * job.accumulate}"]
    few = ["trainer.num_nodes=1", f"trainer.devices={min(job.world, 2)}"]  # as many as show what another rank adds
    return measured_gib({}, [*tiny, *trainer, *few], folder / "base", on_cpu=True)


def measured_gib(config: dict[str, Any], overrides: list[str], folder: Path, on_cpu: bool) -> float:
    """The peak of the first rank in a short run of `src/train.py`, on the host or on the GPU, in GiB.

    Args:
        config: of the run that is planned. overrides: that lead to it from `train.yaml`. folder: for the run's output.

    Raises:
        UserError: if the run fails or tells no peak.
    """
    callbacks = config.get("callbacks", SILENT) or {}
    silent = [f"callbacks.{name}=null" for name in SILENT if name in callbacks]
    short = [*overrides, *SHORT_RUN, *silent, f"paths.log_dir={folder}"]
    status, last_line = train_apart(short, THRESHOLD if on_cpu else {})
    if status:
        raise UserError(f"measuring: the run failed: {last_line}")
    tag = "memory/host_peak_gib" if on_cpu else "memory/device_peak_gib"
    files = folder.glob("measured/runs/*/csv/version_0/metrics.csv")
    peaks = [float(row[tag]) for file in files for row in csv.DictReader(file.open()) if row.get(tag)]
    if not peaks:
        raise UserError(f"measuring: the run tells no {tag}; callbacks.throughput is needed")
    return max(peaks)


# --------------------------------------------------------------------- results


def report(config: dict[str, Any], overrides: list[str], output_dir: Path) -> dict[str, Any]:
    """Plan, show, and with `measure` compare; kept as `bench_memory.json` in the run folder, and returned.

    Args:
        config: checked, of `Config`. overrides: that lead to the same training config from `train.yaml`.
    """
    job = read_job(config)
    if config["measure"] and not job.on_cpu and not torch.cuda.is_available():  # to plan, it need not be there
        raise UserError("measure = true: this machine has no usable GPU; allowed here is trainer.accelerator=cpu")
    planned = plan(job)
    limit = config["usable"] * config["device_gib"] * GIB
    base = base_gib(job, overrides, output_dir) if job.on_cpu else 0.0
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
    if not job.on_cpu and config["table"]:
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
        "buffers": f"{gib['buffers']:8.2f} GiB   weights gathered, gradients on their way, measures",
        "while stepping": f"{gib['step']:8.2f} GiB   instead of activations",
        "worst moment": f"{gib['total']:8.2f} GiB   {planned.moment}",
    }
    if job.on_cpu:
        rows["process itself"] = f"{result['base_gib']:8.2f} GiB   measured: a run of model=tiny"
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
    print_table(table)
