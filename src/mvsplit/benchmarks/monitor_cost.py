"""What the step monitor costs: steps without it, with the measures of every step, and with all measures.

One run, in which the three kinds of steps take turns: other load on the machine affects all of them alike.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim import Optimizer

from mvsplit.benchmarks.common import save_figures
from mvsplit.callbacks.monitor import StepMonitor
from mvsplit.callbacks.stability_board import StabilityBoard
from mvsplit.utils.config import Seed, build
from mvsplit.utils.console import info, show_table

KINDS = ("without", "cheap", "full")


@dataclass
class LimitsConfig:
    cheap: PositiveFloat
    full: PositiveFloat


@dataclass
class Config:
    """Top-level keys of `bench_stability.yaml`."""

    task_name: str
    ckpt_path: None
    seed: Seed
    steps: Annotated[int, Gt(3 * len(KINDS))]
    limits: LimitsConfig
    overrides: list[str]
    paths: Any


class Turns(StepMonitor):
    """A monitor that is off at one step, measures a little at another and everything at a third; times the steps."""

    seconds: dict[str, list[float]]

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        self.seconds = {kind: [] for kind in KINDS}

    def _kind(self, trainer: Trainer) -> str:
        turn, place = divmod(trainer.global_step, len(KINDS))
        # In another order each turn: the after-effects of a step (caches, drawing) affect all kinds alike.
        return random.Random(turn).sample(KINDS, len(KINDS))[place]

    def _is_full(self, trainer: Trainer) -> bool:
        return self._kind(trainer) == "full"

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._running, self._begun = self._kind(trainer), time.perf_counter()
        if self._running != "without":
            super().on_train_batch_start(trainer, module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, module: Any, loss: Tensor) -> None:
        if self._running != "without":
            super().on_before_backward(trainer, module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Optimizer) -> None:
        if self._running != "without":
            super().on_before_optimizer_step(trainer, module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.seconds[self._running].append(time.perf_counter() - self._begun)


class TimedBoard(StabilityBoard):
    """Draws after each full measurement, and keeps how long that took."""

    def __init__(self, depth_bins: int) -> None:
        super().__init__(1, depth_bins)
        self.seconds: list[float] = []

    def _draws(self, step: int, every: int, max_steps: int) -> bool:
        return True

    def _draw(self, step: int, path: Path, loggers: Sequence[Logger]) -> None:
        begun = time.perf_counter()
        super()._draw(step, path, loggers)
        self.seconds.append(time.perf_counter() - begun)


def measure(config: dict[str, Any], training: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """All figures, which are also logged and written to `bench_stability.json`.

    Args:
        config: of the benchmark.
        training: the checked config of a training run; its monitor's cadence counts.
        output_dir: where the file goes.
    """
    node = training["callbacks"]["monitor"]
    board = TimedBoard(node["board"]["depth_bins"])
    parts = {name: build(node[name]) for name in ("probe", "guard", "thresholds")}
    monitor = Turns(node["folder"], **parts, board=board)
    loggers = [build(logger) for logger in training["logger"].values()]
    off = {"enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer: Trainer = build(training["trainer"] | {"callbacks": [monitor], "logger": loggers} | off)
    info(f"{config['steps']} steps, in turns of three kinds: {', '.join(KINDS)}")
    trainer.fit(build(training["module"]), datamodule=build(training["data"]))
    every, images_every = node["probe"]["every"], node["board"]["images_every"]
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        **shares(monitor.seconds, board.seconds, every, images_every),
    }
    result["holds"] = {kind: result[f"{kind}_share"] <= limit for kind, limit in config["limits"].items()}
    rows = {
        "a step without the monitor": f"{result['without_s']:.3f} s",
        "with the measures of every step": f"{result['cheap_s']:.3f} s, {100 * result['cheap_share']:+.1f} %",
        "with all measures": f"{result['full_s']:.3f} s",
        "drawing": f"{result['drawing_s']:.2f} s",
        f"together, if all are taken every {every} steps and drawn every {every * images_every}": (
            f"{100 * result['full_share']:+.1f} %"
        ),
    }
    show_table("Cost of the monitor", rows)
    show_table("Within the limits", {name: "yes" if held else "NO" for name, held in result["holds"].items()})
    save_figures(result, output_dir / "bench_stability.json")
    return result


def shares(seconds: dict[str, list[float]], drawing: list[float], every: int, images_every: int) -> dict[str, float]:
    """Medians, and what the monitor adds to a step as a share of it; the first three turns are left out."""
    turns = min(map(len, seconds.values()))  # the last one may be incomplete
    median = {kind: statistics.median(times[3:turns]) for kind, times in seconds.items()}
    median["drawing"] = statistics.median(drawing[3:])
    # Neighbouring steps are compared: the machine is the same for both.
    cheap = statistics.median(c - w for c, w in zip(seconds["cheap"][3:], seconds["without"][3:], strict=False))
    full = statistics.median(f - w for f, w in zip(seconds["full"][3:], seconds["without"][3:], strict=False))
    amortised = cheap + ((full - cheap) + median["drawing"] / images_every) / every
    return {f"{name}_s": value for name, value in median.items()} | {
        "cheap_share": cheap / median["without"],
        "full_share": amortised / median["without"],
    }
