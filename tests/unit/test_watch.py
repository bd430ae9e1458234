"""The guard's judgement on made traces with the paper's numbers: see `stability_traces.py`."""

import json
import math
from typing import Any

import numpy as np
import pytest
from stability_traces import CHARACTERS, Trace, collapse, dead, healthy, rows, spike, transient

from mvsplit.stability.detector import CollapseDetector, Event, Thresholds

AT = 1000
GRADIENTS = ("loss", "grad_norm", "g_mean", "g_ctr")
SHAPE = ("loss", "grad_norm", "rho", "token_cosine")


def judge(given: list[tuple[int, dict[str, float | None]]], watch: CollapseDetector | None = None) -> list[Event]:
    watch = watch or CollapseDetector()
    return [event for step, row in given for event in watch.observe(step, row)]


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def first(events: list[Event], kind: str) -> int:
    return next(event.step for event in events if event.kind == kind)


def alarms(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind in ("onset", "dead")]


@pytest.mark.parametrize("character", CHARACTERS)
def test_healthy_runs_raise_no_alarm(character: str) -> None:
    for seed in range(3):
        for every, only in ((1, None if seed else ("loss", "grad_norm")), (10, None), (50, None)):
            events = judge(rows(healthy(seed, **CHARACTERS[character]), every, only))
            assert alarms(events) == [], (seed, every, only)


@pytest.mark.parametrize("character", CHARACTERS)
def test_a_collapse_is_told_before_the_loss_has_risen(character: str) -> None:
    for seed, only in enumerate((None, GRADIENTS, ("grad_norm", "g_mean", "g_ctr"))):
        events = judge(rows(collapse(healthy(seed, AT + 60, **CHARACTERS[character]), AT, seed), only=only))
        assert first(events, "onset") == AT
        assert "G_mean/G_ctr" in next(e.why for e in events if e.kind == "onset")
        assert kinds(events).count("onset") == 1
        assert AT + 5 < first(events, "dead") <= AT + 20


@pytest.mark.parametrize(
    ("only", "onset", "death"),
    [(("loss", "grad_norm"), 12, 22), (("loss",), 12, 22), (("token_cosine",), 12, 24), (("rho",), 12, 24),
     (SHAPE, 10, 22), (("q_grad", "grad_norm"), 4, 16)],
)  # fmt: skip
def test_with_columns_missing_it_is_told_as_early_as_can_be(only: tuple[str, ...], onset: int, death: int) -> None:
    events = judge(rows(collapse(healthy(2, AT + 60), AT, 2), only=only))
    assert first(events, "onset") <= AT + onset
    assert first(events, "dead") <= AT + death


@pytest.mark.parametrize("every", [10, 50, 100])
@pytest.mark.parametrize("only", [None, SHAPE, ("loss", "grad_norm"), ("loss",), ("token_cosine",)])
def test_sparse_rows(every: int, only: tuple[str, ...] | None) -> None:
    at = 30 * every + 3  # between two rows
    events = judge(rows(collapse(healthy(1, 45 * every), at, 1), every, only))
    assert first(events, "onset") <= at + 3 * every
    assert first(events, "dead") <= at + 5 * every
    assert kinds(events).count("dead") == 1


def test_cells_missing_here_and_there() -> None:
    for seed in range(3):
        trace = collapse(healthy(seed, AT + 60), AT, seed)
        rng = np.random.default_rng(seed)
        for name in sorted(trace.keys() - {"step"}):  # in a fixed order, so that the same cells are missing every time
            trace[name][rng.random(len(trace[name])) < 0.3] = rng.choice([math.nan, math.inf])
        events = judge(rows(trace))
        assert AT <= first(events, "onset") <= AT + 3
        assert first(events, "dead") <= AT + 25
        assert kinds(events).count("onset") == 1
    nothing: dict[str, float | None] = {"loss": None, "grad_norm": math.nan}
    assert judge([(step, nothing) for step in range(50)] + [(50, {})]) == []


@pytest.mark.parametrize("times", [15.0, 100.0])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_benign_spike_is_one_spike(times: float, length: int) -> None:
    for only in (None, GRADIENTS, SHAPE, ("loss", "grad_norm")):
        events = judge(rows(spike(healthy(3, AT + 100), AT, times, length), only=only))
        assert kinds(events) == ["spike"], only
        assert events[0].step == AT
        assert "threshold 5" in events[0].why


@pytest.mark.parametrize("length", [3, 10, 30, 50])
@pytest.mark.parametrize("loss", [1.2, 1.5, 2.0])
def test_a_resumed_runs_transient_is_no_onset(length: int, loss: float) -> None:
    for character in ("paper scale",):
        for only in (None, GRADIENTS, SHAPE):
            trace = transient(healthy(2, AT + 200, **CHARACTERS[character]), AT, length, loss)
            events = judge(rows(trace, only=only))
            assert set(kinds(events)) <= {"spike"}, (character, only)
            assert len(events) <= 1
    events = judge(rows(transient(healthy(2, AT + 200), AT, length, min(loss, 1.5)), only=("loss", "grad_norm")))
    assert alarms(events) == []


@pytest.mark.parametrize("jump", [-200, 500])
def test_a_jump_in_the_step_count_is_no_onset(jump: int) -> None:
    trace = transient(healthy(5, 1400), AT, 20, 1.8)
    given = rows(trace, only=("loss", "grad_norm"))
    if jump < 0:
        given = given[:AT] + [(step + jump, row) for step, row in given[AT:]]
    else:
        given = given[:AT] + given[AT + jump :]
    assert alarms(judge(given)) == []


