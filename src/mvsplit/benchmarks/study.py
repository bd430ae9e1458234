"""Compare methods, each at its own best learning rate, in several settings.

In each setting every method is trained at rising rates with the first seed, until it dies where a lower rate lived, or
at two rates in a row; then with the other seeds at the rate with the lowest validation loss. A run's folder is
`<folder>/<setting>/<method>/rate_<×>/seed_<n>/`; one with a `result.json` is finished. What to train next follows from
the finished runs alone, so that a study can be interrupted at any moment.
"""

import fnmatch
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import PositiveFloat, PositiveInt

from mvsplit.benchmarks.common import write_json
from mvsplit.benchmarks.many_runs import (
    Compose,
    RunsConfig,
    Train,
    VariantRun,
    at_once,
    create,
    paths_of,
    resumable,
    train_runs,
    unfinished,
)
from mvsplit.reports.study_cells import Cell, check_name, rate_name, read_cells
from mvsplit.training.session import locked
from mvsplit.utils.config import build
from mvsplit.utils.console import info, progress
from mvsplit.utils.errors import UserError

Settings = dict[str, list[str]]
"""Setting or method → its overrides."""


@dataclass
class StudyConfig(RunsConfig):
    """Top-level keys of every study."""

    lr: PositiveFloat
    rates: Annotated[list[PositiveFloat], MinLen(1)]
    methods: Annotated[Settings, MinLen(1)]


@dataclass
class ResidualConfig(StudyConfig):
    """Top-level keys of `study_residuals.yaml`."""

    settings: Annotated[Settings, MinLen(1)]


@dataclass
class DepthConfig(StudyConfig):
    """Top-level keys of `study_depth.yaml`."""

    depths: Annotated[list[PositiveInt], MinLen(1)]
    steps: Annotated[int, Ge(2)]
    equal_compute: PositiveInt | None


@dataclass
class Plan:
    """What a study trains.

    Attributes:
        settings: setting → overrides, the longest runs first.
        rate_from: setting → the setting whose best rate it takes, instead of trying rates itself.
        sizes: setting → blocks and steps of a run, if the study varies them.
    """

    kind: str
    config: dict[str, Any]
    settings: Settings
    rate_from: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.config | {key: list(dict.fromkeys(self.config[key])) for key in ("seeds", "rates")}

    @property
    def folder(self) -> Path:
        return Path(self.config["folder"]).resolve()

    def run(self, setting: str, method: str, rate: float, seed: int) -> VariantRun:
        """A run of the study."""
        config, variant = self.config, f"{setting}/{method}/{rate_name(rate)}"
        lr = f"optim.lr={config['lr'] * rate:.6g}"
        overrides = (*config["overrides"], *self.settings[setting], *config["methods"][method], lr)
        return VariantRun(variant, overrides, seed, self.folder / variant / f"seed_{seed}")

    def possible(self) -> list[VariantRun]:
        """All runs that the report may show, whatever `only` selects."""
        config = self.config
        return [
            self.run(setting, method, rate, seed)
            for setting in self.settings
            for method in config["methods"]
            for rate in config["rates"]
            for seed in config["seeds"]
        ]

    def examples(self) -> list[VariantRun]:
        """A run of each selected method in each selected setting."""
        rate, seed = self.config["rates"][0], self.config["seeds"][0]
        return [self.run(cell.setting, cell.method, rate, seed) for cell in self.cells()]

    def describe(self) -> dict[str, Any]:
        """The contents of `study.json`, for the report."""
        kept = {key: self.config[key] for key in ("rates", "lr", "seeds", "methods")}
        kept |= {key: self.config[key] for key in ("steps", "equal_compute") if key in self.config}
        sizes = {setting: list(size) for setting, size in self.sizes.items()}
        return {"kind": self.kind, "settings": self.settings, "rate_from": self.rate_from, "sizes": sizes} | kept

    def cells(self) -> list[Cell]:
        """The selected cells."""
        return [cell for cell in read_cells(self.folder, self.describe()) if self.selects(cell.setting, cell.method)]

    def selects(self, setting: str, method: str) -> bool:
        """Whether `only` names this setting, or one that takes its rate, and this method; one alone is enough."""
        only = self.config["only"]
        if only is None:
            return True
        sources = [setting, *(name for name, source in self.rate_from.items() if source == setting)]
        pairs = ((group, names) for group, names in ((self.settings, sources), (self.config["methods"], [method])))
        wanted = [(set(_matching(group, only)), names) for group, names in pairs]
        return all(not chosen or chosen & set(names) for chosen, names in wanted)

    def ready(self) -> list[VariantRun]:
        """The runs that can be trained now."""
        return [run for cell in self.cells() for run in self._ready_of(cell)]

    def _ready_of(self, cell: Cell) -> list[VariantRun]:
        seeds, rates = list(cell.seeds), self.config["rates"]
        rate = (cell.source or cell).next_rate(rates)
        if rate is None:
            rate = cell.best_rate
        elif cell.source is None:
            seeds = seeds[:1]
        else:  # wait for the source
            return []
        done = cell.endings.get(rate, {}) if rate is not None else {}
        return [] if rate is None else [self.run(cell.setting, cell.method, rate, s) for s in seeds if s not in done]

    def left(self) -> Counter[str]:
        """Runs of each setting that may still be trained, at most."""
        count, rates = Counter[str](), self.config["rates"]
        for cell in self.cells():
            chosen = (cell.source or cell).next_rate(rates) is None
            if not chosen and cell.source is None:
                count[cell.setting] += len([rate for rate in rates if rate not in cell.sweep()]) + len(cell.seeds) - 1
            elif not chosen:
                count[cell.setting] += len(cell.seeds)
            else:
                count[cell.setting] += len(self._ready_of(cell))
        return count

    def finished(self) -> Counter[str]:
        """Finished runs of each setting."""
        return Counter(cell.setting for cell in self.cells() for found in cell.endings.values() for _ in found)

    def cost(self, runs: Counter[str]) -> int:
        """Blocks × steps of runs; their number if the study does not vary these."""
        return sum(count * math.prod(self.sizes.get(setting, ())) for setting, count in runs.items())


