"""How runs ended, as a verdict and a few numbers, and which groups of runs differ in their final loss.

Whether a run collapsed is decided by the detector that watches training, replayed over the run's trace.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import ttest_ind

from mvsplit.reports.run_discovery import Group, Run
from mvsplit.stability.by_depth import mean
from mvsplit.stability.detector import NAMES, CollapseDetector, Event
from mvsplit.stability.tables import Table
from mvsplit.stability.thresholds import Thresholds

Verdict = Literal["alive", "unsteady", "not learning", "collapsing", "collapsed", "stopped"]

WINDOW = 20
"""Steps that the loss is averaged over."""
STUCK = 0.85
"""A final loss above this share of the mean of the first five steps has not been reduced by training."""
LEARNT_AFTER = 100
"""Shorter runs are not called "not learning"."""
RISEN = 1.2
"""The mean loss has risen when it is above this multiple of its lowest earlier value."""
SIGNIFICANT = 0.05
"""Two groups differ significantly if the p-value is below this."""

RULES = f"""\
The collapse detector (`stability/detector.py`) is replayed over each run's trace, with the thresholds of its own \
config.

- **collapsed**: at the last step the detector considers the network dead. The collapse step is that of the first \
alarm (onset or death) since the network was last healthy.
- **collapsing**: the detector reported an onset, but neither death nor recovery by the last step.
- **stopped**: neither of these, but the run ended before the step at which runs are compared, or with a loss that is \
not finite.
- **not learning**: the loss is still above {STUCK:.0%} of the mean of the first five steps, in a run of at least \
{LEARNT_AFTER} steps.
- **unsteady**: the detector raised an alarm and later reported a recovery; or at some time after the warm-up the mean \
loss of {WINDOW} steps was more than {RISEN - 1:.0%} above its lowest earlier value.
- **alive**: everything else.

Final loss: mean of the last {WINDOW} steps. Token cosine, ρ, Q gradient and G_mean/G_ctr: mean of the last 5 measured \
steps, over the watched deep blocks. The Q gradient is divided by the detector's running median of the healthy \
network. Cells show mean ± standard deviation over seeds (lowest…highest); the means of ρ, Q gradient and G_mean/G_ctr \
are geometric.
"""


@dataclass(frozen=True)
class RunSummary:
    """The state of one run at a step. NaN: not measured.

    Attributes:
        step: the last step considered.
        event: the step of the first alarm of the collapse, if the run collapsed or is collapsing.
        q_ratio: Q gradient over its median in the healthy network.
        g_ratio: G_mean/G_ctr.
    """

    verdict: Verdict
    step: int
    event: int | None
    loss: float
    token_cosine: float
    rho: float
    q_ratio: float
    g_ratio: float


def replay(trace: Table, thresholds: Thresholds) -> tuple[CollapseDetector, list[Event]]:
    """Run the detector over a trace; the detector in its final state, and all of its events."""
    detector = CollapseDetector(thresholds)
    names = [name for name in NAMES if name in trace]
    events = [
        event
        for row, step in enumerate(trace["step"])
        for event in detector.observe(int(step), {name: float(trace[name][row]) for name in names})
    ]
    return detector, events


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each position, of fewer at the start; ignores values that are not finite."""
    finite = np.isfinite(values)
    total, count = (np.cumsum(np.append(np.zeros(width), part)) for part in (np.where(finite, values, 0), finite))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[width:] - total[:-width]) / (count[width:] - count[:-width])


def summarise_run(run: Run, step: int) -> RunSummary:
    """The state of a run at a step, or at its end if that came earlier."""
    trace = {name: column[run.trace["step"] <= step] for name, column in run.trace.items()}
    detector, events = replay(trace, run.thresholds)
    alarms: list[int] = []  # since the network was last healthy
    for event in events:
        if event.kind == "recovered":
            alarms.clear()
        elif event.kind != "spike":
            alarms.append(event.step)
    end, smooth = int(trace["step"][-1]), running_mean(trace["loss"], WINDOW)
    verdict: Verdict = "alive"
    if detector.state != "healthy":
        verdict = "collapsed" if detector.state == "dead" else "collapsing"
    elif end < step or not math.isfinite(smooth[-1]):
        verdict = "stopped"
    elif len(smooth) >= LEARNT_AFTER and smooth[-1] > STUCK * mean(trace["loss"][:5]):
        verdict = "not learning"
    elif any(event.kind == "recovered" for event in events) or _has_risen(run, trace["step"], smooth):
        verdict = "unsteady"
    late = {name: mean(column[np.isfinite(column)][-5:]) for name, column in trace.items()}
    healthy_q = [value for _, value in detector.state_dict()["stats"]["normal"]["q_grad"]]
    return RunSummary(
        verdict=verdict,
        step=end,
        event=alarms[0] if alarms else None,
        loss=float(smooth[-1]),
        token_cosine=late["token_cosine"],
        rho=late["rho"],
        q_ratio=late["q_grad"] / float(np.median(healthy_q)) if healthy_q else math.nan,
        g_ratio=late["g_mean"] / late["g_ctr"] if late["g_ctr"] else math.nan,
    )


