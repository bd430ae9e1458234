"""The guard's judgement: reads one row of cheap statistics after the other and says when a network is collapsing.

The failure (Mean Mode Screaming, paper's appendix A) is announced by no single curve. At the event the gradient norm
is ≥ 18 × its median, but benign spikes of 15 × (at laptop scale of 50,000 ×) occur too; what tells them apart is the
mean-coherent part of the writers' gradient, G_mean, against the centred part, G_ctr (× 156 and × 0.5). Afterwards the
gradient norm looks normal while tokens are all alike (cosine 1), Q and K receive no gradient, and the loss is back at
its initial value. So several signs are weighed together (`signs.py`): three points are an onset.

Whatever can be relative is judged against running medians of the healthy network (`history.py`), which stand still
while it is not. Medians and patience count rows, whose distance in steps may be anything; deadlines count steps.
No torch: the same code judges a running training and a file.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from mvsplit.stability.history import NAMES, History, Streak
from mvsplit.stability.signs import Signs
from mvsplit.stability.thresholds import Thresholds

__all__ = ["NAMES", "Event", "Thresholds", "Watch"]
Kind = Literal["spike", "onset", "dead", "recovered"]
State = Literal["healthy", "onset", "dead"]


@dataclass(frozen=True)
class Event:
    """A decision: a spike (no action needed), an onset, a dead network, or that it has recovered."""

    step: int
    kind: Kind
    why: str


class Watch:
    """Follows one run. `observe` each row in turn.

    A spike does not leave the healthy state and ends without a word (its rows stay out of the medians). After an onset
    or death comes `recovered`, when the statistics have been in their healthy range for long enough, then possibly the
    next; an onset turns into death without a recovery.

    Attributes:
        state: how the network stands. beyond: whether the last row was out of the healthy range.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.state: State = "healthy"
        self.beyond = False
        self._history = History(self.thresholds)
        self._well = Streak(self.thresholds.recovery, 2 * self.thresholds.patience_rows)
        self._spike: tuple[int, int] | None = None  # the step at which it began, and rows since

    def observe(self, step: int, values: dict[str, float | None]) -> list[Event]:
        """Judge one row; values may be missing, None or not finite."""
        row = {name: float(v) for name in NAMES if (v := values.get(name)) is not None and math.isfinite(v)}
        if row.get("g_ctr", 0) > 0 and row.get("g_mean", 0) > 0:
            row["ratio"] = row["g_mean"] / row["g_ctr"]
        self._history.begin(step, row)
        signs = Signs(self._history, step, row)
        signs.note()
        events = [*self._death(step, signs), *self._onset(step, signs)] or self._recovery(step, signs)
        if self.state == "healthy":
            events = events or self._spikes(step, signs)
            if self._spike is None or self._spike[1] > self.thresholds.spike_rows:
                self._history.learn(step, row)
        self._history.before = row
        return events

    def went_back(self) -> None:
        """Tell that weights of a healthy time were put back: what was wrong is over, medians stay."""
        self.state, self.beyond = "healthy", False
        self._forget_evidence()
        self._history.losses.clear()

    def _forget_evidence(self) -> None:
        self._spike = None
        for streak in (*self._history.streaks.values(), self._well):
            streak.seen.clear()

    def _death(self, step: int, signs: Signs) -> list[Event]:
        why = signs.death(self.state == "onset") if self.state != "dead" else None
        if why is None:
            return []
        self.state, self._spike = "dead", None
        self._well.seen.clear()
        self._history.died(step)
        return [Event(step, "dead", why)]

    def _onset(self, step: int, signs: Signs) -> list[Event]:
        points = signs.onset_points()
        total = sum(point for point, _ in points)
        self.beyond = total >= 2 or (self.state == "dead" and signs.looks_dead())
        if self.state != "healthy" or total < 3:
            return []
        self.state, self._spike = "onset", None
        self._well.seen.clear()
        return [Event(step, "onset", "; ".join(text for _, text in points))]

    def _spikes(self, step: int, signs: Signs) -> list[Event]:
        t, times = self.thresholds, signs.times("grad_norm")
        if times is None:
            return []
        if self._spike is not None:
            since, rows = self._spike
            self._spike = None if times < t.spike_end or rows > 2 * t.spike_rows else (since, rows + 1)
            return []
        if times < t.spike or not signs.stands_out("grad_norm", t.noise):
            return []
        self._spike = (step, 1)
        ratio = signs.times("ratio")
        still = "G_mean/G_ctr not known" if ratio is None else f"G_mean/G_ctr {ratio:.3g} × its median"
        return [Event(step, "spike", f"{signs.told('grad_norm')} (threshold {t.spike:g} ×); {still}")]

    def _recovery(self, step: int, signs: Signs) -> list[Event]:
        if self.state == "healthy":
            return []
        well = signs.well()
        if well is not None:
            self._well.add(step, well)
        if not self._well.sustained():
            return []
        rows, was, self.state = self._well.needed, self.state, "healthy"
        self._forget_evidence()
        return [Event(step, "recovered", f"no longer {was}: {rows} rows in the healthy range; {signs.shown()}")]

    def state_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "beyond": self.beyond,
            "well": [list(pair) for pair in self._well.seen],
            "spike": list(self._spike) if self._spike else None,
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.beyond = state["state"], state["beyond"]
        self._well.load(state["well"])
        self._spike = tuple(state["spike"]) if state["spike"] else None
        self._history.load_state_dict(state["history"])
