"""The parts of the step monitor by themselves: the guard with a run that is not there, the one place of thresholds."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from conftest import compose_config
from torch import nn

from mvsplit.callbacks.collapse_guard import CollapseGuard
from mvsplit.callbacks.stability_probe import StepRow, combine
from mvsplit.stability.detector import CollapseDetector, Event
from mvsplit.stability.thresholds import Thresholds
from mvsplit.training import gradients
from mvsplit.utils.config import build, check_tree, to_plain
from mvsplit.utils.errors import AgreedError, UserError


class NoRun:
    """Records what the guard wants of a run. A snapshot is its step's row."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.decisions: list[tuple[int, str, str]] = []

    def any_rank(self, wanted: bool) -> bool:
        return wanted

    def snapshot(self, step: int) -> StepRow:
        return StepRow(step, 0.0, 0.0)

    def restore(self, snapshot: StepRow) -> None:
        self.calls.append(("restore", snapshot.step))

    def skip_step(self) -> None:
        self.calls.append("skip")

    def scale_lr(self, scale: float) -> None:
        self.calls.append(("lr", scale))

    def log(self, decision: dict[str, Any]) -> None:
        self.decisions.append((decision["step"], decision["kind"], decision["action"]))

    def report(self, step: int, content: dict[str, Any]) -> str:
        self.calls.append(("report", step, len(content["rows"])))
        return "report.json"


def follow(guard: CollapseGuard, run: NoRun, alarms: tuple[int, ...], steps: int = 10) -> None:
    """Steps of a healthy network, with an onset at some of them; recovered at once where nothing is restored."""
    detector = CollapseDetector()
    guard.start(0, on_disk=False)
    for step in range(steps):
        row = StepRow(step, 1.0, 1.0)
        detector.state = "healthy"
        if step in alarms:
            detector.state, row.events = "onset", [Event(step, "onset", "made up")]
        guard.act(row, detector, run)  # type: ignore[arg-type]


def test_the_guard_rolls_back_to_a_copy_that_is_old_enough() -> None:
    run, guard = NoRun(), CollapseGuard("rollback", snapshot_every=2, margin=3, lr_factor=0.5)
    follow(guard, run, (7,))
    assert run.calls == [("restore", 4), "skip", ("lr", 0.5)]  # copies at 0, 2, 4, 6; 4 is three steps before
    assert run.decisions == [(7, "onset", "rollback")]
    assert (guard.rollbacks, guard.lr_scale) == (1, 0.5)


def test_the_guard_stops_after_its_rollbacks() -> None:
    run, guard = NoRun(), CollapseGuard("rollback", max_rollbacks=1)
    with pytest.raises(
        AgreedError, match=r"the network is collapsing again after 1 rollbacks, at step 6 .*report\.json"
    ):
        follow(guard, run, (3, 6))
    assert run.calls[-1] == ("report", 6, 7)
    assert [action for _, _, action in run.decisions] == ["rollback", "stop"]


def test_benign_spikes_are_logged_and_nothing_is_done() -> None:
    run, guard = NoRun(), CollapseGuard("skip")
    guard.act(StepRow(0, 1.0, 9.0, events=[Event(0, "spike", "made up")]), CollapseDetector(), run)  # type: ignore
    assert (run.calls, run.decisions) == ([], [(0, "spike", "none")])


def test_rollback_is_refused_for_an_optimiser_on_nvme() -> None:
    with pytest.raises(AgreedError, match=r"callbacks\.monitor\.guard\.action = rollback: state on NVMe"):
        CollapseGuard("rollback").start(0, on_disk=True)
    CollapseGuard("skip").start(0, on_disk=True)


def test_a_row_holds_the_columns_of_the_trace() -> None:
    watched = [{"rho": 1.0, "g_mean_attention": 3.0}, {"rho": 3.0, "g_mean_ffn": 4.0}]
    row = StepRow(3, 0.5, 0.25, combine(watched))
    assert row.values == {"loss": 0.5, "grad_norm": 0.25, "g_mean": 5.0, "rho": 2.0}


def monitor_node(*overrides: str) -> dict[str, Any]:
    node = to_plain(compose_config("paths.output_dir=/nowhere", *overrides))["callbacks"]["monitor"]
    check_tree("callbacks.monitor", node)
    return node  # type: ignore[no-any-return]


def test_the_config_repeats_the_thresholds_defaults_and_overrides_them() -> None:
    assert build(monitor_node()).detector.thresholds == Thresholds()
    monitor = build(monitor_node("callbacks.monitor.thresholds.spike=9.5", "+callbacks.monitor.thresholds.noise=3.0"))
    assert asdict(monitor.detector.thresholds) == asdict(Thresholds(spike=9.5, noise=3.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks.monitor.guard.action=abort", r"^callbacks\.monitor\.guard\.action = 'abort': must be 'warn'"),
        ("callbacks.monitor.thresholds.window=10", r"^callbacks\.monitor\.thresholds\.window = 10: must be greater"),
        ("callbacks.monitor.thresholds.cosine_dead=1.5", "must be less than or equal to 1"),
        ("+callbacks.monitor.thresholds.spikes=3", "unknown key; did you mean spike"),
        ("callbacks.monitor.probe.blocks=0", r"^callbacks\.monitor\.probe\.blocks = 0: must be greater than 0"),
        ("callbacks.monitor.probe=3", r"^callbacks\.monitor\.probe = 3: must be a node with a _target_"),
    ],
)
def test_wrong_settings_of_the_monitor_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        monitor_node(override)


def test_parts_can_be_switched_off() -> None:
    parts = [f"callbacks.monitor.{name}=null" for name in ("probe", "guard", "thresholds", "board")]
    monitor = build(monitor_node(*parts))
    assert (monitor.probe, monitor.guard, monitor.board) == (None, None, None)
    assert monitor.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_is_that_of_pytorch_to_the_bit(dtype: torch.dtype, max_norm: float) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*(nn.Linear(37, 37) for _ in range(50))).to(dtype)
    theirs = nn.Sequential(*(nn.Linear(37, 37) for _ in range(50))).to(dtype)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    order = [p for ndim in (2, 1) for p in ours.parameters() if p.ndim == ndim]  # as the optimiser's groups have them
    expected = torch.nn.utils.clip_grad_norm_([p for n in (2, 1) for p in theirs.parameters() if p.ndim == n], max_norm)
    norm = gradients.gradient_norm(ours, order)
    gradients.clip_gradients(ours, norm, max_norm)
    assert norm.item() == expected.item()
    assert norm.item() > 1
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_bf16_gradients_are_clipped_by_a_float32_norm() -> None:
    network = nn.Linear(8, 8).bfloat16()
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    gradients.clip_gradients(network, gradients.gradient_norm(network), 0.5)
    assert math.isclose(float(gradients.gradient_norm(network)), 0.5, rel_tol=0.01)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in network.parameters())
