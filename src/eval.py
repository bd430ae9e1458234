"""Evaluate a checkpoint, or images: `python src/eval.py [ckpt_path=…] [data=…] [features=inception] [reference=…]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Len
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from mvsplit.data.folders import RESOLVERS
from mvsplit.training.settings import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import Seed, build, to_checked
from mvsplit.utils.console import info, progress, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.launch import is_first_process

if TYPE_CHECKING:  # imported below, after the config is checked, so that mistakes are reported quickly
    from mvsplit.data.datamodule import ShardDataModule
    from mvsplit.evaluation.quality import Quality
    from mvsplit.python import Run


@dataclass
class EvalConfig:
    """Top-level keys of `eval.yaml`."""

    task_name: str
    ckpt_path: str
    samples: str | None
    reference: str | None
    weights: Literal["ema", "raw"]
    precision: Literal["float32", "bfloat16"]
    seed: Seed
    num_samples: NonNegativeInt
    labels: Literal["equal", "random"]
    classes: Annotated[list[NonNegativeInt], Len(1)] | None
    prompts: list[str] | str | None
    image_size: Annotated[list[PositiveInt], Len(2, 2)] | None
    output: str | None
    batch_size: PositiveInt
    sampler: dict[str, Any]
    features: dict[str, Any] | None
    text_encoder: dict[str, Any]
    autoencoder: dict[str, Any] | None
    trainer: dict[str, Any]
    data: dict[str, Any] | None
    paths: Paths


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts."""
    return to_checked(cfg, EvalConfig)


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Validation loss of a checkpoint, and how its samples, or given images, compare with a reference.

    Returns:
        The metrics; none in processes that only help to draw samples.
    """
    config = checked(cfg)
    if config["num_samples"] == 1:
        raise UserError("num_samples = 1: must be 0 (the validation loss only) or at least 2")
    if config["samples"] is not None:
        return evaluate_files(config)
    from mvsplit.callbacks.rank_watch import RankWatch
    from mvsplit.evaluation.generation import check_conditions, complete_set
    from mvsplit.python import load

    run = load(config["ckpt_path"], config["weights"], config["precision"], config["paths"]["log_dir"])
    if config["num_samples"]:
        check_conditions(run, config["classes"], config["prompts"], "; num_samples=0 measures only the validation loss")
    about: dict[str, Any] = {"checkpoint": str(run.path.resolve()), "step": run.step, "weights": config["weights"]}
    metrics: dict[str, float] = {}
    data = quality = None
    first = is_first_process()  # the others only draw
    if first and (data := data_for(run, config)) is not None:
        metrics = validation_loss(run, data)
    if config["num_samples"]:
        generator = run.generator(config, whole_set=True)
        if first:
            quality, about["protocol"] = prepare(config, data, generator.image_shape)
        samples = complete_set(generator, config, RankWatch())
        if samples is None or quality is None:
            return {}
        with progress("measuring", len(samples)) as advance:
            for images, labels in map(samples.read, range(samples.num_batches)):
                quality.update(images, None if generator.prompts is not None else labels)
                advance(len(images))
        about["protocol"] = {"samples": samples.settings, **about["protocol"]}
        metrics |= results(quality, data)
    if first:
        report(config, about, metrics)
    return metrics


def evaluate_files(config: dict[str, Any]) -> dict[str, float]:
    """The metrics of the images at `config["samples"]`."""
    from mvsplit.evaluation.image_files import open_images
    from mvsplit.evaluation.measuring import measure_files

    data = build(config["data"])
    if data is not None:
        data.prepare_data()
        data.setup()
    quality, protocol = prepare(config, data, open_images(config["samples"]).shape)
    samples = measure_files(config["samples"], quality)
    metrics = results(quality, data)
    report(config, {"samples": config["samples"], "protocol": {"samples": samples, **protocol}}, metrics)
    return metrics


def data_for(run: "Run", config: dict[str, Any]) -> "ShardDataModule | None":
    """The run's data, or those given; none are needed if features and reference are given."""
    try:
        return run.data(config["data"])
    except UserError as error:
        if config["data"] is not None or config["features"] is None or config["reference"] is None:
            raise
        info(f"validation loss not measured: {error}")
        return None


def prepare(
    config: dict[str, Any], data: "ShardDataModule | None", size: tuple[int, ...]
) -> tuple["Quality", dict[str, Any]]:
    """Network and reference, and what the numbers will depend on besides the samples."""
    from mvsplit.evaluation.generation import best_device
    from mvsplit.evaluation.measuring import chosen_network, chosen_reference
    from mvsplit.evaluation.quality import Quality

    network = chosen_network(build(config["features"]), data).to(best_device())
    reference = chosen_reference(config["reference"], network, data, size, Path(config["paths"]["data_dir"], "cache"))
    about = {"path": config["reference"] or "training set", "fingerprint": reference.fingerprint}
    return Quality(network, reference), {"features": network.identity(), "reference": about}


def results(quality: "Quality", data: "ShardDataModule | None") -> dict[str, float]:
    """All metrics, and those of real held-out images."""
    from mvsplit.evaluation.measuring import floor

    if quality.count < 2:
        raise UserError(f"samples: {quality.count}; at least 2 are needed for the metrics")
    metrics = quality.metrics() | floor(quality, data)
    if (accuracy := getattr(quality.network, "accuracy", None)) is not None:
        metrics["classifier_accuracy"] = accuracy  # of real held-out images: the reference for `recognised`
    return {f"eval/{name}": value for name, value in metrics.items()}


def report(config: dict[str, Any], about: dict[str, Any], metrics: dict[str, float]) -> None:
    """Write `metrics.json`, and show the numbers."""
    from mvsplit.evaluation.measuring import paper_table

    file = Path(config["paths"]["output_dir"]) / "metrics.json"
    file.write_text(json.dumps(about | metrics, indent=2))
    rows = {name: str(value) for name, value in about.items() if name != "protocol"}
    rows |= {name: f"{value:.4f}" for name, value in metrics.items()}
    show_table("evaluation", rows | {"written to": str(file)})
    if "eval/fid" in metrics:
        print(paper_table({name.removeprefix("eval/"): value for name, value in metrics.items()}))


def validation_loss(saved: "Run", datamodule: "ShardDataModule") -> dict[str, float]:
    """The run's own validation loss, with the loaded weights."""
    import lightning as L

    from mvsplit.evaluation.inputs import validating_module

    module = validating_module(saved)
    trainer = L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(module, datamodule=datamodule, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    entry.run(evaluate, "eval.yaml", checked, RESOLVERS)
