"""Plan the memory of a training run and, optionally, compare it with the measured peak."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le, Len
from pydantic import PositiveFloat, PositiveInt
from rich.table import Column, Table

from mvsplit.benchmarks.common import save_figures, train_in_process
from mvsplit.benchmarks.plan import LARGEST, Plan, PlannedRun, largest_fitting, plan, read_planned_run
from mvsplit.training.settings import TrainConfig
from mvsplit.utils.console import print_table, show_table
from mvsplit.utils.errors import UserError

GIB = 2**30
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For measured CPU runs: returns freed tensors to the system. By default, glibc raises this threshold up to 32 MiB and
keeps smaller freed blocks, which adds to the peak (10 to 18 % in two runs of 1.5 and 2.4 GiB)."""
AUTO = {"every": "auto", "fraction": 1.0, "budget_gib": None}
SHORT_RUN = [
    "task_name=measured", "logger=csv", "trainer.max_steps=3", "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0", "test=false",
]  # fmt: skip
SILENT = ("checkpoint", "stop_signals", "sample_grid")
"""Callbacks switched off in the short run. It reaches the peak: optimiser state exists from the second step on."""


@dataclass
class TableConfig:
    gpus: Annotated[list[Annotated[PositiveInt, Le(10**6)]], Len(1)]
    depths: Annotated[list[Annotated[PositiveInt, Le(10**5)]], Len(1)]


@dataclass
class Config(TrainConfig):
    """Top-level keys of `bench_memory.yaml`, beside those of `train.yaml`."""

    device_gib: PositiveFloat
    usable: Annotated[float, Gt(0), Le(1)]
    measure: bool
    table: TableConfig


LARGEST_PLANNED = {("model", "depth"): 10**5, ("model", "width"): 10**6, ("data", "batch_size"): 10**7}


def check_sizes(config: dict[str, Any]) -> None:
    """Raise `UserError` for networks that cannot be planned, or are too large for it."""
    if "val_times" not in config["module"]:
        raise UserError(f"module = {config['module']['_target_']}: memory can only be planned for module=flow")
    for (group, key), most in LARGEST_PLANNED.items():
        if (size := config[group].get(key, 0)) > most:
            raise UserError(f"{group}.{key} = {size}: must be at most {most}")
    if max(config["data"]["image_size"]) > 10**5:
        raise UserError(f"data.image_size = {config['data']['image_size']}: must be at most {10**5}")


def base_gib(run: PlannedRun, overrides: list[str], folder: Path) -> float:
    """Memory of a CPU process of such a run without its network, in GiB: the peak of a run with `model=tiny`."""
    trainer = [o for o in overrides if o.lstrip("+").startswith("trainer")]
    tiny = ["data=digits", "model=tiny", f"data.batch_size={16 * run.accumulate}"]
    few = ["trainer.num_nodes=1", f"trainer.devices={min(run.world, 2)}"]  # two show what another rank adds
    return measured_gib({}, [*tiny, *trainer, *few], folder / "base", on_cpu=True)


def measured_gib(config: dict[str, Any], overrides: list[str], folder: Path, on_cpu: bool) -> float:
    """The peak of the first rank in a short run of `src/train.py`, on the host or on the GPU, in GiB.

    Args:
        config: of the planned run.
        overrides: of `train.yaml` for that config.
        folder: for the run's output.
        on_cpu: measure host memory.

    Raises:
        UserError: if the run fails or logs no peak.
    """
    callbacks = config.get("callbacks", SILENT) or {}
    silent = [f"callbacks.{name}=null" for name in SILENT if name in callbacks]
    short = [*overrides, *SHORT_RUN, *silent, f"paths.log_dir={folder}"]
    status, last_line = train_in_process(short, THRESHOLD if on_cpu else {})
    if status:
        raise UserError(f"measure = true: the run failed: {last_line}")
    tag = "memory/host_peak_gib" if on_cpu else "memory/device_peak_gib"
    files = folder.glob("measured/runs/*/csv/version_0/metrics.csv")
    peaks = [float(row[tag]) for file in files for row in csv.DictReader(file.open()) if row.get(tag)]
    if not peaks:
        raise UserError(f"measure = true: the run logged no {tag}; callbacks.throughput is required")
    return max(peaks)


