"""How runs ended, in numbers and one word, and which groups of runs can be told apart."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from mvsplit.stability.runs import Group, Run

Verdict = Literal["alive", "unsteady", "not learning", "collapsed", "stopped"]

TOKENS_ALIKE = 0.99
"""Token cosine similarity above which a block's tokens are one and the same."""
GRADIENT_GONE = 1e-4
"""Share of its healthy median below which the gradient of the queries is gone."""
STUCK = 0.85
"""A loss above this share of the first five steps' has not been learnt down."""
RISEN = 1.2
"""A 20-step mean of the loss above this multiple of the lowest one before it has risen."""
IN_A_ROW = 10
"""Measured steps that must show a sign of collapse in a row for the first of them to be its step."""
CONFIDENCE = 0.95

RULES = f"""\
- **collapsed**: at the end the watched blocks' token cosine is above {TOKENS_ALIKE:g}, or their Q gradient below \
{GRADIENT_GONE:g} of its healthy median; and the loss is more than {RISEN - 1:.0%} above its lowest 20-step mean, or \
still above {STUCK:.0%} of its first five steps'. The step of the collapse is the first of {IN_A_ROW} measured steps \
in a row with one of the two signs.
- **not learning**: not collapsed, but the loss is still above {STUCK:.0%} of its first five steps'.
- **unsteady**: at some time after the warm-up the 20-step mean of the loss stood more than {RISEN - 1:.0%} above its \
lowest value until then.
- **stopped**: not collapsed, and ended before the step at which runs are compared.
- **alive**: everything else.

Final loss: mean of the last 20 steps. Token cosine, ρ, Q gradient and G_mean/G_ctr: mean of the last 5 measured \
steps, over the watched deep blocks. The Q gradient's healthy median is that of the steps from the middle of the \
warm-up to the middle of what follows, without those with a token cosine above {TOKENS_ALIKE:g}. Cells show mean ± \
standard deviation over seeds (lowest…highest); means of ρ, Q gradient and G_mean/G_ctr are geometric.
"""


@dataclass(frozen=True)
class Outcome:
    """How one run stood at a step. NaN: not measured.

    Attributes:
        step: the last one looked at. event: the step of the collapse, if it collapsed.
        q_ratio: Q gradient, over its healthy median. g_ratio: G_mean/G_ctr.
    """

    verdict: Verdict
    step: int
    event: int | None
    loss: float
    min_loss: float
    token_cosine: float
    rho: float
    q_ratio: float
    g_ratio: float


def common_step(runs: Sequence[Run]) -> int:
    """The last step that all runs reached; those cut short do not count, unless all are."""
    return min(run.last_step for run in [run for run in runs if run.finished] or runs)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each place, of fewer at the start; what is not finite is left out."""
    finite = np.isfinite(values)
    total, count = (np.cumsum(np.append(np.zeros(width), part)) for part in (np.where(finite, values, 0), finite))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[width:] - total[:-width]) / (count[width:] - count[:-width])


def mean(values: Iterable[float], geometric: bool = False) -> float:
    """Of what is finite (and, for a geometric mean, positive); NaN if nothing is."""
    array = np.asarray(list(values), dtype=float)
    array = array[np.isfinite(array) & ((array > 0) | (not geometric))]
    if not len(array):
        return math.nan
    return float(np.exp(np.log(array).mean())) if geometric else float(array.mean())


def outcome(run: Run, step: int) -> Outcome:
    """How a run stood at a step, or at its own end if that came before."""
    trace = {name: column[run.trace["step"] <= step] for name, column in run.trace.items()}
    steps, loss, cosine = trace["step"], trace["loss"], trace["token_cosine"]
    end = int(steps[-1])
    after = min(int(run.setting("optim.warmup_steps", 0)), end // 2)
    late = {name: mean(column[np.isfinite(column)][-5:]) for name, column in trace.items()}
    healthy = (steps >= after / 2) & (steps <= (after + end) / 2) & ~(cosine > TOKENS_ALIKE)
    measured = trace["q_grad"][healthy & np.isfinite(trace["q_grad"])]
    usual_q = float(np.median(measured)) if len(measured) else math.nan

    smooth = running_mean(loss, 20)
    whole = smooth[min(19, len(smooth) - 1) :]  # not the start's means of fewer steps
    final, lowest = float(smooth[-1]), float(np.nanmin(whole)) if np.isfinite(whole).any() else math.nan
    stuck = final > STUCK * mean(loss[:5])
    gone = (cosine > TOKENS_ALIKE) | (trace["q_grad"] < GRADIENT_GONE * usual_q)
    sign = late["token_cosine"] > TOKENS_ALIKE or late["q_grad"] < GRADIENT_GONE * usual_q
    collapsed = sign and (stuck or final > RISEN * lowest or not math.isfinite(final))
    seen = np.isfinite(cosine) | np.isfinite(trace["q_grad"])
    steady = smooth[steps >= max(after, 19)]
    verdict: Verdict = "alive"
    if collapsed:
        verdict = "collapsed"
    elif end < step or not math.isfinite(final):
        verdict = "stopped"
    elif stuck:
        verdict = "not learning"
    elif len(steady) and bool((steady > RISEN * np.fmin.accumulate(steady)).any()):
        verdict = "unsteady"
    return Outcome(
        verdict=verdict,
        step=end,
        event=_event(steps[seen], gone[seen]) if collapsed else None,
        loss=final,
        min_loss=lowest,
        token_cosine=late["token_cosine"],
        rho=late["rho"],
        q_ratio=late["q_grad"] / usual_q if usual_q else math.nan,
        g_ratio=late["g_mean"] / late["g_ctr"] if late["g_ctr"] else math.nan,
    )


def _event(steps: np.ndarray, gone: np.ndarray) -> int | None:
    """The first step from which all of the next measured ones show a sign of collapse."""
    for place in np.flatnonzero(gone):
        if gone[place : place + IN_A_ROW].all():
            return int(steps[place])
    return None


@dataclass(frozen=True)
class Judged:
    """A group and how its runs ended, in the same order."""

    group: Group
    outcomes: list[Outcome]

    @property
    def living(self) -> list[float]:
        """Final losses of the runs that learn and reached the common step."""
        return [o.loss for o in self.outcomes if o.verdict in ("alive", "unsteady")]

    @property
    def verdicts(self) -> str:
        """`2 of 3 collapsed, 1 of 3 alive`."""
        counts = Counter(o.verdict for o in self.outcomes).most_common()
        return ", ".join(f"{count} of {len(self.outcomes)} {verdict}" for verdict, count in counts)

    def values(self, name: str) -> list[float]:
        """An outcome's number for each run that is comparable, i.e. was not cut short alive."""
        return [float(getattr(o, name)) for o in self.outcomes if o.verdict != "stopped"]


