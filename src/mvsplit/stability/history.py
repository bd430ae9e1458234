"""Running medians, and what else the guard remembers of a run. Plain containers go in and out: see `state_dict`."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any

from mvsplit.stability.thresholds import Thresholds

NAMES = ("loss", "grad_norm", "g_mean", "g_ctr", "q_grad", "rho", "token_cosine")
"""The statistics that are read; each may be missing, in a row or altogether."""
EVIDENCE = ("shape", "ratio", "q", "loss", "doubt")
"""What a dead network shows: see `Signs.death`."""


class Running:
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
        """Drop values of this step and later ones: the run has gone back."""
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
        """Robust standard deviation of the last few around their trend: from the differences of neighbours."""
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
    """Whether one kind of evidence has been there for long enough, by the rows in which it could be seen."""

    def __init__(self, steps: int, rows: int) -> None:
        self.steps, self.rows = steps, rows
        self.seen: deque[tuple[int, bool]] = deque(maxlen=max(steps, rows))

    def add(self, step: int, hit: bool) -> None:
        self.seen.append((step, hit))

    @property
    def needed(self) -> int:
        """Rows: `steps` of them one step apart, fewer where they are further apart, never less than `rows`."""
        steps = [step for step, _ in self.seen]
        gaps = [b - a for a, b in pairwise(steps) if b > a]
        return max(self.rows, math.ceil(self.steps / (median(gaps) if gaps else 1)))

    def sustained(self) -> bool:
        """All of the last rows, but for one in eight."""
        if not self.seen or not self.seen[-1][1]:
            return False
        needed = self.needed
        hits = [hit for _, hit in self.seen][-needed:]
        return len(hits) == needed and sum(hits) >= needed - needed // 8

    def load(self, pairs: Iterable[Any]) -> None:
        self.seen.clear()
        self.seen.extend((step, hit) for step, hit in pairs)


class History:
    """What is remembered of a run: medians of the healthy network, the first losses, and what went on lately.

    Attributes:
        normal: running medians by statistic, and of `ratio`, G_mean / G_ctr. first: the first few (step, loss).
        lowest: short median of the loss. losses, queries: the last losses and Q gradients, whatever the state.
        streaks: evidence of a dead network.
        before: the last row. calm_from: the step at which the grace after a jump ends.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        t = self.thresholds = thresholds
        self.normal = {name: Running(t.window) for name in (*NAMES, "ratio")}
        self.first: list[tuple[int, float]] = []
        self.lowest = math.inf
        self.losses: deque[float] = deque(maxlen=3 * t.patience * t.doubt)
        self.streaks = {name: Streak(t.patience, t.patience_rows) for name in EVIDENCE[:-1]}
        self.streaks["doubt"] = Streak(t.patience * t.doubt, t.patience_rows * 2)
        self.queries: deque[float] = deque(maxlen=t.patience)
        self.steps: deque[int] = deque(maxlen=21)
        self.calm_from = -1
        self._gap: float | None = None  # worked out once a row
        self.before: dict[str, float] = {}
        self._stood_still = (0, False)  # step, and whether measures of the collapse itself had not moved then

    def begin(self, step: int, row: dict[str, float]) -> None:
        """A row comes."""
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
        """Take a healthy row into the medians."""
        for name, value in row.items():
            if value > 0 or name == "token_cosine":
                self.normal[name].add(step, value)
        if "loss" in row and len(self.normal["loss"]) >= self.min_rows():
            self.lowest = min(self.lowest, self.normal["loss"].last(self.thresholds.recent))

    def forget_from(self, step: int) -> None:
        for running in self.normal.values():
            running.forget_from(step)

    def died(self, step: int) -> None:
        """Forget what was learned while it was dying, or all if it was dead from the start."""
        sustained = [streak.seen[-streak.needed][0] for streak in self.streaks.values() if streak.sustained()]
        self.forget_from(min(sustained, default=step))
        for name, running in self.normal.items():
            if len(running) < self.min_rows():
                self.normal[name] = Running(running.size)

    def contradicted(self, step: int, still: bool | None) -> bool:
        """Whether measures of the collapse itself, in this row or one shortly before, have not moved."""
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
            self.normal[name] = Running(running.size)
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
