"""Generate samples from a checkpoint: `python src/sample.py [ckpt_path=…] [classes=[3,7]] [count=8] [sampler=heun]`.

From captions: `python src/sample.py ckpt_path=… prompts=file.txt [protocol=released]`.
A whole set, on all devices of a trainer: `python src/sample.py num_samples=50000 [trainer=ddp_sim] [format=npz]`.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Len
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from mvsplit.data.folders import RESOLVERS
from mvsplit.training.settings import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import Seed, to_checked
from mvsplit.utils.console import info, show_table

if TYPE_CHECKING:  # imported below, after the config is checked, so that mistakes are reported quickly
    from mvsplit.python import Run


MAX_COLUMNS = 16
"""Of the grid, if there are many prompts."""


@dataclass
class SampleConfig:
    """Top-level keys of `sample.yaml`."""

    task_name: str
    ckpt_path: str
    weights: Literal["ema", "raw"]
    precision: Literal["float32", "bfloat16"]
    seed: Seed
    classes: Annotated[list[NonNegativeInt], Len(1)] | None
    prompts: list[str] | str | None
    image_size: Annotated[list[PositiveInt], Len(2, 2)] | None
    count: PositiveInt | None
    num_samples: PositiveInt | None
    labels: Literal["equal", "random"]
    format: Literal["png", "npz", "shards"]
    output: str | None
    batch_size: PositiveInt
    sampler: dict[str, Any]
    text_encoder: dict[str, Any]
    autoencoder: dict[str, Any] | None
    trainer: dict[str, Any]
    paths: Paths


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts."""
    return to_checked(cfg, SampleConfig)


def sample(cfg: DictConfig) -> Path:
    """Draw samples to look at, or a whole set; return the folder that they are written to."""
    config = checked(cfg)
    # Imported after the config is checked, so that mistakes are reported quickly.
    from mvsplit.python import load

    run = load(config["ckpt_path"], config["weights"], config["precision"], config["paths"]["log_dir"])
    return show(run, config) if config["num_samples"] is None else write_set(run, config)


def show(run: "Run", config: dict[str, Any]) -> Path:
    """Write `grid.png` (a column per class or prompt) and a file per sample to the run folder."""
    from mvsplit.evaluation.generation import check_conditions, draw
    from mvsplit.utils.images import enlarge, picture_grid, save_png, to_uint8

    output_dir = Path(config["paths"]["output_dir"])
    check_conditions(run, config["classes"], config["prompts"])
    generator = run.generator(config, whole_set=False)
    if generator.prompts is not None:
        chosen, kind, texts = list(range(len(generator.prompts.texts))), "prompt", generator.prompts.texts
    else:
        num_classes, texts = run.config["data"]["num_classes"], None
        columns = min(10, num_classes)
        chosen, kind = config["classes"] or [i * num_classes // columns for i in range(columns)], "class"
    labels = chosen * (config["count"] or (8 if texts is None else 1))
    samples = draw(generator, labels, config["batch_size"])
    if run.latents is not None and generator.decoder is None:
        info("latents are shown as colours, not decoded; give autoencoder=… to decode them")
    for number, (label, image) in enumerate(zip(labels, enlarge(to_uint8(samples)), strict=True)):
        save_png(image, output_dir / f"{number:05d}_{kind}_{label}.png", texts[label] if texts else None)
    grid = save_png(picture_grid(samples, min(len(chosen), MAX_COLUMNS)), output_dir / "grid.png")
    rows = {
        "checkpoint": str(run.path.resolve()),
        "step": str(run.step),
        "samples": str(output_dir),
        "grid": str(grid),
    }
    show_table(f"{len(labels)} samples", rows)
    return output_dir


def write_set(run: "Run", config: dict[str, Any]) -> Path:
    """Draw `num_samples` samples that do not exist yet, on all devices, and write them as `format`."""
    from mvsplit.callbacks.rank_watch import RankWatch
    from mvsplit.evaluation.generation import complete_set

    samples = complete_set(run.generator(config, whole_set=True), config, RankWatch())
    if samples is not None:
        place = samples.export(config["format"])
        rows = {"checkpoint": str(run.path.resolve()), "step": str(run.step), "written to": str(place)}
        show_table(f"{len(samples)} samples", rows | {"settings": str(samples.folder / "settings.json")})
    return Path(config["paths"]["output_dir"])


if __name__ == "__main__":
    entry.run(sample, "sample.yaml", checked, RESOLVERS)
