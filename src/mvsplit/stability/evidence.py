"""Compares one row of statistics with those of the run so far: evidence of an onset, of death, of health."""

import math
from statistics import median

from mvsplit.stability.running_stats import DEATH_SIGNS, NAMES, RunningStats


class Evidence:
    """The terms that one row contributes. Each has a weight, its points, and a text that gives value and threshold."""

    def __init__(self, stats: RunningStats, step: int, row: dict[str, float]) -> None:
        self.stats, self.step, self.row, self.t = stats, step, row, stats.thresholds

    def normal(self, name: str) -> float | None:
        """The running median; None before there are enough rows."""
        running = self.stats.normal[name]
        absolute = name in ("token_cosine", "rho")  # compared as they are; the median only shows where they were
        return running.median() if len(running) >= (4 if absolute else self.stats.min_rows()) else None

    def times(self, name: str) -> float | None:
        """Value relative to the median, the higher of the long and the short one."""
        usual = self.normal(name)
        if usual is None or usual <= 0 or name not in self.row:
            return None
        return self.row[name] / max(usual, self.stats.normal[name].last(self.t.recent))

    def stands_out(self, name: str, deviations: float) -> bool:
        """Whether the value is this many robust standard deviations above the median."""
        running = self.stats.normal[name]
        return math.log(self.row[name] / running.median()) >= deviations * running.spread(logarithm=True)

    def describe(self, name: str) -> str:
        label = {"ratio": "G_mean/G_ctr"}.get(name, name)
        usual = self.normal(name)
        value = f"{label} {self.row[name]:.3g}"
        return value if usual is None else f"{value} = {self.row[name] / usual:.3g} × its median {usual:.3g}"

    def describe_all(self) -> str:
        return ", ".join(f"{name} {self.row[name]:.3g}" for name in (*NAMES, "ratio") if name in self.row)

    def shape(self, cosine: float, rho: float) -> bool | None:
        """Whether tokens are at least this similar; None if that is not known."""
        if "token_cosine" in self.row:
            return self.row["token_cosine"] >= cosine
        return self.row["rho"] >= rho if "rho" in self.row else None

    def loss_share(self, loss: float, usual: float) -> float | None:
        """Share of the way from a usual loss back to the initial one; None if that is not known."""
        first = self.stats.first
        if not first:
            return None
        initial = median(loss for _, loss in first)
        if initial < 1.2 * usual:
            if first[0][0] <= 100:
                return None  # it has never fallen much
            initial = 2 * usual  # the trace does not go back to the start
        return (loss - usual) / (initial - usual)

    def onset_points(self) -> list[tuple[int, str]]:
        """The terms of an onset. Three points in total are an onset; a single weak term has one point."""
        found = [self._gradient(), self._ratio(), self._alike(), self._queries()]
        moved = any(point for point, _ in found[1:])
        found += [self._loss(moved), self._stir()]
        return [(point, text) for point, text in found if point]

    def _gradient(self) -> tuple[int, str]:
        times = self.times("grad_norm")
        up = times is not None and times >= 3 and self.stands_out("grad_norm", 3)
        return (1, self.describe("grad_norm")) if up else (0, "")

    def _ratio(self) -> tuple[int, str]:
        """The mean-coherent part against the centred."""
        times = self.times("ratio")
        if times is None or self.row["ratio"] < self.t.ratio_floor or times < self.t.ratio_still:
            return 0, ""
        text = f"{self.describe('ratio')} (threshold {self.t.ratio:g} ×)"
        if times >= self.t.ratio_alone and (self.times("g_mean") or 0) >= 10 and self.stands_out("ratio", self.t.noise):
            return 3, text
        if times >= self.t.ratio and self.stands_out("ratio", self.t.noise):
            return 2, text
        return (1, text) if self.stands_out("ratio", 3) else (0, "")

    def _alike(self) -> tuple[int, str]:
        """Tokens become alike. Two measures of it: rho, a mean of ratios, shows a few collapsing samples sooner."""
        usual, rho = self.normal("token_cosine"), self.normal("rho")
        views = []
        if usual is not None:
            strong = self.t.cosine_onset if usual <= self.t.cosine_onset - self.t.cosine_step else math.inf
            views.append(self._reaches("token_cosine", usual, strong, max(0.75, usual + 0.3)))
        if rho is not None:
            views.append(self._reaches("rho", rho, max(self.t.rho_onset, 4 * rho), max(1.5, 3 * rho)))
        return max(views, default=(0, ""), key=lambda view: view[0])

    def _reaches(self, name: str, usual: float, strong: float, weak: float) -> tuple[int, str]:
        if name not in self.row:
            return 0, ""
        value, before = self.row[name], self.stats.before.get(name, -math.inf)
        text = f"{name} {value:.4g} (median {usual:.3g}, threshold {strong:.3g})"
        if value >= strong:
            return (3 if before >= strong else 2), text
        apart = value - usual >= 2.5 * self.stats.normal[name].spread(logarithm=False)
        return (1, text) if value >= weak and apart else (0, "")

    def _queries(self) -> tuple[int, str]:
        """The Q gradient vanishes."""
        usual = self.normal("q_grad")
        if usual is None or "q_grad" not in self.row:
            return 0, ""
        share, before = self.row["q_grad"] / usual, self.stats.before.get("q_grad", math.inf) / usual
        text = f"{self.describe('q_grad')} (threshold {self.t.q_onset:g} ×)"
        if share <= self.t.q_onset:
            return (3 if before <= self.t.q_onset else 2), text
        return (1, text) if share <= 0.1 else (0, "")

    def _loss(self, moved: bool) -> tuple[int, str]:
        """The loss returns to where it began: the only evidence where nothing else is measured."""
        usual, losses = self.normal("loss"), list(self.stats.losses)
        if usual is None or "loss" not in self.row:
            return 0, ""
        usual = min(
            usual, self.stats.normal["loss"].last(2 * self.t.recent)
        )  # while it falls, the long one lags behind
        sparse = self.stats.gap() >= 10
        short = min(losses[-2:]) if sparse else median(losses[-3:])
        longer = short if sparse else median(losses[-5:])
        spread = self.stats.normal["loss"].spread_of_last(2 * self.t.recent)
        share = self.loss_share(short, usual)
        shown = self.row["loss"] if self.row["loss"] > short else short
        text = f"loss {shown:.4g} = {shown / usual:.3g} × its median {usual:.4g}"
        if share is not None and share > 0:
            text += f", {share:.0%} of the way back to the initial loss (threshold {self.t.loss_rise:.0%})"
        leaps = self.row["loss"] >= max(1.2 * usual, usual + self.t.noise * spread)
        if not leaps and (short < 1.05 * usual or short < usual + 2 * spread):
            return 0, ""
        high = share is not None and share >= self.t.loss_rise and short >= usual + self.t.noise * spread
        # A higher loss is no evidence after a jump, or where measures of the collapse have not moved.
        after_jump = self.step < self.stats.calm_from and not moved
        if not high or short < 1.2 * usual or after_jump or self.stats.contradicted(self.step, self._still()):
            return 1, text
        assert share is not None
        rises = self.loss_share(longer, usual)
        if rises is not None and rises >= self.t.loss_rise:
            return 3, text
        return (2 if moved else 1), text  # beside a mere spike of the gradient it must stay high

    def _still(self) -> bool | None:
        """Whether there are measures of the collapse itself and none has moved; None if there are none."""
        ratio, alike = self.times("ratio"), self.shape(0.85, 4.0)
        if ratio is None and alike is None:
            return None
        return not (ratio is not None and ratio >= self.t.ratio_still) and not alike

    def _stir(self) -> tuple[int, str]:
        """A spike after the gradient norm has been raised for long, with the loss unmoved."""
        times, running = self.times("grad_norm"), self.stats.normal["grad_norm"]
        if times is None or times < self.t.spike or len(running) < self.t.window // 2 or self._still() is not None:
            return 0, ""
        stir = running.last(self.t.recent) / running.median()
        usual, losses = self.stats.normal["loss"], list(self.stats.losses)
        calm = len(usual) < 2 or median(losses[-5:]) <= usual.median() + 2.5 * usual.spread(logarithm=False)
        return (2, f"after {self.t.recent} rows at {stir:.3g} ×") if stir >= self.t.stir and calm else (0, "")

    def note_death_signs(self) -> None:
        """Add this row to the streaks of a dead network's signs."""
        ratio = self.row["ratio"] >= self.t.ratio_dead if "ratio" in self.row else None
        shape, loss = self.shape(self.t.cosine_dead, self.t.rho_dead), self._back_at_start()
        for name, hit in zip(DEATH_SIGNS, (shape, ratio, self._no_queries(), loss, loss), strict=True):
            if hit is not None:
                self.stats.streaks[name].add(self.step, hit)

    def looks_dead(self) -> bool:
        rows = (streak.seen[-1] for streak in self.stats.streaks.values() if streak.seen)
        return any(hit for step, hit in rows if step == self.step)

    def _no_queries(self) -> bool | None:
        if "q_grad" not in self.row:
            return None
        q, usual = self.row["q_grad"], self.normal("q_grad")
        if usual is not None:
            return q <= self.t.q_dead * usual
        if q == 0 and self.stats.steps[0] < 50:
            return False  # at the start of training it may be 0
        norm = self.row.get("grad_norm", self.row.get("g_mean", 0.0))
        return q <= self.t.q_share * norm

    def _queries_grow(self, rows: int) -> bool:
        """Whether the Q gradient is small because training has just begun: then it grows."""
        recent = list(self.stats.queries)[-rows:]
        few = max(1, len(recent) // 3)
        young = self.stats.steps[0] < 50 and self.normal("q_grad") is None
        return young and median(recent[-few:]) > 2 * median(recent[:few])

    def _back_at_start(self) -> bool | None:
        lowest = self.stats.lowest
        if "loss" not in self.row or not math.isfinite(lowest):
            return None
        losses = list(self.stats.losses)
        short = losses[-1] if self.stats.gap() >= 10 else median(losses[-5:])
        share = self.loss_share(short, lowest)
        return share is not None and share >= self.t.loss_dead

    def _flat(self, rows: int) -> bool:
        """Whether the loss does not fall again, as it does after the jump of a resumed run."""
        losses = list(self.stats.losses)[-rows:]
        half = len(losses) // 2
        running = self.stats.normal["loss"]
        above = 0.15 * (median(losses) - self.stats.lowest)
        noise = 2 * running.spread(logarithm=False) if len(running) else 0.0
        return half == 0 or median(losses[:half]) - median(losses[half:]) <= max(above, noise)

    def death(self, alarmed: bool) -> str | None:
        """Why the network is dead, if it is. After an alarm, the loss alone needs no more than the usual patience."""
        streaks, usual, losses = self.stats.streaks, self.normal("loss"), list(self.stats.losses)[-5:]
        share = self.loss_share(median(losses), usual) if usual is not None and losses else None
        if share is not None and share <= 0.25:
            return None
        # Tokens differ, unless rho shows that those of many samples do not, though the mean cosine is below 1.
        lively = bool(streaks["shape"].seen) and not streaks["shape"].seen[-1][1]
        lively = lively and self.row.get("rho", 0.0) < self.t.rho_dead
        for name, why in (
            ("shape", f"tokens are all alike (threshold {self.t.cosine_dead:g}, or rho {self.t.rho_dead:g})"),
            ("ratio", f"nothing but the mean-coherent part is left (threshold {self.t.ratio_dead:g})"),
            ("q", f"Q receives no gradient (threshold {self.t.q_dead:g} × its median)"),
        ):
            if not streaks[name].sustained() or (name != "shape" and lively):
                continue
            if name != "q" or not self._queries_grow(streaks[name].needed):
                return f"{why} for {streaks[name].needed} rows: {self.describe_all()}"
        name = "doubt" if self.stats.contradicted(self.step, self._still()) and not alarmed else "loss"
        if streaks[name].sustained() and self._flat(streaks[name].needed):
            why = f"the loss is back near where it began, and flat, for {streaks[name].needed} rows"
            return f"{why} (lowest median {self.stats.lowest:.4g}): {self.describe_all()}"
        return None

    def well(self) -> bool | None:
        """Whether all values present are in the healthy range; None if none of them can show it."""
        alike = self.shape(0.9, max(5.0, 3 * (self.normal("rho") or 0.0)))
        known = [] if alike is None else [not alike]
        ratio, queries = self.times("ratio"), self.normal("q_grad")
        if "ratio" in self.row:
            known.append(self.row["ratio"] < self.t.ratio_dead / 2 if ratio is None else ratio < self.t.ratio_still)
        if "q_grad" in self.row and queries is not None:
            known.append(self.row["q_grad"] >= 0.1 * queries)
        if (loss := self._loss_well_again() if "loss" in self.row else None) is not None:
            known.append(loss)
        return all(known) and (self.times("grad_norm") or 0.0) < self.t.spike if known else None

    def _loss_well_again(self) -> bool | None:
        usual = self.normal("loss")
        if usual is None:
            first = self.stats.first
            return self.row["loss"] <= 0.9 * median(loss for _, loss in first) if first else None
        short = median(list(self.stats.losses)[-3:])
        share = self.loss_share(short, usual)
        return short <= 1.1 * usual if share is None else share <= 0.35
