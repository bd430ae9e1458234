"""One row of statistics against what is remembered of the run: evidence of an onset, of death, of health."""

import math
from statistics import median

from mvsplit.stability.history import NAMES, History


class Signs:
    """One row against the medians."""

    def __init__(self, history: History, step: int, row: dict[str, float]) -> None:
        self.history, self.step, self.row, self.t = history, step, row, history.thresholds

    # ------------------------------------------------------------------ measures

    def normal(self, name: str) -> float | None:
        """The running median, once there are enough rows."""
        running = self.history.normal[name]
        absolute = name in ("token_cosine", "rho")  # judged by their own values; the median only tells where they were
        return running.median() if len(running) >= (4 if absolute else self.history.min_rows()) else None

    def times(self, name: str) -> float | None:
        """Value over median; the higher of the long and the short one."""
        usual = self.normal(name)
        if usual is None or usual <= 0 or name not in self.row:
            return None
        return self.row[name] / max(usual, self.history.normal[name].last(self.t.recent))

    def stands_out(self, name: str, deviations: float) -> bool:
        """Whether the value is so many robust standard deviations above the median."""
        running = self.history.normal[name]
        return math.log(self.row[name] / running.median()) >= deviations * running.spread(logarithm=True)

    def told(self, name: str) -> str:
        label = {"ratio": "G_mean/G_ctr"}.get(name, name)
        usual = self.normal(name)
        value = f"{label} {self.row[name]:.3g}"
        return value if usual is None else f"{value} = {self.row[name] / usual:.3g} × its median {usual:.3g}"

    def shown(self) -> str:
        return ", ".join(f"{name} {self.row[name]:.3g}" for name in (*NAMES, "ratio") if name in self.row)

    def shape(self, cosine: float, rho: float) -> bool | None:
        """Whether tokens are as much alike as that; None if that is not known."""
        if "token_cosine" in self.row:
            return self.row["token_cosine"] >= cosine
        return self.row["rho"] >= rho if "rho" in self.row else None

    def loss_share(self, loss: float, usual: float) -> float | None:
        """How much of the way from a usual loss back to the initial one."""
        first = self.history.first
        if not first:
            return None
        initial = median(loss for _, loss in first)
        if initial < 1.2 * usual:
            if first[0][0] <= 100:
                return None  # it has never fallen much
            initial = 2 * usual  # the trace does not go back to the start
        return (loss - usual) / (initial - usual)

    # -------------------------------------------------------------------- onset

    def onset_points(self) -> list[tuple[int, str]]:
        """Evidence of an onset with its weight; three points are one, and no single weak sign is more than one."""
        found = [self._gradient(), self._ratio(), self._alike(), self._queries()]
        moved = any(point for point, _ in found[1:])
        found.append(self._loss(moved))
        found.append(self._stir())
        return [(point, text) for point, text in found if point]

    def _gradient(self) -> tuple[int, str]:
        times = self.times("grad_norm")
        up = times is not None and times >= 3 and self.stands_out("grad_norm", 3)
        return (1, self.told("grad_norm")) if up else (0, "")

    def _ratio(self) -> tuple[int, str]:
        """The mean-coherent part against the centred."""
        times = self.times("ratio")
        if times is None or self.row["ratio"] < self.t.ratio_floor or times < self.t.ratio_still:
            return 0, ""
        text = f"{self.told('ratio')} (threshold {self.t.ratio:g} ×)"
        if times >= self.t.ratio_alone and (self.times("g_mean") or 0) >= 10 and self.stands_out("ratio", self.t.noise):
            return 3, text
        if times >= self.t.ratio and self.stands_out("ratio", self.t.noise):
            return 2, text
        return (1, text) if self.stands_out("ratio", 3) else (0, "")

    def _alike(self) -> tuple[int, str]:
        """Tokens grow alike. Two views of one thing: rho, a mean of ratios, sees few samples that collapse sooner."""
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
        value, before = self.row[name], self.history.before.get(name, -math.inf)
        text = f"{name} {value:.4g} (median {usual:.3g}, threshold {strong:.3g})"
        if value >= strong:
            return (3 if before >= strong else 2), text
        apart = value - usual >= 2.5 * self.history.normal[name].spread(logarithm=False)
        return (1, text) if value >= weak and apart else (0, "")

    def _queries(self) -> tuple[int, str]:
        """The Q gradient vanishes."""
        usual = self.normal("q_grad")
        if usual is None or "q_grad" not in self.row:
            return 0, ""
        share, before = self.row["q_grad"] / usual, self.history.before.get("q_grad", math.inf) / usual
        text = f"{self.told('q_grad')} (threshold {self.t.q_onset:g} ×)"
        if share <= self.t.q_onset:
            return (3 if before <= self.t.q_onset else 2), text
        return (1, text) if share <= 0.1 else (0, "")

    def _loss(self, moved: bool) -> tuple[int, str]:
        """The loss goes back to where it began: the only sign where nothing else is measured."""
        usual, losses = self.normal("loss"), list(self.history.losses)
        if usual is None or "loss" not in self.row:
            return 0, ""
        # While it falls, the long median lags behind.
        usual = min(usual, self.history.normal["loss"].last(2 * self.t.recent))
        sparse = self.history.gap() >= 10
        short = min(losses[-2:]) if sparse else median(losses[-3:])
        longer = short if sparse else median(losses[-5:])
        spread = self.history.normal["loss"].spread_of_last(2 * self.t.recent)
        share = self.loss_share(short, usual)
        shown = self.row["loss"] if self.row["loss"] > short else short
        text = f"loss {shown:.4g} = {shown / usual:.3g} × its median {usual:.4g}"
        if share is not None and share > 0:
            text += f", {share:.0%} of the way back to the initial loss (threshold {self.t.loss_rise:.0%})"
        leaps = self.row["loss"] >= max(1.2 * usual, usual + self.t.noise * spread)
        if not leaps and (short < 1.05 * usual or short < usual + 2 * spread):
            return 0, ""
        high = share is not None and share >= self.t.loss_rise and short >= usual + self.t.noise * spread
        if not high or short < 1.2 * usual or self._explained(moved):
            return 1, text
        assert share is not None
        rises = self.loss_share(longer, usual)
        if rises is not None and rises >= self.t.loss_rise:
            return 3, text
        return (2 if moved else 1), text  # beside a spike of the gradient alone it has to stay up

    def _explained(self, moved: bool) -> bool:
        """Whether a higher loss is no sign of a collapse: after a jump, or beside measures that have not moved."""
        if self.step < self.history.calm_from and not moved:
            return True
        return self.history.contradicted(self.step, self._still())

    def _still(self) -> bool | None:
        """Whether measures of the collapse itself are there and have not moved; None if none is there."""
        ratio, alike = self.times("ratio"), self.shape(0.85, 4.0)
        if ratio is None and alike is None:
            return None
        return not (ratio is not None and ratio >= self.t.ratio_still) and not alike

    def _stir(self) -> tuple[int, str]:
        """A spike after the gradient norm has stirred for long, the loss unmoved."""
        times, running = self.times("grad_norm"), self.history.normal["grad_norm"]
        if times is None or times < self.t.spike or len(running) < self.t.window // 2 or self._still() is not None:
            return 0, ""
        stir = running.last(self.t.recent) / running.median()
        usual, losses = self.history.normal["loss"], list(self.history.losses)
        calm = len(usual) < 2 or median(losses[-5:]) <= usual.median() + 2.5 * usual.spread(logarithm=False)
        return (2, f"after {self.t.recent} rows at {stir:.3g} ×") if stir >= self.t.stir and calm else (0, "")

    # --------------------------------------------------------------------- death

    def note(self) -> None:
        """Write down what this row says of a dead network."""
        hits = {
            "shape": self.shape(self.t.cosine_dead, self.t.rho_dead),
            "ratio": self.row["ratio"] >= self.t.ratio_dead if "ratio" in self.row else None,
            "q": self._no_queries(),
            "loss": self._back_at_start(),
        }
        hits["doubt"] = hits["loss"]
        for name, hit in hits.items():
            if hit is not None:
                self.history.streaks[name].add(self.step, hit)

    def looks_dead(self) -> bool:
        rows = (streak.seen[-1] for streak in self.history.streaks.values() if streak.seen)
        return any(hit for step, hit in rows if step == self.step)

    def _no_queries(self) -> bool | None:
        if "q_grad" not in self.row:
            return None
        q, usual = self.row["q_grad"], self.normal("q_grad")
        if usual is not None:
            return q <= self.t.q_dead * usual
        if q == 0 and self.history.steps[0] < 50:
            return False  # at the start of a training it may be 0
        norm = self.row.get("grad_norm", self.row.get("g_mean", 0.0))
        return q <= self.t.q_share * norm

    def _queries_grow(self, rows: int) -> bool:
        """At the start of a training they are next to nothing too, but then they grow."""
        recent = list(self.history.queries)[-rows:]
        few = max(1, len(recent) // 3)
        young = self.history.steps[0] < 50 and self.normal("q_grad") is None
        return young and median(recent[-few:]) > 2 * median(recent[:few])

    def _back_at_start(self) -> bool | None:
        lowest = self.history.lowest
        if "loss" not in self.row or not math.isfinite(lowest):
            return None
        losses = list(self.history.losses)
        short = losses[-1] if self.history.gap() >= 10 else median(losses[-5:])
        share = self.loss_share(short, lowest)
        return share is not None and share >= self.t.loss_dead

    def _flat(self, rows: int) -> bool:
        """Not falling again, as after the jump of a resumed run."""
        losses = list(self.history.losses)[-rows:]
        half = len(losses) // 2
        running = self.history.normal["loss"]
        above = 0.15 * (median(losses) - self.history.lowest)
        noise = 2 * running.spread(logarithm=False) if len(running) else 0.0
        return half == 0 or median(losses[:half]) - median(losses[half:]) <= max(above, noise)

    def _loss_is_well(self) -> bool:
        usual, losses = self.normal("loss"), list(self.history.losses)[-5:]
        share = self.loss_share(median(losses), usual) if usual is not None and losses else None
        return share is not None and share <= 0.25

    def death(self, alarmed: bool) -> str | None:
        """Why the network is dead, if it is; after an alarm the loss alone needs no patience beyond the usual."""
        streaks = self.history.streaks
        if self._loss_is_well():
            return None
        # Tokens differ: but not if rho says that those of many samples do not, though the mean cosine is below 1.
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
                return f"{why} for {streaks[name].needed} rows: {self.shown()}"
        name = "doubt" if self.history.contradicted(self.step, self._still()) and not alarmed else "loss"
        if streaks[name].sustained() and self._flat(streaks[name].needed):
            return (
                f"the loss is back near where it began, and flat, for {streaks[name].needed} rows"
                f" (lowest median {self.history.lowest:.4g}): {self.shown()}"
            )
        return None

    # ------------------------------------------------------------------ recovery

    def well(self) -> bool | None:
        """Whether all that is there is in the healthy range; None if nothing that could tell is there."""
        checks: list[bool | None] = [self.shape(0.9, max(5.0, 3 * (self.normal("rho") or 0.0)))]
        checks[0] = None if checks[0] is None else not checks[0]
        ratio = self.times("ratio")
        if "ratio" in self.row:
            checks.append(
                ratio < self.t.ratio_still if ratio is not None else self.row["ratio"] < self.t.ratio_dead / 2
            )
        queries = self.normal("q_grad")
        if "q_grad" in self.row and queries is not None:
            checks.append(self.row["q_grad"] >= 0.1 * queries)
        if "loss" in self.row:
            checks.append(self._loss_well_again())
        known = [check for check in checks if check is not None]
        gradient = self.times("grad_norm")
        return (all(known) and not (gradient is not None and gradient >= self.t.spike)) if known else None

    def _loss_well_again(self) -> bool | None:
        usual = self.normal("loss")
        if usual is None:
            first = self.history.first
            return self.row["loss"] <= 0.9 * median(loss for _, loss in first) if first else None
        short = median(list(self.history.losses)[-3:])
        share = self.loss_share(short, usual)
        return short <= 1.1 * usual if share is None else share <= 0.35
