"""Draw pictures from a checkpoint: `python src/sample.py [ckpt_path=…] [classes=[3,7]] [count=8] [sampler=heun]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from mvsplit.evaluation.pictures import draw
from mvsplit.training.checkpoints import SavedRun
from mvsplit.training.run import Paths, TrainConfig
from mvsplit.utils import entry
from mvsplit.utils.config import build, check_config, to_plain
from mvsplit.utils.console import show_table
from mvsplit.utils.images import enlarge, picture_grid, save_png, to_uint8
from mvsplit.utils.rng import Seed
from mvsplit.utils.runs import find_checkpoint


@dataclass
class SampleConfig:
    """Top-level keys of `sample.yaml`."""

    task_name: str
    ckpt_path: str
    weights: Literal["ema", "raw"]
    seed: Seed
    classes: Annotated[list[NonNegativeInt], Len(1)] | None
    count: PositiveInt
    batch_size: PositiveInt
    sampler: dict[str, Any]
    paths: Paths


def sample(cfg: DictConfig) -> Path:
    """Write `grid.png` (a column per class) and every picture by itself into the run folder, which is returned."""
    config = to_plain(cfg)
    check_config(config, SampleConfig)
    output_dir = Path(config["paths"]["output_dir"])
    path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
    saved = SavedRun(path, config["weights"], TrainConfig)
    num_classes = saved.config["data"]["num_classes"]
    columns = min(10, num_classes)
    classes = config["classes"] or [i * num_classes // columns for i in range(columns)]
    labels = classes * config["count"]
    pictures = draw(saved, build(config["sampler"]), labels, config["seed"], config["batch_size"])
    for number, (label, picture) in enumerate(zip(labels, enlarge(to_uint8(pictures)), strict=True)):
        save_png(picture, output_dir / f"{number:05d}_class_{label}.png")
    grid = save_png(picture_grid(pictures, len(classes)), output_dir / "grid.png")
    rows = {"checkpoint": str(path.resolve()), "step": str(saved.step), "pictures": str(output_dir), "grid": str(grid)}
    show_table(f"{len(labels)} pictures drawn", rows)
    return output_dir


if __name__ == "__main__":
    entry.run(sample, "sample.yaml")
