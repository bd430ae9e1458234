"""The step monitor in real runs: its order, and one gradient norm per optimiser step under every strategy."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SUPPORT

import mvsplit.training.module as module_file
import mvsplit.training.network_module as network_file
from mvsplit.callbacks.collapse_guard import CollapseGuard
from mvsplit.callbacks.monitor import StepMonitor
from mvsplit.callbacks.stability_board import StabilityBoard
from mvsplit.callbacks.stability_probe import StabilityProbe, StepRow
from mvsplit.stability.detector import CollapseDetector
from mvsplit.stability.tables import TableWriter, read_table
from mvsplit.utils.errors import AgreedError

WORKER = SUPPORT / "norm_worker.py"


def note_calls(monkeypatch: pytest.MonkeyPatch, calls: list[str], kind: Any, name: str, label: str) -> None:
    plain = getattr(kind, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(label)
        return plain(*args, **kwargs)

    monkeypatch.setattr(kind, name, noted)


def test_a_step_is_checked_in_the_stated_order(train_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for kind, name, label in (
        (network_file, "gradient_norm", "norm"),
        (StepMonitor, "_require_finite", "finite?"),
        (StabilityProbe, "measure", "probe"),
        (TableWriter, "append", "table"),
        (CollapseDetector, "observe", "detector"),
        (CollapseGuard, "act", "guard"),
        (StabilityBoard, "show", "board"),
        (network_file, "clip_gradients", "clip"),
    ):
        note_calls(monkeypatch, calls, kind, name, label)
    train_here("trainer.max_steps=3", "callbacks.monitor.probe.every=2", "callbacks.time_probe=null", "test=false",
               "callbacks.sample_grid=null")  # fmt: skip
    full = ["norm", "finite?", "probe", "table", "table", "detector", "guard", "board", "clip"]
    cheap = ["norm", "finite?", "probe", "table", "detector", "guard", "clip"]
    assert calls == full + cheap + full


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_goes_no_further(
    train_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    observed: list[int] = []
    plain_loss, begin = module_file.velocity_loss, StepMonitor._begin
    monkeypatch.setattr(CollapseDetector, "observe", lambda self, step, values: observed.append(step) or [])

    def poisoned(network: Any, x0: Any, *arguments: Any) -> Any:
        losses = plain_loss(network, x0, *arguments)
        if losses.requires_grad and network.poisoned:  # the gradient, not the loss
            losses.register_hook(lambda gradient: gradient * math.nan)
        return losses

    def on_start(self: StepMonitor, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        module.network.poisoned = batch_idx == 4 * accumulate - 1  # the last micro-batch of step 3
        start(self, trainer, module, batch, batch_idx)

    rows: list[StepRow] = []
    start = StepMonitor.on_train_batch_start
    monkeypatch.setattr(StepMonitor, "on_train_batch_start", on_start)
    monkeypatch.setattr(StepMonitor, "_begin", lambda *args: rows.append(begin(*args)) or rows[-1])
    monkeypatch.setattr(module_file, "velocity_loss", poisoned)
    with pytest.raises(AgreedError, match=r"not finite at step 3 .* the step was not taken"):
        train_here(f"trainer.accumulate_grad_batches={accumulate}", "callbacks.monitor.probe.every=1", "test=false",
                   "trainer.val_check_interval=6", "callbacks.sample_grid=null")  # fmt: skip
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert math.isfinite(rows[-1].loss)
    assert math.isnan(rows[-1].grad_norm)
    assert (rows[-1].measures, rows[-1].by_depth) == ({}, {})
    assert observed == [0, 1, 2]
    folder = tmp_path / "run" / "stability"
    assert read_table(folder / "trace.csv")["step"].tolist() == [0, 1, 2]
    assert np.unique(read_table(folder / "depth.csv")["step"]).tolist() == [0, 1, 2]
    assert json.loads((folder / "nonfinite_step_3_rank_0.json").read_text())["gradient_norms"]


@pytest.mark.parametrize(
    "options",
    [
        ["trainer=cpu", "trainer.accumulate_grad_batches=2"],
        pytest.param(["trainer=ddp"], marks=pytest.mark.long),
        pytest.param(["trainer=fsdp"], marks=pytest.mark.long),
        pytest.param(["trainer=deepspeed", "trainer.accumulate_grad_batches=2"], marks=pytest.mark.slow),
    ],
    ids=["single", "ddp", "fsdp", "zero3"],
)
def test_the_norm_is_computed_once_for_each_step(data_dir: Path, tmp_path: Path, options: list[str]) -> None:
    """Whoever computes it: our own, PyTorch's for clipping, DeepSpeed's."""
    command = [sys.executable, str(WORKER), str(tmp_path), f"paths.data_dir={data_dir}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(tmp_path.glob("norms_rank_*.json"))
    assert len(files) == (1 if "trainer=cpu" in options else 2)
    found = [json.loads(file.read_text()) for file in files]
    assert all(record == found[0] for record in found)
    assert found[0]["norms_by_step"] == [1] * 4
    assert found[0]["clipped_norms"] == pytest.approx([0.01] * 4, rel=1e-4)
    trace = read_table(tmp_path / "stability" / "trace.csv")
    assert trace["grad_norm"].tolist() == pytest.approx(found[0]["norms"], rel=1e-5)
    assert min(found[0]["norms"]) > 0.01
