"""What a save costs: how long training waits for one in the background and for one in the foreground.

One run, in which the kinds take turns: other load on the machine affects all of them alike.
"""

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from lightning import LightningModule, Trainer
from pydantic import PositiveInt

from mvsplit.benchmarks.common import save_figures
from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.training.checkpoint_io import FolderCheckpoints
from mvsplit.utils.config import Seed, build
from mvsplit.utils.console import info, show_table


@dataclass
class Config:
    """Top-level keys of `bench_save.yaml`."""

    task_name: str
    ckpt_path: None
    seed: Seed
    saves: Annotated[int, Ge(2)]
    steps_between: PositiveInt
    overrides: list[str]
    paths: Any


class TimedSaver(CheckpointSaver):
    """Saves in the background and in the foreground by turns; keeps how long training waited."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.pauses: dict[str, list[float]] = {"background": [], "foreground": []}
        self.steps: dict[str, list[float]] = {"alone": [], "beside a write": []}
        self.bytes = 0
        self._begun = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.steps["beside a write" if self._pending else "alone"].append(time.perf_counter() - self._begun)
        self.settle(trainer)
        if trainer.global_step % self.every_n_steps:
            return
        self.settle(trainer, wait=True)  # or a slow disk would be part of the next save's pause
        kind = "background" if self.async_save else "foreground"
        begun = time.perf_counter()
        self.save(trainer)
        self.pauses[kind].append(time.perf_counter() - begun)
        self.async_save = not self.async_save

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.settle(trainer, wait=True)
        self.bytes = sum(file.stat().st_size for file in (self.folder / "last.ckpt").iterdir())


def measure(config: dict[str, Any], training: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """All figures, shown, written to `bench_save.json` and returned.

    Args:
        config: the benchmark's.
        training: the checked config of the training run.
        output_dir: for the figures; its checkpoints are removed at the end.
    """
    saver = TimedSaver(folder=str(output_dir / "checkpoints"), every_n_steps=config["steps_between"], keep_last=1)
    callbacks = [build(training["callbacks"]["ema"]), saver]
    off = {"logger": False, "enable_checkpointing": True, "enable_progress_bar": False, "limit_val_batches": 0}
    built = {"callbacks": callbacks, "plugins": [FolderCheckpoints()]} | off
    trainer: Trainer = build(training["trainer"] | built)
    info(f"{2 * config['saves'] + 1} saves, one every {config['steps_between']} steps, in turns in both ways")
    trainer.fit(build(training["module"]), datamodule=build(training["data"]))
    shutil.rmtree(saver.folder)
    result = summarise(saver)
    rows = {
        "checkpoint": f"{result['gib']:.2f} GiB",
        "a step": f"{result['step_s']:.3f} s",
        "pause of a save in the foreground": f"{result['foreground_s']:.3f} s",
        "pause of a save in the background": f"{result['background_s']:.3f} s",
        "… as a multiple": f"{result['pause_ratio']:.3f}",
        "a step beside a background write, as a multiple": f"{result['slowdown']:.2f}",
    }
    show_table("What a save costs", rows)
    save_figures(result, output_dir / "bench_save.json")
    return result


def summarise(saver: TimedSaver) -> dict[str, float]:
    """Medians, without the first save, which creates the folder, and the first steps."""
    pause = {kind: statistics.median(times[kind == "background" :]) for kind, times in saver.pauses.items()}
    step = {kind: statistics.median(times[kind == "alone" :]) for kind, times in saver.steps.items()}
    return {
        "gib": saver.bytes / 2**30,
        "step_s": step["alone"],
        "background_s": pause["background"],
        "foreground_s": pause["foreground"],
        "pause_ratio": pause["background"] / pause["foreground"],
        "slowdown": step["beside a write"] / step["alone"],
    }
