"""Reads cheap statistics row by row and detects when a network collapses.

No single curve announces the failure (Mean Mode Screaming, paper's appendix A). At the event the gradient norm is
≥ 18 × its median, but there are benign spikes of 15 × too (of 50,000 × at laptop scale). They differ in the
mean-coherent part of the writers' gradient, G_mean, relative to the centred part, G_ctr (× 156 and × 0.5). Afterwards
the gradient norm looks normal while all tokens are alike (cosine 1), Q and K receive no gradient, and the loss is back
at its initial value. So several terms of evidence are added up (`evidence.py`): three points are an onset.

Values are compared with running medians of the healthy network where possible (`running_stats.py`). While the network
is not healthy, the medians do not move. Medians and patience count rows, which may be any number of steps apart;
deadlines count steps. No torch: the same code follows a training run and reads a file.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from mvsplit.stability.evidence import Evidence
from mvsplit.stability.running_stats import NAMES, RunningStats, Streak
from mvsplit.stability.thresholds import Thresholds

__all__ = ["NAMES", "CollapseDetector", "Event", "Thresholds"]
Kind = Literal["spike", "onset", "dead", "recovered"]
State = Literal["healthy", "onset", "dead"]


@dataclass(frozen=True)
class Event:
    """A decision: a spike (no action needed), an onset, a dead network, or a recovery from either."""

    step: int
    kind: Kind
    why: str


class CollapseDetector:
    """Follows one run: call `observe` for each row in turn.

    During a spike the state stays healthy, and no event marks its end; the spike's rows do not enter the medians. After
    an onset or death, `recovered` follows once the statistics have been in their healthy range for long enough. An
    onset can turn into death without a recovery.

    Attributes:
        state: of the network.
        beyond: whether the last row was outside the healthy range.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.state: State = "healthy"
        self.beyond = False
        self._stats = RunningStats(self.thresholds)
        self._well = Streak(self.thresholds.recovery, 2 * self.thresholds.patience_rows)
        self._spike: tuple[int, int] | None = None  # the step at which it began, and rows since

    def observe(self, step: int, values: dict[str, float | None] | dict[str, float]) -> list[Event]:
        """Classify one row; values may be missing, None or not finite."""
        row = {name: float(v) for name in NAMES if (v := values.get(name)) is not None and math.isfinite(v)}
        if row.get("g_ctr", 0) > 0 and row.get("g_mean", 0) > 0:
            row["ratio"] = row["g_mean"] / row["g_ctr"]
        self._stats.begin(step, row)
        evidence = Evidence(self._stats, step, row)
        evidence.note_death_signs()
        events = [*self._death(step, evidence), *self._onset(step, evidence)] or self._recovery(step, evidence)
        if self.state == "healthy":
            events = events or self._spikes(step, evidence)
            if self._spike is None or self._spike[1] > self.thresholds.spike_rows:
                self._stats.learn(step, row)
        self._stats.before = row
        return events

    def went_back(self) -> None:
        """Report that healthy weights were restored: the collapse is over, the medians stay."""
        self.state, self.beyond = "healthy", False
        self._forget_evidence()
        self._stats.losses.clear()

    def _forget_evidence(self) -> None:
        self._spike = None
        for streak in (*self._stats.streaks.values(), self._well):
            streak.seen.clear()

    def _death(self, step: int, evidence: Evidence) -> list[Event]:
        why = evidence.death(self.state == "onset") if self.state != "dead" else None
        if why is None:
            return []
        self.state, self._spike = "dead", None
        self._well.seen.clear()
        self._stats.died(step)
        return [Event(step, "dead", why)]

    def _onset(self, step: int, evidence: Evidence) -> list[Event]:
        points = evidence.onset_points()
        total = sum(point for point, _ in points)
        self.beyond = total >= 2 or (self.state == "dead" and evidence.looks_dead())
        if self.state != "healthy" or total < 3:
            return []
        self.state, self._spike = "onset", None
        self._well.seen.clear()
        return [Event(step, "onset", "; ".join(text for _, text in points))]

    def _spikes(self, step: int, evidence: Evidence) -> list[Event]:
        t, times = self.thresholds, evidence.times("grad_norm")
        if times is None:
            return []
        if self._spike is not None:
            since, rows = self._spike
            self._spike = None if times < t.spike_end or rows > 2 * t.spike_rows else (since, rows + 1)
            return []
        if times < t.spike or not evidence.stands_out("grad_norm", t.noise):
            return []
        self._spike = (step, 1)
        ratio = evidence.times("ratio")
        still = "G_mean/G_ctr not known" if ratio is None else f"G_mean/G_ctr {ratio:.3g} × its median"
        return [Event(step, "spike", f"{evidence.describe('grad_norm')} (threshold {t.spike:g} ×); {still}")]

    def _recovery(self, step: int, evidence: Evidence) -> list[Event]:
        if self.state == "healthy":
            return []
        well = evidence.well()
        if well is not None:
            self._well.add(step, well)
        if not self._well.sustained():
            return []
        rows, was, self.state = self._well.needed, self.state, "healthy"
        self._forget_evidence()
        why = f"no longer {was}: {rows} rows in the healthy range; {evidence.describe_all()}"
        return [Event(step, "recovered", why)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "beyond": self.beyond,
            "well": [list(pair) for pair in self._well.seen],
            "spike": list(self._spike) if self._spike else None,
            "stats": self._stats.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.beyond = state["state"], state["beyond"]
        self._well.load(state["well"])
        self._spike = tuple(state["spike"]) if state["spike"] else None
        self._stats.load_state_dict(state["stats"])