def _has_risen(run: Run, steps: np.ndarray, smooth: np.ndarray) -> bool:
    after = min(int(run.setting("optim.warmup_steps", 0)), int(steps[-1]) // 2)
    steady = smooth[steps >= max(after, WINDOW - 1)]
    return bool((steady > RISEN * np.fmin.accumulate(steady)).any()) if len(steady) else False


@dataclass(frozen=True)
class GroupSummary:
    """A group and the summaries of its runs, in the same order."""

    group: Group
    runs: list[RunSummary]

    @property
    def losses(self) -> list[float]:
        """Final losses of the runs that learn and reached the common step: those that are compared."""
        return [run.loss for run in self.runs if run.verdict in ("alive", "unsteady")]

    @property
    def verdicts(self) -> str:
        """`2 of 3 collapsed, 1 of 3 alive`."""
        counts = Counter(run.verdict for run in self.runs).most_common()
        return ", ".join(f"{count} of {len(self.runs)} {verdict}" for verdict, count in counts)

    @property
    def collapse_steps(self) -> list[float]:
        return [float(run.event) for run in self.runs if run.event is not None]

    def values(self, name: str) -> list[float]:
        """One field of the runs' summaries, without runs that stopped early."""
        return [float(getattr(run, name)) for run in self.runs if run.verdict != "stopped"]


def summarise(groups: Sequence[Group]) -> tuple[list[GroupSummary], int]:
    """The state of all runs at the last step that all finished runs reached (all, if none is finished); that step."""
    runs = [run for group in groups for run in group.runs]
    step = min(run.last_step for run in [run for run in runs if run.finished] or runs)
    return [GroupSummary(group, [summarise_run(run, step) for run in group.runs]) for group in groups], step


def p_value(one: Sequence[float], two: Sequence[float]) -> float:
    """Welch's t-test for equal means of two samples of at least two values; 1 if all values are equal."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of samples without any variance
        p = float(ttest_ind(one, two, equal_var=False).pvalue)
    return 1.0 if math.isnan(p) else p


def against_best(groups: Sequence[tuple[str, Sequence[float]]], form: str) -> tuple[str, list[str], list[str]]:
    """Which groups differ significantly from the one with the lowest mean, by Welch's t-test.

    Args:
        groups: name and values of each, at least two values.
        form: of the means in the texts, such as `.3f`.

    Returns:
        Texts for the best group, those that do not differ from it, and those that do.
    """
    (name, lowest), *others = sorted(groups, key=lambda group: mean(group[1]))
    differ: dict[bool, list[str]] = {False: [], True: []}
    for other, values in others:
        p = p_value(lowest, values)
        differ[p < SIGNIFICANT].append(f"{other} ({mean(values):{form}}, p = {p:.2g})")
    return f"{name} ({mean(lowest):{form}})", differ[False], differ[True]


def comparisons(summaries: Sequence[GroupSummary]) -> list[str]:
    """Sentences on how the final losses of all groups differ from those of the best group."""
    several = [(s.group.label, s.losses) for s in summaries if len(s.losses) > 1]
    sentences = []
    if len(several) > 1:
        best, alike, higher = against_best(several, ".4g")
        if alike:
            sentences.append(f"No significant difference in final loss between {best} and {', '.join(alike)}.")
        if higher:
            sentences.append(f"Significantly higher final loss than {best}: {', '.join(higher)}.")
    single = [s.group.label for s in summaries if len(s.losses) == 1]
    if single:
        sentences.append(f"Not tested, because only one run can be compared: {', '.join(single)}.")
    none = [f"{s.group.label} ({s.verdicts})" for s in summaries if not s.losses]
    if none:
        sentences.append(f"Not compared: {', '.join(none)}.")
    return sentences
