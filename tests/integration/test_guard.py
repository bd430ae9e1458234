"""The guard in real, small training runs whose statistics are forged: what each action leaves behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import differences
from conftest import SUPPORT
from lightning import Callback
from stability_traces import healthy, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvsplit.callbacks.ema import EMA
from mvsplit.callbacks.monitor import StepMonitor
from mvsplit.callbacks.stability_probe import StabilityProbe, StepRow
from mvsplit.training.local_state import local_optimizer, local_weights, slices_of
from mvsplit.utils.errors import AgreedError

GUARD = "callbacks.monitor.guard"
WORKER = SUPPORT / "guard_worker.py"
Run = Callable[..., dict[str, Any]]
FINE = {"loss": 0.6, "grad_norm": 0.5, "g_mean": 0.01, "g_ctr": 0.025, "q_grad": 0.005, "rho": 0.6,
        "token_cosine": 0.26}  # fmt: skip
ILL = FINE | {"grad_norm": 9.0, "g_mean": 1.6, "g_ctr": 0.0125, "rho": 5.9, "token_cosine": 0.97}


class Forged(StabilityProbe):
    """A probe that replaces the step's values after they are measured."""

    def __init__(self, ill: tuple[int, ...]) -> None:
        super().__init__(every=0)
        self.ill = ill

    def measure(self, row: StepRow, module: Any) -> None:
        super().measure(row, module)
        forge(row, row.step in self.ill)


def forge(row: StepRow, ill: bool) -> None:
    row.measures = dict(ILL if ill else FINE)
    row.loss, row.grad_norm = row.measures.pop("loss"), row.measures.pop("grad_norm")


def held(trainer: Any, module: Any) -> dict[str, Any]:
    """Everything a process holds."""
    ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
    settings, optimizer = local_optimizer(module, trainer.optimizers[0])
    kinds = {"weights": local_weights(module), "optimizer": optimizer, "ema": slices_of(module, ema.shadow)}
    tensors = {kind: {n: part.values.detach().clone() for n, part in slices.items()} for kind, slices in kinds.items()}
    counts = {n: {k: torch.as_tensor(v).clone() for k, v in c.items()} for n, c in settings["counts"].items()}
    return tensors | {"counts": counts, "lr": [group["lr"] for group in settings["param_groups"]]}


class Record(Callback):
    """What was held before each step (as the guard finds it) and after."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, Any]] = {}
        self.after: dict[int, dict[str, Any]] = {}
        self.ema_after: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before[trainer.global_step] = held(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.after[trainer.global_step - 1] = held(trainer, module)


def prepare(callbacks: list[Any], ill: tuple[int, ...], record: Callback) -> list[Any]:
    """The config's callbacks with a forged probe, a detector with a healthy past, and a record before the EMA."""
    monitor = next(c for c in callbacks if isinstance(c, StepMonitor))
    monitor.probe = Forged(ill)
    if monitor.detector.state_dict()["stats"]["steps"] == []:
        for step, row in rows(healthy(0, 300, speed=20.0, final=0.6, gradient=(1.0, 0.5)))[200:]:
            monitor.detector.observe(step - 300, row)
    return [record, *callbacks]


