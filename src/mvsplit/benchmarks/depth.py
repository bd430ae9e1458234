"""The cost of depth: time to build and to train at several depths, under ZeRO-3 and for comparison under DDP.

Each run is an ordinary `python src/train.py` on two CPU processes, with a callback that records the duration of each
step. The runs take turns, so that other load on the machine affects all of them.
"""

import json
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Len
from pydantic import PositiveInt
from rich.table import Column, Table

from mvsplit.benchmarks.common import RoundsConfig, save_figures, train_in_process
from mvsplit.utils.console import info, print_table, show_table
from mvsplit.utils.errors import UserError

Record = dict[str, Any]
"""The file of `callbacks.step_times`: `build_s`, `steps_s`, `peak_gib`."""
Tolerance = Annotated[float, Gt(1)]


@dataclass
class DepthLimits:
    growth: Tolerance
    spread: Tolerance
    ddp: Tolerance


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_depth.yaml`."""

    depths: Annotated[list[PositiveInt], Len(2)]
    steps: Annotated[int, Gt(2)]
    limits: DepthLimits
    overrides: list[str]


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Measure, print and save all figures (`bench_depth.json`).

    Raises:
        UserError: if a training run fails, with its last line.
    """
    runs: dict[str, dict[int, list[Record]]] = {"deepspeed": {}, "ddp": {}}
    for number in range(config["rounds"]):
        for depth in config["depths"]:
            for strategy, records in runs.items():
                info(f"round {number + 1}: {depth} blocks, {strategy}")
                folder = output_dir / f"{strategy}_{depth}_{number}"
                records.setdefault(depth, []).append(train(strategy, depth, folder, config))
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "runs": {strategy: {str(d): summary(r) for d, r in records.items()} for strategy, records in runs.items()},
    }
    result["holds"] = check_limits(result["runs"], config["limits"])
    show(result)
    save_figures(result, output_dir / "bench_depth.json")
    return result


def train(strategy: str, depth: int, folder: Path, config: dict[str, Any]) -> Record:
    """Run `src/train.py` and read its record."""
    folder.mkdir()
    steps = config["steps"]
    overrides = [
        f"trainer={strategy}", f"model.depth={depth}", f"seed={config['seed']}", f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}", "trainer.limit_val_batches=0", f"trainer.log_every_n_steps={steps}",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true",
        "callbacks=step_times", "logger=null", "test=false", f"paths.data_dir={config['paths']['data_dir']}",
        f"paths.log_dir={folder}", f"hydra.run.dir={folder}", *config["overrides"],
    ]  # fmt: skip
    # Two processes on two cores: more threads would only compete.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    status, last_line = train_in_process(overrides, threads)
    file = folder / "step_times.json"
    if status or not file.exists():
        raise UserError(f"training {depth} blocks with {strategy} ended with {status}: {last_line}")
    record: Record = json.loads(file.read_text())
    return record


def summary(records: list[Record]) -> dict[str, float]:
    """The fastest of the rounds: other load only ever slows a run down.

    Returns:
        `build_s`; `step_s`, the median step; `worst`, the longest step as a multiple of it; `peak_gib` of rank 0.
    """
    medians = [statistics.median(r["steps_s"]) for r in records]
    return {
        "build_s": min(r["build_s"] for r in records),
        "step_s": min(medians),
        "worst": min(max(r["steps_s"]) / median for r, median in zip(records, medians, strict=True)),
        "peak_gib": max(r["peak_gib"] for r in records),
    }


def check_limits(runs: dict[str, dict[str, dict[str, float]]], limits: dict[str, float]) -> dict[str, bool]:
    """Whether cost is linear in depth, no step is an outlier, and sharding stays within its limit."""
    zero, ddp = runs["deepspeed"], runs["ddp"]
    depths = sorted(zero, key=int)

    def growth(key: str) -> float:
        """The highest cost per block of a deeper network, over that of the shallowest."""
        first = zero[depths[0]][key] / int(depths[0])
        return max(zero[depth][key] / int(depth) / first for depth in depths[1:])

    return {
        "build_linear": growth("build_s") <= limits["growth"],
        "step_linear": growth("step_s") <= limits["growth"],
        "no_slow_step": max(run["worst"] for run in zero.values()) <= limits["spread"],
        "near_ddp": max(zero[depth]["step_s"] / ddp[depth]["step_s"] for depth in depths) <= limits["ddp"],
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    runs = result["runs"]
    names = ("blocks", "build s", "step s", "ms per block", "longest step", "DDP step s", "×", "peak GiB")
    columns = [Column(name, justify="right") for name in names]
    table = Table(*columns, title="ZeRO-3 on two CPU processes", title_justify="left")
    for depth, zero in runs["deepspeed"].items():
        ddp = runs["ddp"][depth]["step_s"]
        table.add_row(
            depth, f"{zero['build_s']:.1f}", f"{zero['step_s']:.2f}", f"{1000 * zero['step_s'] / int(depth):.2f}",
            f"{zero['worst']:.2f} × median", f"{ddp:.2f}", f"{zero['step_s'] / ddp:.2f}", f"{zero['peak_gib']:.2f}",
        )  # fmt: skip
    print_table(table)
    show_table("Within the limits", {name: "yes" if held else "NO" for name, held in result["holds"].items()})
