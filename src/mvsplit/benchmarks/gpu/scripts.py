"""Section `scripts`: what is done with a trained run, and the rehearsal of sharded training on CPU processes."""

import json
from pathlib import Path

from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome
from mvsplit.benchmarks.gpu.commands import apart
from mvsplit.benchmarks.gpu.strategies import reference


def cases(bench: Bench) -> list[Case]:
    named = {"eval": evaluate, "sample": sample, "convert": convert, "rehearsal": rehearsal}
    return [Case("scripts", name, run) for name, run in named.items()]


def _loss(bench: Bench, folder: Path, checkpoint: Path) -> float:
    """What `src/eval.py` measures of a checkpoint."""
    bench.script("eval.py", folder, [f"ckpt_path={checkpoint}", *bench.of("scripts")]).succeed()
    return float(json.loads((folder / "metrics.json").read_text())["val/loss"])


def evaluate(bench: Bench, place: Path) -> Outcome:
    """`src/eval.py` measures the loss that the run's own test measured."""
    run = reference(bench)
    loss = _loss(bench, place, run.checkpoint())
    figures = {"val_loss": loss, "apart": apart(loss, run.test_loss())}
    return Outcome({"as_in_training": figures["apart"] <= bench.config["loss_tolerance"]}, figures)


def sample(bench: Bench, place: Path) -> Outcome:
    """`src/sample.py` draws a picture of each class."""
    checkpoint = reference(bench).checkpoint()
    job = bench.script("sample.py", place, [f"ckpt_path={checkpoint}", "count=1"]).succeed()
    pictures = len(list(place.glob("*_class_*.png")))
    return Outcome({"drawn": pictures == 10 and (place / "grid.png").is_file()}, {"seconds": round(job.seconds, 1)})


def convert(bench: Bench, place: Path) -> Outcome:
    """One file of `src/convert.py` is judged like the checkpoint it was made of."""
    checkpoint, file = reference(bench).checkpoint(), place / "model.safetensors"
    bench.script("convert.py", place, [f"ckpt_path={checkpoint}", f"output={file}"]).succeed()
    losses = [_loss(bench, place / name, path) for name, path in (("folder", checkpoint), ("file", file))]
    return Outcome({"same": apart(*losses) <= 1e-6}, {"val_loss": losses[1], "mib": file.stat().st_size / 2**20})


def rehearsal(bench: Bench, place: Path) -> Outcome:
    """ZeRO-3 on two CPU processes, whatever else is in the machine."""
    overrides = ["trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=2"]
    job = bench.train(place, overrides, OMP_NUM_THREADS="1").succeed()
    figures = {"test_loss": job.test_loss(), "apart": apart(job.test_loss(), reference(bench).test_loss())}
    return Outcome({"loss_agrees": figures["apart"] <= bench.config["loss_tolerance"]}, figures)