def residual_plan(config: dict[str, Any]) -> Plan:
    """The study of residuals: the settings are those of the config.

    Raises:
        UserError: if nothing is selected.
    """
    return _selected(Plan("residuals", config, config["settings"]))


def depth_plan(config: dict[str, Any]) -> Plan:
    """The study of depth: the settings are depths at equal steps, then at the compute of one of them.

    Compute is counted as blocks times steps: at equal width and batch, all but the patch projections.

    Raises:
        UserError: if a depth cannot be trained for the same compute, or nothing is selected.
    """
    settings, rate_from, sizes = {}, {}, {}
    steps, anchor = config["steps"], config["equal_compute"]
    for depth in sorted(set(config["depths"]), reverse=True):
        settings[f"depth_{depth}"] = [f"model.depth={depth}", *_of_length(steps)]
        sizes[f"depth_{depth}"] = (depth, steps)
    for depth in sorted(set(config["depths"])) if anchor else ():
        if depth == anchor:
            continue
        if steps * anchor % depth or steps * anchor // depth < 2:
            raise UserError(
                f"steps = {steps}: {depth} blocks cannot have the compute of equal_compute = {anchor} blocks;"
                f" steps × {anchor} / {depth} must be a whole number above 1"
            )
        settings[f"compute_{depth}"] = [f"model.depth={depth}", *_of_length(steps * anchor // depth)]
        rate_from[f"compute_{depth}"] = f"depth_{depth}"
        sizes[f"compute_{depth}"] = (depth, steps * anchor // depth)
    return _selected(Plan("depth", config, settings, rate_from, sizes))


def _of_length(steps: int) -> list[str]:
    return [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]


def _matching(group: Settings, only: list[str]) -> list[str]:
    return [name for name in group if any(fnmatch.fnmatchcase(name, pattern) for pattern in only)]


def _selected(plan: Plan) -> Plan:
    only, known = plan.config["only"] or [], [*plan.settings, *plan.config["methods"]]
    for key, names in (("settings", plan.settings), ("methods", plan.config["methods"])):
        for name in names:
            check_name(key, name)
    for pattern in only:
        if not fnmatch.filter(known, pattern):
            raise UserError(f"only = {pattern}: no such setting or method; allowed: {', '.join(known)}")
    return plan


def run_study(plan: Plan, compose: Compose, train: Train) -> list[VariantRun]:
    """Train what is left of a study.

    Returns:
        The runs that failed to give a result.

    Raises:
        UserError: before training starts, if a config is invalid, a result was made with other settings, or another
            process is working in the folder.
    """
    folder, config = plan.folder, plan.config
    create(folder)

    def config_of(run: VariantRun) -> dict[str, Any]:
        composed = compose(run.overrides, run.seed, paths_of(run, config["paths"]))
        if not (composed["callbacks"] or {}).get("monitor"):
            raise UserError("callbacks.monitor = null: must be on in a study, which reads the trace that it writes")
        return composed

    with locked(folder):
        unfinished(plan.possible())
        for run in plan.examples():
            config_of(run)
        configs = {run: config_of(run) for run in plan.ready()}
        write_json(folder / "study.json", plan.describe())
        left, finished = plan.left(), plan.finished()
        processes = at_once(config["processes"])
        info(f"study            {finished.total()} runs finished, at most {left.total()} left; {processes} at once")
        info(f"folder           {folder}")
        if not configs:
            return []
        build(next(iter(configs.values()))["data"]).prepare_data()  # once; its errors must not count as results
        unit, done = "blocks × steps" if plan.sizes else "runs", plan.cost(finished)
        with progress(unit, done + plan.cost(left), done) as advance, resumable(folder, "study.py report"):
            return train_runs(plan.ready, lambda run: configs.get(run) or config_of(run), processes, train,
                              _counting(plan, advance))  # fmt: skip


def _counting(plan: Plan, advance: Callable[[int], None]) -> Callable[[], None]:
    """Advance by a finished run, and by those that its result makes needless."""
    left = plan.cost(plan.left())

    def count() -> None:
        nonlocal left
        now = plan.cost(plan.left())
        advance(left - now)
        left = now

    return count
