"""The detector's memory of a run: running medians, and more. `state_dict` holds plain containers only."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any

from mvsplit.stability.thresholds import Thresholds

NAMES = ("loss", "grad_norm", "g_mean", "g_ctr", "q_grad", "rho", "token_cosine")
"""The statistics that are read; each may be missing, from a row or from all."""
DEATH_SIGNS = ("shape", "ratio", "q", "loss", "doubt")
"""Signs of a dead network: see `Evidence.death`."""


class RunningMedian:
    """Medians of the last `size` values, and of the last few."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: deque[tuple[int, float]] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self.values)

    def add(self, step: int, value: float) -> None:
        self.values.append((step, value))
        insort(self._sorted, value)
        if len(self.values) > self.size:
            self._drop(self.values.popleft()[1])

    def forget_from(self, step: int) -> None:
        """Drop values of this step and later ones: the run has returned to an earlier step."""
        while self.values and self.values[-1][0] >= step:
            self._drop(self.values.pop()[1])

    def _drop(self, value: float) -> None:
        del self._sorted[bisect_left(self._sorted, value)]

    def median(self) -> float:
        half = len(self._sorted) // 2
        return self._sorted[half] if len(self._sorted) % 2 else (self._sorted[half - 1] + self._sorted[half]) / 2

    def last(self, count: int) -> float:
        return median(value for _, value in list(self.values)[-count:])

    def spread_of_last(self, count: int) -> float:
        """Robust standard deviation of the last values around their trend, from the differences of neighbours."""
        values = [value for _, value in list(self.values)[-count:]]
        return 1.4826 * median([abs(b - a) for a, b in pairwise(values)] or [0.0]) / math.sqrt(2)

    def spread(self, logarithm: bool) -> float:
        """Robust standard deviation."""
        middle = self.median()
        if logarithm:
            logs = [abs(math.log(v / middle)) for v in self._sorted if v > 0 and middle > 0]
            return 1.4826 * median(logs) if logs else 0.0
        return 1.4826 * median(abs(v - middle) for v in self._sorted)


class Streak:
    """Whether a sign has been present for long enough, by the rows in which it could be seen."""

    def __init__(self, steps: int, rows: int) -> None:
        self.steps, self.rows = steps, rows
        self.seen: deque[tuple[int, bool]] = deque(maxlen=max(steps, rows))

    def add(self, step: int, hit: bool) -> None:
        self.seen.append((step, hit))

    @property
    def needed(self) -> int:
        """Rows: `steps` of them one step apart, fewer where they are further apart, but at least `rows`."""
        steps = [step for step, _ in self.seen]
        gaps = [b - a for a, b in pairwise(steps) if b > a]
        return max(self.rows, math.ceil(self.steps / (median(gaps) if gaps else 1)))

    def sustained(self) -> bool:
        """Whether all of the last rows show it, except one in eight."""
        if not self.seen or not self.seen[-1][1]:
            return False
        needed = self.needed
        hits = [hit for _, hit in self.seen][-needed:]
        return len(hits) == needed and sum(hits) >= needed - needed // 8

    def load(self, pairs: Iterable[Any]) -> None:
        self.seen.clear()
        self.seen.extend((step, hit) for step, hit in pairs)


