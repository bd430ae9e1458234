"""How the runs of a study ended: each is a method in a setting, at a learning rate, with a seed."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import PositiveFloat, PositiveInt

from mvsplit.reports.run_discovery import read_run
from mvsplit.reports.verdicts import summarise_run
from mvsplit.utils.config import Seed, check_config
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import parse_json, read_small

MEAN_MODE = 0.9
"""A failed run whose deep blocks' token cosine ends above this failed in the mean mode."""
MAX_RUNS = 100_000
"""A study that claims to have more is damaged."""
VALLEY = 1.1
"""A rate is in the valley if its loss is at most this multiple of the best rate's."""


class ResultFile:
    """Keys of a run's `result.json`."""

    status: Literal["finished", "stopped"]
    why: str
    metrics: dict[str, float]
    seconds: float
    versions: dict[str, str]
    overrides: list[str]


class StudyFile:
    """Keys of `study.json`; see `benchmarks/study.py`."""

    kind: Literal["depth", "residuals"]
    settings: Annotated[dict[str, list[str]], MinLen(1)]
    methods: Annotated[dict[str, list[str]], MinLen(1)]
    rates: Annotated[list[PositiveFloat], MinLen(1)]
    lr: PositiveFloat
    seeds: Annotated[list[Seed], MinLen(1)]
    rate_from: dict[str, str]
    sizes: dict[str, Annotated[list[PositiveInt], MinLen(2)]]
    steps: PositiveInt | None = None
    equal_compute: PositiveInt | None = None


