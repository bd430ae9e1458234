"""The other optimisers in real runs: resumed, and learning."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import differences, last, state

from mvsplit.utils.errors import AgreedError, UserError

TrainHere = Callable[..., tuple[dict[str, float], dict[str, Any]]]
IN_BACKWARD = ["trainer.gradient_clip_val=null", "callbacks.monitor.probe=null", "optim.in_backward=true"]
RUNS = {
    "muon": ["optim=muon"],
    "bfloat16": ["optim.moments=bfloat16"],
    "8bit": ["optim.moments=8bit"],
    "in_backward": IN_BACKWARD,
    "all": [*IN_BACKWARD, "optim.moments=8bit", "trainer.precision=bf16-true"],
}
SOME = [pytest.param(kind, marks=[] if kind in ("muon", "all") else pytest.mark.long) for kind in RUNS]
LONGER = ["optim.warmup_steps=2", "optim.schedule=constant"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", SOME)
def test_a_resumed_run_is_the_uninterrupted_one(train_here: TrainHere, tmp_path: Path, kind: str) -> None:
    train_here(*RUNS[kind], *LONGER, run="whole")
    train_here(*RUNS[kind], *LONGER, "trainer.max_steps=3", run="part")
    train_here(*RUNS[kind], *LONGER, "ckpt_path=last", run="part")
    assert differences(state(tmp_path / "part"), state(tmp_path / "whole")) == []
    assert state(tmp_path / "whole")["global_step"] == 6


def test_a_run_with_steps_in_the_backward_pass_is_the_one_without(train_here: TrainHere, tmp_path: Path) -> None:
    """Weights, moments, schedule, average, and what the monitor has recorded."""
    for run, overrides in {"without": IN_BACKWARD[:2], "with": IN_BACKWARD}.items():
        train_here(*overrides, *LONGER, run=run)
    assert differences(state(tmp_path / "with"), state(tmp_path / "without")) == []
    traces = [(tmp_path / run / "stability" / "trace.csv").read_text() for run in ("with", "without")]
    assert traces[0] == traces[1]
    assert len(traces[0].splitlines()) == 7


def test_a_run_that_is_not_finite_says_that_its_step_was_taken(train_here: TrainHere, tmp_path: Path) -> None:
    with pytest.raises(AgreedError, match=r"is not finite at step 1 .*; its step was taken in the backward pass; see"):
        train_here(*IN_BACKWARD, "optim.lr=1e30", "optim.warmup_steps=0")
    (report,) = (tmp_path / "run" / "stability").glob("nonfinite_step_1_*.json")
    assert "network.blocks.attention.qkv.weight" in report.read_text()


def test_another_optimisers_checkpoint_is_refused(train_here: TrainHere, tmp_path: Path) -> None:
    train_here("trainer.max_steps=2")
    more = ["ckpt_path=last", "trainer.max_steps=4"]
    with pytest.raises(
        UserError, match=r"^ckpt_path: saved with another optimiser or other parameters; use the optim of"
    ):
        train_here("optim=muon", *more)
    with pytest.raises(
        UserError, match=r"^optim\.moments = 8bit: the checkpoint's are not 8bit, which is not converted$"
    ):
        train_here("optim.moments=8bit", *more)
    train_here("optim.moments=bfloat16", *more)  # rounds them
    moments = last(tmp_path / "run")["tensors"]["optimizer"]
    assert {tensor.dtype for tensor in moments.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", SOME)
def test_each_learns(train_here: TrainHere, tmp_path: Path, kind: str) -> None:
    silent = [
        "callbacks.sample_grid=null",
        "callbacks.checkpoint=null",
        "callbacks.stop_signals=null",
        "test=false",
        "logger=csv",
    ]
    train_here(*RUNS[kind], *silent, "trainer.max_steps=100", "trainer.val_check_interval=100", "optim.warmup_steps=10")
    with next((tmp_path / "run").rglob("metrics.csv")).open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 100
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:3]) / 3