def judge(groups: Sequence[Group]) -> tuple[list[Judged], int]:
    """How all runs stood at their last common step, and that step."""
    step = common_step([run for group in groups for run in group.runs])
    return [Judged(group, [outcome(run, step) for run in group.runs]) for group in groups], step


def told_apart(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether Welch's 95 % interval of the difference of two means leaves out zero; each has two values or more."""
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (one, two)]
    error = math.sqrt(sum(parts))
    gap = abs(float(np.mean(one)) - float(np.mean(two)))
    if not error:
        return gap > 0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (one, two), strict=True))
    return gap > float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error


def comparisons(judged: Sequence[Judged]) -> list[str]:
    """Sentences on which groups' final losses can be told apart, over their living seeds."""
    several = sorted((j for j in judged if len(j.living) > 1), key=lambda j: mean(j.living))
    alike = {
        (a, b)
        for a in range(len(several))
        for b in range(a + 1, len(several))
        if not told_apart(several[a].living, several[b].living)
    }
    sentences = []
    for clique in _cliques(len(several), alike):
        means = [mean(several[place].living) for place in clique]
        sentences.append(
            f"{_listed([several[place].group.label for place in clique])} cannot be told apart within the seeds' spread"
            f" (final loss {min(means):.4g} to {max(means):.4g})."
        )
    pairs = len(several) * (len(several) - 1) // 2
    if pairs > len(alike):
        which = "All pairs" if not alike else "All other pairs"
        names = _listed([j.group.label for j in several]) if pairs == 1 else f"{which} of groups"
        sentences.append(f"{names} differ by more than the seeds' spread.")
    single = [j.group.label for j in judged if len(j.living) == 1]
    if single:
        sentences.append(f"One living seed only: {_listed(single)}; how they compare, nothing can be said.")
    dead = [j.group.label for j in judged if not j.living]
    if dead:
        sentences.append(f"No living seed: {_listed(dead)}.")
    return sentences


def _cliques(count: int, alike: set[tuple[int, int]]) -> list[list[int]]:
    """The largest sets of two or more in which every pair is alike."""
    near = {n: {m for m in range(count) if (n, m) in alike or (m, n) in alike} for n in range(count)}
    found: list[list[int]] = []

    def grow(clique: list[int], rest: set[int], done: set[int]) -> None:  # Bron and Kerbosch
        if not rest and not done and len(clique) > 1:
            found.append(sorted(clique))
        pivot = max(rest | done, key=lambda n: len(near[n] & rest), default=-1)  # its neighbours come with it
        for n in sorted(rest - near.get(pivot, set())):
            grow([*clique, n], rest & near[n], done & near[n])
            rest, done = rest - {n}, done | {n}

    grow([], set(range(count)), set())
    return sorted(found)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