def test_going_back_to_the_start_of_a_run_is_no_collapse() -> None:
    given = rows(healthy(4, 1500))
    assert alarms(judge(given + given)) == []


@pytest.mark.parametrize("first_step", [0, 5000])
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("only", [None, SHAPE, GRADIENTS, ("token_cosine",), ("rho",), ("q_grad", "grad_norm")])
def test_dead_from_the_first_row(first_step: int, every: int, only: tuple[str, ...] | None) -> None:
    for seed in range(2):
        events = judge(rows(dead(seed, 400, first_step), every, only))
        assert kinds(events) == ["dead"]
        assert events[0].step <= first_step + 20 * every**0.5


def test_dead_with_a_normal_gradient_norm_when_only_the_loss_tells() -> None:
    """No event is seen: the trace has a hole over it, as of a run that was resumed by somebody else."""
    trace = collapse(healthy(6, AT + 100), AT, 6)
    kept = [row for row in rows(trace, only=("loss", "grad_norm")) if not AT - 5 <= row[0] < AT + 30]
    events = judge(kept)
    assert "dead" in kinds(events)
    assert first(events, "dead") <= AT + 30 + 20


def test_zero_initialised_writers_wake_slowly() -> None:
    for seed in range(3):
        trace = healthy(seed, 1200, warmup=1000, speed=800.0)
        for name in ("g_mean", "g_ctr", "q_grad"):
            trace[name][:10] = 0.0
        trace["q_grad"][10:] *= np.minimum(1.0, 1e-9 * 10 ** (np.arange(1190) / 40))
        for every in (1, 10):
            assert alarms(judge(rows(trace, every))) == []


def test_a_learning_rate_that_decays_to_nothing() -> None:
    trace = healthy(7, 3000)
    fade = np.linspace(1, 1e-3, 2000)
    for name in ("grad_norm", "g_mean", "g_ctr", "q_grad"):
        trace[name][1000:] *= fade
    assert alarms(judge(rows(trace))) == []


def test_it_recovers_and_can_collapse_again() -> None:
    ill, well = collapse(healthy(8, AT + 40), AT, 8), healthy(9, 2 * AT)
    again: Trace = {name: np.concatenate([ill[name], well[name][AT:]]) for name in ill}
    again["step"] = np.arange(len(again["step"]), dtype=float)
    events = judge(rows(collapse(again, AT + 400, 8)))
    assert [e.kind for e in events if e.kind != "spike"] == ["onset", "dead", "recovered", "onset", "dead"]
    assert AT + 55 <= first(events, "recovered") <= AT + 80
    assert "healthy range" in next(e.why for e in events if e.kind == "recovered")


def test_recovered_from_death_at_birth() -> None:
    ill, well = dead(1, 100), healthy(1, 600)
    trace = {name: np.concatenate([ill[name], well[name][200:]]) for name in well}
    trace["step"] = np.arange(len(trace["step"]), dtype=float)
    assert kinds(judge(rows(trace))) == ["dead", "recovered"]


def test_medians_stand_still_while_it_is_ill() -> None:
    watch = CollapseDetector()
    judge(rows(collapse(healthy(8, AT + 200), AT, 8)), watch)
    state = watch.state_dict()["stats"]["normal"]
    assert watch.state == "dead"
    assert max(step for step, _ in state["loss"]) < AT


@pytest.mark.parametrize("cut", [15, AT - 2, AT + 1, AT + 8, AT + 45, AT + 75])
def test_a_resumed_watch_goes_on_as_if_nothing_had_been(cut: int) -> None:
    ill, well = collapse(healthy(8, AT + 50), AT, 8), healthy(9, 2 * AT)
    trace = {name: np.concatenate([ill[name], well[name][AT : AT + 100]]) for name in ill}
    trace["step"] = np.arange(len(trace["step"]), dtype=float)
    given = rows(trace)
    one, other = CollapseDetector(), CollapseDetector()
    judge(given[:cut], one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state == one.state
    assert judge(given[cut:], one) == judge(given[cut:], other)
    assert one.state_dict() == other.state_dict()


def test_after_going_back_it_is_healthy_and_can_fire_at_once() -> None:
    watch = CollapseDetector()
    given = rows(collapse(healthy(8, AT + 50), AT, 8))
    judge(given[: AT + 1], watch)
    assert watch.state == "onset"
    watch.went_back()
    assert watch.state == "healthy"
    assert kinds(judge(given[AT : AT + 1], watch)) == ["onset"]


def test_thresholds_are_used() -> None:
    trace: Any = rows(spike(healthy(3, AT + 10), AT, 15.0, 1))
    assert kinds(judge(trace, CollapseDetector(Thresholds(spike=30.0)))) == []


def test_dead_where_only_some_samples_tokens_are_alike() -> None:
    """As a laptop run of 200 blocks ended: mean cosine 0.86, rho 2e6, no gradient left for Q."""
    trace = rows(healthy(0, 300))
    last = trace[-1][1]
    gone = {"token_cosine": 0.86, "rho": 2e6, "q_grad": 1e-5 * last["q_grad"], "loss": 0.85 * trace[0][1]["loss"]}
    trace += [(300 + i, last | gone) for i in range(40)]
    found = judge(trace)
    assert kinds(found)[-1] == "dead"
    assert found[-1].step <= 320
