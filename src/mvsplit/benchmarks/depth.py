"""What depth costs: construction and steps at several depths under ZeRO-3, and beside two-rank DDP.

Each run is `python src/train.py` as anyone starts it, on two CPU processes, with a callback that writes down how long
each step took. The runs take turns, so that other load on the machine meets all of them.
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
from rich.table import Table

from mvsplit.benchmarks.common import RoundsConfig, train_apart
from mvsplit.utils.console import print_table, say, show_table
from mvsplit.utils.errors import UserError

Record = dict[str, Any]
"""What `callbacks.step_times` wrote: `build_s`, `steps_s`, `peak_gib`."""
Tolerance = Annotated[float, Gt(1)]


@dataclass
class LimitsConfig:
    growth: Tolerance
    spread: Tolerance
    ddp: Tolerance


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_depth.yaml`."""

    depths: Annotated[list[PositiveInt], Len(2)]
    steps: Annotated[int, Gt(2)]
    limits: LimitsConfig
    overrides: list[str]


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """All figures, shown, written to `bench_depth.json` and returned.

    Raises:
        UserError: if a training run fails, with its last line.
    """
    runs: dict[str, dict[int, list[Record]]] = {"deepspeed": {}, "ddp": {}}
    for number in range(config["rounds"]):
        for depth in config["depths"]:
            for strategy, records in runs.items():
                say(f"round {number + 1}: {depth} blocks, {strategy}")
                folder = output_dir / f"{strategy}_{depth}_{number}"
                records.setdefault(depth, []).append(train(strategy, depth, folder, config))
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "runs": {strategy: {str(d): summary(r) for d, r in records.items()} for strategy, records in runs.items()},
    }
    result["holds"] = verdicts(result["runs"], config["limits"])
    path = output_dir / "bench_depth.json"
    path.write_text(json.dumps(result, indent=1))
    show(result, path)
    return result


def train(strategy: str, depth: int, folder: Path, config: dict[str, Any]) -> Record:
    """Run `src/train.py` and read what it wrote down."""
    folder.mkdir()
    steps = config["steps"]
    overrides = [
        f"trainer={strategy}", f"model.depth={depth}", f"seed={config['seed']}", f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}", "trainer.limit_val_batches=0", f"trainer.log_every_n_steps={steps}",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true",
        "callbacks=step_times", "logger=null", "test=false", f"paths.data_dir={config['paths']['data_dir']}",
        f"paths.log_dir={folder}", f"hydra.run.dir={folder}", *config["overrides"],
    ]  # fmt: skip
    # Two processes on two cores: more threads each would only wait for one another.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    status, last_line = train_apart(overrides, threads)
    file = folder / "step_times.json"
    if status or not file.exists():
        raise UserError(f"training {depth} blocks with {strategy} ended with {status}: {last_line}")
    record: Record = json.loads(file.read_text())
    return record


def summary(records: list[Record]) -> dict[str, float]:
    """The quietest of the rounds: other load only ever adds.

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


def verdicts(runs: dict[str, dict[str, dict[str, float]]], limits: dict[str, float]) -> dict[str, bool]:
    """Whether cost grows no faster than depth, no step stands out, and sharding costs no more than it may."""
    zero, ddp = runs["deepspeed"], runs["ddp"]
    depths = sorted(zero, key=int)

    def growth(key: str) -> float:
        """The most by which a block of a deeper network costs more than one of the shallowest."""
        first = zero[depths[0]][key] / int(depths[0])
        return max(zero[depth][key] / int(depth) / first for depth in depths[1:])

    return {
        "build_linear": growth("build_s") <= limits["growth"],
        "step_linear": growth("step_s") <= limits["growth"],
        "no_slow_step": max(run["worst"] for run in zero.values()) <= limits["spread"],
        "near_ddp": max(zero[depth]["step_s"] / ddp[depth]["step_s"] for depth in depths) <= limits["ddp"],
    }


def show(result: dict[str, Any], path: Path) -> None:
    """The tables."""
    runs = result["runs"]
    table = Table(title="ZeRO-3 on two CPU processes", title_justify="left")
    for column in ("blocks", "build s", "step s", "ms a block", "longest step", "DDP's step s", "×", "peak GiB"):
        table.add_column(column, justify="right")
    for depth, zero in runs["deepspeed"].items():
        ddp = runs["ddp"][depth]["step_s"]
        table.add_row(
            depth, f"{zero['build_s']:.1f}", f"{zero['step_s']:.2f}", f"{1000 * zero['step_s'] / int(depth):.2f}",
            f"{zero['worst']:.2f} × median", f"{ddp:.2f}", f"{zero['step_s'] / ddp:.2f}", f"{zero['peak_gib']:.2f}",
        )  # fmt: skip
    print_table(table)
    show_table("Within the limits", {name: "yes" if held else "NO" for name, held in result["holds"].items()})
    say(f"figures          {path}")
