"""Judge a checkpoint: `python src/eval.py [ckpt_path=…] [weights=raw] [sampler.cfg_scale=1]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.formats import Images
from mvsplit.evaluation.pictures import draw
from mvsplit.evaluation.recognition import MAX_SAMPLES, Recogniser
from mvsplit.training.checkpoints import SavedRun
from mvsplit.training.run import Paths, TrainConfig
from mvsplit.utils import entry
from mvsplit.utils.config import build, check_config, to_plain
from mvsplit.utils.console import say, show_table
from mvsplit.utils.rng import Seed
from mvsplit.utils.runs import find_checkpoint


@dataclass
class EvalConfig:
    """Top-level keys of `eval.yaml`."""

    task_name: str
    ckpt_path: str
    weights: Literal["ema", "raw"]
    seed: Seed
    num_samples: NonNegativeInt
    batch_size: PositiveInt
    sampler: dict[str, Any]
    paths: Paths


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Validation loss, and for small data sets the share of guided pictures that a classifier recognises as asked."""
    config = to_plain(cfg)
    check_config(config, EvalConfig)
    path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
    saved = SavedRun(path, config["weights"], TrainConfig)
    datamodule: ShardDataModule = build(saved.config["data"])
    metrics = validation_loss(saved, datamodule)

    if config["num_samples"] and (why_not := not_recognisable(datamodule)):
        say(f"no recognition measured: {why_not}")
    elif config["num_samples"]:
        recogniser = Recogniser.fit(datamodule.reader("train"), datamodule.reader("val"))
        classes = [i % datamodule.num_classes for i in range(config["num_samples"])]
        pictures = draw(saved, build(config["sampler"]), classes, config["seed"], config["batch_size"])
        metrics["eval/recognised"] = recogniser.share(pictures, classes)
        metrics["eval/classifier_accuracy"] = recogniser.accuracy

    file = Path(config["paths"]["output_dir"]) / "metrics.json"
    about = {"checkpoint": str(path.resolve()), "step": saved.step, "weights": config["weights"]}
    file.write_text(json.dumps(about | metrics, indent=2))
    rows = {name: str(value) for name, value in about.items()} | {k: f"{v:.4f}" for k, v in metrics.items()}
    show_table("evaluation", rows | {"written to": str(file)})
    return metrics


def not_recognisable(datamodule: ShardDataModule) -> str | None:
    """Why no classifier can be trained on this set at once; None if one can."""
    if not isinstance(datamodule.format, Images) or datamodule.streams:
        return "the classifier needs indexed pictures"
    count = len(datamodule.indices["train"])
    return f"{count} training pictures are too many for the classifier ({MAX_SAMPLES})" if count > MAX_SAMPLES else None


def validation_loss(saved: SavedRun, datamodule: ShardDataModule) -> dict[str, float]:
    """The run's own validation loss, with the weights at hand."""
    module = build(saved.config["module"])
    module.network = saved.network
    trainer = L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(module, datamodule=datamodule, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    entry.run(evaluate, "eval.yaml")