def report(config: dict[str, Any], overrides: list[str], output_dir: Path) -> dict[str, Any]:
    """Plan, print, with `measure` compare, and save the figures (`bench_memory.json`).

    Args:
        config: checked, of `Config`.
        overrides: of `train.yaml` for the same training config.
    """
    run = read_planned_run(config)
    if config["measure"] and not run.on_cpu and not torch.cuda.is_available():  # planning does not need one
        raise UserError("measure = true: this machine has no usable GPU; use trainer.accelerator=cpu")
    planned = plan(run)
    limit = config["usable"] * config["device_gib"] * GIB
    base = base_gib(run, overrides, output_dir) if run.on_cpu else 0.0
    result: dict[str, Any] = {
        "parameters": run.stats.total,
        "batch": run.batch,
        "world": run.world,
        "gib": {name: size / GIB for name, size in vars(planned).items() if isinstance(size, int)},
        "moment": planned.moment,
        "recomputed": planned.schedule.recomputed,
        "every": planned.schedule.every,
        "base_gib": base,
        "planned_gib": base + planned.total / GIB,
        "largest_depth": largest_fitting("depth", run, limit - base * GIB),
        "largest_batch": largest_fitting("batch", run, limit - base * GIB),
    }
    show(result, run, planned, config)
    if not run.on_cpu and config["table"] and not run.in_backward:  # which one process alone can do
        result["table"] = list(table_rows(run, config["table"], limit))
        show_other_sizes(result["table"], run, config)
    if config["measure"]:
        measured = measured_gib(config, overrides, output_dir, run.on_cpu)
        result |= {"measured_gib": measured, "ratio": result["planned_gib"] / measured}
        rows = {"planned": f"{result['planned_gib']:.3f} GiB", "measured": f"{measured:.3f} GiB"}
        show_table("Peak of a rank", rows | {"planned / measured": f"{result['ratio']:.3f}"})
    save_figures(result, output_dir / "bench_memory.json")
    return result


def show(result: dict[str, Any], run: PlannedRun, planned: Plan, config: dict[str, Any]) -> None:
    """Print the parts and their sum."""
    gib = result["gib"]
    rows = {
        "parameters": f"{gib['parameters']:8.2f} GiB   of {run.stats.total:,} in all",
        "gradients": f"{gib['gradients']:8.2f} GiB",
        "optimiser state": f"{gib['optimizer']:8.2f} GiB",
        "average (EMA)": f"{gib['average']:8.2f} GiB",
        "activations": f"{gib['activations']:8.2f} GiB   {planned.schedule.describe(run.depth)}",
        "buffers": f"{gib['buffers']:8.2f} GiB   gathered weights, gradients in flight, measures",
        "optimiser step": f"{gib['step']:8.2f} GiB   instead of activations",
        "peak": f"{gib['total']:8.2f} GiB   {planned.moment}",
    }
    if run.on_cpu:
        rows["process itself"] = f"{result['base_gib']:8.2f} GiB   measured in a run of model=tiny"
        rows["total"] = f"{result['planned_gib']:8.2f} GiB"
    if planned.host:
        rows["in host memory"] = f"{gib['host']:8.2f} GiB   per process"
    fits = "fits" if result["planned_gib"] <= config["usable"] * config["device_gib"] else "does NOT fit"
    rows[f"of {config['device_gib']:g} GiB × {config['usable']:g}"] = f"{fits:>12}"
    rows["deepest that fits"] = f"{_number(result['largest_depth'])} blocks at {run.batch} samples"
    rows["largest batch that fits"] = f"{_number(result['largest_batch'])} samples at {run.depth} blocks"
    show_table(f"{run.depth} blocks, {run.world} × {run.batch} samples, per process", rows)


def _number(value: int) -> str:
    return f"{value:8}" + (" or more" if value == LARGEST else "")


def table_rows(run: PlannedRun, table: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
    """GiB per GPU, and samples per GPU and micro-batch, for other numbers of GPUs and depths."""
    keeping = lean = run
    if node := run.model.get("checkpointing"):
        keeping = replace(run, model=run.model | {"checkpointing": None})
        lean = replace(run, model=run.model | {"checkpointing": node | AUTO})
    for depth in table["depths"]:
        for gpus in table["gpus"]:
            states = plan(run.at(depth=depth, world=gpus))
            yield {
                "depth": depth,
                "parameters": run.at(depth=depth).stats.total,
                "gpus": gpus,
                "states_gib": states.states / GIB,
                "left_gib": (limit - states.states) / GIB,
                "batch_keeping_all": largest_fitting("batch", keeping.at(depth=depth, world=gpus), limit),
                "batch": largest_fitting("batch", lean.at(depth=depth, world=gpus), limit),
            }


def show_other_sizes(rows: list[dict[str, Any]], run: PlannedRun, config: dict[str, Any]) -> None:
    width = f" at width {run.model['width']}" if "width" in run.model else ""
    title = f"GPUs of {config['device_gib']:g} GiB{width}, per GPU"
    columns = ("blocks", "parameters", "GPUs", "states, GiB", "left, GiB", "largest batch, all kept", "recomputed")
    table = Table(*(Column(name, justify="right") for name in columns), title=title, title_justify="left")
    for row in rows:
        batches = [str(row[key]) if row[key] else "–" for key in ("batch_keeping_all", "batch")]
        sizes = [f"{row['states_gib']:.1f}", f"{max(0.0, row['left_gib']):.1f}"]
        table.add_row(str(row["depth"]), f"{row['parameters']:,}", str(row["gpus"]), *sizes, *batches)
    print_table(table)