@pytest.fixture
def run(train_here: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(ill, *overrides)`: train with ill values at these steps; the record and the guard."""
    import train

    build_each = train.build_each

    def go(ill: tuple[int, ...], *overrides: str, run: str = "run") -> dict[str, Any]:
        record, found = Record(), {}

        def build(nodes: Any) -> list[Any]:
            callbacks = build_each(nodes)
            if "monitor" in (nodes or {}):
                found["monitor"] = next(c for c in callbacks if isinstance(c, StepMonitor))
                found["guard"] = found["monitor"].guard
                callbacks = prepare(callbacks, ill, record)
            return callbacks

        monkeypatch.setattr(train, "build_each", build)
        found["record"] = record
        small = ["~callbacks.sample_grid", "test=false", "trainer.limit_val_batches=0", "trainer.val_check_interval=6",
                 "optim.warmup_steps=2", "optim.schedule=constant"]  # fmt: skip
        try:
            found["objects"] = train_here(*small, *overrides, run=run)[1]
        except AgreedError as error:
            found["error"] = str(error)
        return found

    return go


def log(tmp_path: Path, run: str = "run") -> list[dict[str, Any]]:
    file = tmp_path / run / "stability" / "guard.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_a_warning_changes_nothing(run: Run, tmp_path: Path) -> None:
    warned = run((3,))
    calm = run((), run="calm")
    assert differences(warned["record"].after, calm["record"].after) == []
    (decision,) = log(tmp_path)
    assert (decision["step"], decision["kind"], decision["action"]) == (3, "onset", "warn")
    assert "G_mean/G_ctr" in decision["why"]
    assert log(tmp_path, "calm") == []
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (text,) = events.Tensors("stability/guard/text_summary")
    assert text.step == 3
    assert b"onset" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_nothing_and_the_next_is_taken(run: Run, accumulate: int) -> None:
    result = run((3,), f"{GUARD}.action=skip", f"trainer.accumulate_grad_batches={accumulate}")
    record = result["record"]
    for kind in ("weights", "optimizer", "counts"):
        assert differences(record.before[3][kind], record.after[3][kind]) == [], kind
    assert differences(record.before[4]["weights"], record.after[4]["weights"]) != []
    assert result["objects"]["trainer"].global_step == 6


def test_a_rollback_restores_everything_and_lowers_the_learning_rate(run: Run, tmp_path: Path) -> None:
    options = [f"{GUARD}.action=rollback", f"{GUARD}.snapshot_every=2", f"{GUARD}.margin=2"]
    result = run((5,), *options, "trainer.max_steps=8", "callbacks.ema.decay=0")
    record, guard = result["record"], result["guard"]
    # Copies at 0, 2 and 4, of which the last two are there; the one of step 2 is old enough.
    there, here = record.before[2], record.after[5]
    for kind in ("weights", "optimizer", "counts"):
        assert differences(there[kind], here[kind]) == [], kind
    assert differences(here["ema"], {n: v for n, v in here["weights"].items() if n in here["ema"]}) == []
    assert differences(record.before[5]["weights"], here["weights"]) != []
    assert record.before[6]["lr"] == [lr / 2 for lr in record.before[5]["lr"]]
    assert record.before[7]["lr"] == record.before[6]["lr"]
    assert (guard.rollbacks, guard.lr_scale, result["monitor"].detector.state) == (1, 0.5, "healthy")
    assert result["objects"]["trainer"].global_step == 8
    (decision,) = log(tmp_path)
    assert (decision["action"], decision["back_to"], decision["lr_scale"]) == ("rollback", 2, 0.5)

    resumed = run((), *options, "trainer.max_steps=10", "callbacks.ema.decay=0", "ckpt_path=last")
    assert resumed["record"].after[8]["lr"] == resumed["record"].before[9]["lr"] == record.before[7]["lr"]
    assert (resumed["guard"].rollbacks, resumed["guard"].lr_scale) == (1, 0.5)
    assert resumed["guard"].snapshots[0].step == 8


def test_averages_go_back_too_and_so_does_an_optimiser_that_had_not_begun(run: Run) -> None:
    result = run((3,), f"{GUARD}.action=rollback", f"{GUARD}.snapshot_every=50", "trainer.max_steps=4")
    record = result["record"]
    assert differences(record.before[0]["weights"], record.after[3]["weights"]) == []
    assert record.after[3]["optimizer"] == {}
    for name, average in record.after[3]["ema"].items():  # then averaged with the same weights
        torch.testing.assert_close(average, record.before[0]["weights"][name], rtol=0, atol=1e-7)


def test_retries_are_bounded_and_end_with_a_report(run: Run, tmp_path: Path) -> None:
    options = [f"{GUARD}.action=rollback", f"{GUARD}.max_rollbacks=2"]
    result = run((2, 3, 4, 5), *options)
    report = tmp_path / "run" / "stability" / "collapse_step_4.json"
    assert "after 2 rollbacks" in result["error"]
    assert str(report) in result["error"]
    content = json.loads(report.read_text())
    assert (content["step"], content["kind"], content["rollbacks"], content["lr_scale"]) == (4, "onset", 2, 0.25)
    assert [row["step"] for row in content["rows"]] == [0, 1, 2, 3, 4]
    assert content["thresholds"]["ratio"] == 5.0
    assert [(d["step"], d["action"]) for d in content["decisions"]] == [(2, "rollback"), (3, "rollback"), (4, "stop")]
    assert log(tmp_path) == content["decisions"]


def test_stop_ends_before_the_step(run: Run, tmp_path: Path) -> None:
    result = run((3,), f"{GUARD}.action=stop")
    assert "\n" not in result["error"]
    assert str(tmp_path / "run" / "stability" / "collapse_step_3.json") in result["error"]
    assert 3 not in result["record"].after


def test_skipping_for_ever_stops(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvsplit.callbacks.collapse_guard.MAX_SKIPPED", 2)
    result = run((2, 3, 4, 5), f"{GUARD}.action=skip")
    assert "after 2 skipped steps" in result["error"]
    assert [(d["step"], d["action"]) for d in log(tmp_path)] == [(2, "skip"), (3, "skip"), (4, "stop")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_processes_skip_and_roll_back(data_dir: Path, tmp_path: Path, strategy: str) -> None:
    command = [sys.executable, str(WORKER), str(tmp_path), f"paths.data_dir={data_dir}", f"trainer={strategy}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        record = torch.load(tmp_path / f"guard_rank_{rank}.pt", weights_only=True)
        before, after = record["before"], record["after"]
        for kind in ("weights", "optimizer", "counts"):
            assert differences(before[2][kind], after[2][kind]) == [], kind  # skipped
            assert differences(before[3][kind], after[5][kind]) == [], kind  # back to the first copy
            assert differences(before[5][kind], after[5][kind]) != [], kind
        assert differences(before[3]["weights"], after[3]["weights"]) != []
        assert differences(before[6]["weights"], after[6]["weights"]) != []
        assert before[7]["lr"] == [lr / 2 for lr in before[5]["lr"]]