class RunningStats:
    """Medians of the healthy network, the first losses, and the last rows of a run.

    Attributes:
        normal: running medians by statistic, and of `ratio`, G_mean / G_ctr.
        first: the first few (step, loss).
        lowest: the lowest short median of the loss.
        losses: the last losses, whatever the state.
        queries: the last Q gradients, whatever the state.
        streaks: by sign of a dead network.
        before: the last row.
        calm_from: the step at which the grace after a jump ends.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        t = self.thresholds = thresholds
        self.normal = {name: RunningMedian(t.window) for name in (*NAMES, "ratio")}
        self.first: list[tuple[int, float]] = []
        self.lowest = math.inf
        self.losses: deque[float] = deque(maxlen=3 * t.patience * t.doubt)
        self.streaks = {name: Streak(t.patience, t.patience_rows) for name in DEATH_SIGNS[:-1]}
        self.streaks["doubt"] = Streak(t.patience * t.doubt, t.patience_rows * 2)
        self.queries: deque[float] = deque(maxlen=t.patience)
        self.steps: deque[int] = deque(maxlen=21)
        self.calm_from = -1
        self._gap: float | None = None  # computed once per row
        self.before: dict[str, float] = {}
        self._stood_still = (0, False)  # step, and whether no measure of the collapse had moved then

    def begin(self, step: int, row: dict[str, float]) -> None:
        """Record a row, whatever the state."""
        self._jump(step)
        self.steps.append(step)
        self._gap = None
        if "q_grad" in row:
            self.queries.append(row["q_grad"])
        if "loss" in row:
            self.losses.append(row["loss"])
            if len(self.first) < 5 and (not self.first or step - self.first[0][0] <= 5):
                self.first.append((step, row["loss"]))

    def gap(self) -> float:
        """Steps between two rows."""
        if self._gap is None:
            gaps = [b - a for a, b in pairwise(self.steps) if b > a]
            self._gap = median(gaps) if gaps else 1
        return self._gap

    def min_rows(self) -> int:
        return self.thresholds.min_rows if self.gap() < 10 else self.thresholds.min_rows_sparse

    def _jump(self, step: int) -> None:
        if not self.steps:
            return
        last = self.steps[-1]
        if last < step <= last + max(3 * self.gap(), 2):
            return
        self.calm_from = step + max(self.thresholds.grace, round(3 * self.gap()))
        if step <= last:
            self.forget_from(step)
            loss = self.normal["loss"]
            self.lowest = loss.last(self.thresholds.recent) if len(loss) >= self.min_rows() else math.inf
            self.steps.clear()

    def learn(self, step: int, row: dict[str, float]) -> None:
        """Add a healthy row to the medians."""
        for name, value in row.items():
            if value > 0 or name == "token_cosine":
                self.normal[name].add(step, value)
        if "loss" in row and len(self.normal["loss"]) >= self.min_rows():
            self.lowest = min(self.lowest, self.normal["loss"].last(self.thresholds.recent))

    def forget_from(self, step: int) -> None:
        for running in self.normal.values():
            running.forget_from(step)

    def died(self, step: int) -> None:
        """Forget the rows added while the network was dying, or all of them if it was dead from the start."""
        sustained = [streak.seen[-streak.needed][0] for streak in self.streaks.values() if streak.sustained()]
        self.forget_from(min(sustained, default=step))
        for name, running in self.normal.items():
            if len(running) < self.min_rows():
                self.normal[name] = RunningMedian(running.size)

    def contradicted(self, step: int, still: bool | None) -> bool:
        """Whether no measure of the collapse itself has moved, in this row or one shortly before."""
        if still is not None:
            self._stood_still = (step, still)
        since, verdict = self._stood_still
        return verdict and step - since <= max(self.thresholds.patience, 2 * self.gap())

    def state_dict(self) -> dict[str, Any]:
        return {
            "normal": {name: [list(pair) for pair in running.values] for name, running in self.normal.items()},
            "streaks": {name: [list(pair) for pair in streak.seen] for name, streak in self.streaks.items()},
            "first": [list(pair) for pair in self.first],
            "losses": list(self.losses),
            "queries": list(self.queries),
            "steps": list(self.steps),
            "before": dict(self.before),
            "numbers": [self.lowest, self.calm_from, *self._stood_still],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, running in self.normal.items():
            self.normal[name] = RunningMedian(running.size)
            for step, value in state["normal"][name]:
                self.normal[name].add(step, value)
        for name, streak in self.streaks.items():
            streak.load(state["streaks"][name])
        self.first = [(step, loss) for step, loss in state["first"]]
        queues: dict[str, deque[Any]] = {"losses": self.losses, "queries": self.queries, "steps": self.steps}
        self._gap = None
        for name, queue in queues.items():
            queue.clear()
            queue.extend(state[name])
        self.before = dict(state["before"])
        self.lowest, self.calm_from, step, still = state["numbers"]
        self._stood_still = (step, still)