def read_checked(path: Path, schema: type) -> dict[str, Any]:
    """A small JSON file with the keys of a schema.

    Raises:
        UserError: if it is damaged.
    """
    content: Any = parse_json(read_small(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged; must be a JSON object")
    try:
        check_config(content, schema)
    except UserError as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return content


def read_result(folder: Path) -> dict[str, Any]:
    """The contents of a finished run's `result.json`.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return read_checked(folder / "result.json", ResultFile)
    except UserError as error:
        raise UserError(f"{error}; delete {folder} and repeat the command") from None


def check_name(where: str, name: str) -> None:
    """Raise `UserError` for a name that is to be a folder but could be a path."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(
            f"{where}.{name}: a name may contain letters, digits, _ . + -, and starts with a letter, digit or _"
        )


@dataclass(frozen=True)
class Ending:
    """How a finished run ended.

    Attributes:
        verdict: see `reports/verdicts.py`.
        loss: validation loss of the averaged weights at the end; NaN if there is none.
        cosine: token cosine of the deep blocks at the end.
        metrics: all final metrics.
        seconds: since it was started, or last resumed.
        nonfinite: whether it stopped because its loss or gradient was not finite.
    """

    verdict: str
    loss: float
    cosine: float
    metrics: dict[str, float]
    seconds: float
    nonfinite: bool = False

    @property
    def alive(self) -> bool:
        return self.verdict in ("alive", "unsteady") and math.isfinite(self.loss)

    @property
    def failure(self) -> str:
        """How it died: in the mean mode, or otherwise."""
        if self.alive:
            return ""
        kind = "learns nothing" if self.verdict == "not learning" else "dies otherwise"
        kind = "not finite" if self.nonfinite else kind
        kind = "mean mode" if self.cosine > MEAN_MODE else kind
        return f"{kind} (cosine {self.cosine:.2f})" if math.isfinite(self.cosine) else kind


@lru_cache(maxsize=10_000)
def read_ending(folder: Path) -> Ending:
    """How a finished run ended, which does not change any more.

    Raises:
        UserError: if its files are damaged.
    """
    result = read_result(folder)
    metrics, seconds = {name: float(value) for name, value in result["metrics"].items()}, float(result["seconds"])
    loss = metrics.get("test/loss", metrics.get("val/loss", math.nan))
    nonfinite = any(folder.glob("stability/nonfinite_step_*.json"))
    try:
        run = read_run(folder)
    except UserError as error:
        if result["status"] != "stopped":
            raise UserError(f"{error}; delete {folder} and repeat the command") from None
        return Ending("stopped", math.nan, math.nan, metrics, seconds, nonfinite)  # before its first row
    summary = summarise_run(run, run.max_steps - 1)
    return Ending(summary.verdict, loss, summary.token_cosine, metrics, seconds, nonfinite)


@dataclass
class Cell:
    """A method in a setting.

    The first seed both chooses the rate and is one of the results there, so that the loss at the best rate comes out a
    little too low: for all methods alike.

    Attributes:
        seeds: the first one tries the rates.
        source: the cell whose best rate this one takes, instead of trying rates itself.
        size: blocks and steps of its runs, if the study varies them.
        endings: finished runs by learning rate (a multiple of the study's) and seed.
    """

    setting: str
    method: str
    seeds: Sequence[int]
    source: "Cell | None" = None
    size: Sequence[int] = ()
    endings: dict[float, dict[int, Ending]] = field(default_factory=dict)

    def sweep(self) -> dict[float, Ending]:
        """How the first seed's runs ended, by rate."""
        first = self.seeds[0]
        return {rate: found[first] for rate, found in sorted(self.endings.items()) if first in found}

    def next_rate(self, rates: Sequence[float]) -> float | None:
        """The rate to try next with the first seed, the lowest first.

        None if all are tried, or if higher ones are not worth it: the method died where a lower rate lived, or at two
        rates in a row. Learning nothing at a low rate is not dying.
        """
        sweep, lived, died_before = self.sweep(), False, False
        for rate in sorted(rates):
            if rate not in sweep:
                return rate
            if not sweep[rate].alive and (lived or died_before):
                return None
            lived = lived or sweep[rate].alive
            died_before = not sweep[rate].alive and sweep[rate].verdict != "not learning"
        return None

    @property
    def best_rate(self) -> float | None:
        """The rate with the first seed's lowest loss; None if it died at all of them."""
        if self.source is not None:
            return self.source.best_rate
        losses = {rate: ending.loss for rate, ending in self.sweep().items() if ending.alive}
        return min(losses, key=losses.__getitem__, default=None)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the highest one tried, so that a higher one may be better."""
        tried = (self.source or self).sweep()
        return self.best_rate is not None and self.best_rate == max(tried, default=None)

    @property
    def reported_rate(self) -> float | None:
        """The best rate; the lowest one if the method died at every rate, None if no run is finished."""
        return self.best_rate if self.best_rate is not None else min(self.endings, default=None)

    def at_best(self) -> list[Ending]:
        """All seeds at the reported rate."""
        rate = self.reported_rate
        found = self.endings.get(rate, {}) if rate is not None else {}
        return [found[seed] for seed in self.seeds if seed in found]

    @property
    def losses(self) -> list[float]:
        return self.values("")

    def values(self, metric: str) -> list[float]:
        """A final metric, or the loss for "", of the seeds that are alive at the best rate."""
        alive = [ending for ending in self.at_best() if ending.alive]
        found = [ending.metrics.get(metric, math.nan) if metric else ending.loss for ending in alive]
        return [value for value in found if math.isfinite(value)]

    @property
    def valley(self) -> list[float]:
        """Rates at which the first seed's loss is nearly the lowest."""
        alive = {rate: ending.loss for rate, ending in self.sweep().items() if ending.alive}
        return [rate for rate, loss in alive.items() if loss <= VALLEY * min(alive.values())]

    @property
    def first_failure(self) -> tuple[float, Ending] | None:
        """The lowest rate at which it died above the best one, or of all if it lived at none."""
        best = self.best_rate or 0.0
        failed = ((rate, ending) for rate, ending in self.sweep().items() if rate > best and not ending.alive)
        return next(failed, None)


def read_plan(folder: Path) -> dict[str, Any]:
    """The contents of `study.json`.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise UserError(f"{folder}: no study.json; not the folder of a study")
    plan = read_checked(path, StudyFile)
    for key in ("settings", "methods"):
        for name in plan[key]:
            check_name(f"{path}: {key}", name)
    count = math.prod(len(plan[key]) for key in ("settings", "methods", "rates", "seeds"))
    if count > MAX_RUNS:
        raise UserError(f"{path}: damaged ({count:,} runs); the limit is {MAX_RUNS:,}")
    settings, takers = set(plan["settings"]), set(plan["rate_from"])
    sources_known = takers <= settings and set(plan["rate_from"].values()) <= settings - takers
    sized = plan["kind"] == "residuals" or set(plan["sizes"]) == settings
    if not sources_known or not sized:
        raise UserError(f"{path}: damaged (rate_from or sizes do not fit settings); repeat the study's command")
    return plan


def rate_name(rate: float) -> str:
    """The folder of a rate's runs."""
    return f"rate_{rate:g}"


def read_cells(folder: Path, plan: dict[str, Any]) -> list[Cell]:
    """The cells of a study with their finished runs, setting by setting; those that take another's rate come last."""
    cells: dict[tuple[str, str], Cell] = {}
    for setting in sorted(plan["settings"], key=lambda setting: setting in plan["rate_from"]):  # sources first
        for method in plan["methods"]:
            source = cells[plan["rate_from"][setting], method] if setting in plan["rate_from"] else None
            cell = cells[setting, method] = Cell(setting, method, plan["seeds"], source, plan["sizes"].get(setting, ()))
            for rate in plan["rates"]:
                place = folder / setting / method / rate_name(rate)
                finished = {seed: place / f"seed_{seed}" for seed in cell.seeds}
                found = {seed: read_ending(run) for seed, run in finished.items() if (run / "result.json").is_file()}
                if found:
                    cell.endings[rate] = found
    return list(cells.values())
