"""An ablation: variants of one run, each with several seeds, that answer questions."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from mvsplit.reports.study_cells import check_name
from mvsplit.training.session import locked
from mvsplit.utils.config import build
from mvsplit.utils.console import info, progress
from mvsplit.utils.errors import UserError

Questions = dict[str, dict[str, list[str]]]
"""Question -> variant -> overrides."""


@dataclass
class Config(RunsConfig):
    """Top-level keys of `ablate.yaml`."""

    questions: Questions


def variants(questions: Questions, only: list[str] | None = None) -> dict[str, list[str]]:
    """Overrides of each selected variant, in the order in which they run.

    Args:
        only: names of questions or variants, or patterns; None selects all.

    Raises:
        UserError: for a name that cannot be a folder or has two meanings, or if nothing is selected.
    """
    chosen: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    for question, members in questions.items():
        for name, overrides in members.items():
            check_name(f"questions.{question}", name)
            if known.setdefault(name, overrides) != overrides:
                raise UserError(f"questions.{question}.{name}: has different overrides under another question")
            if only is None or any(fnmatch.fnmatchcase(word, p) for p in only for word in (question, name)):
                chosen[name] = overrides
    if not chosen:
        raise UserError(f"only = {only}: no such question or variant; allowed: {', '.join([*questions, *known])}")
    return chosen


def all_runs(config: dict[str, Any]) -> list[VariantRun]:
    """All selected runs: each variant with the first seed, then with the second, …"""
    folder, common = Path(config["folder"]).resolve(), config["overrides"]
    return [
        VariantRun(name, (*common, *overrides), seed, folder / name / f"seed_{seed}")
        for seed in dict.fromkeys(config["seeds"])
        for name, overrides in variants(config["questions"], config["only"]).items()
    ]


def describe(questions: Questions) -> dict[str, Any]:
    """The contents of `ablation.json`, for the report: all variants, selected or not."""
    rows = [(question, name, overrides) for question, all_ in questions.items() for name, overrides in all_.items()]
    return {"variants": [{"name": name, "question": question, "overrides": o} for question, name, o in rows]}


def run_all(config: dict[str, Any], runs: list[VariantRun], compose: Compose, train: Train) -> list[VariantRun]:
    """Train those of `all_runs(config)` that have no result.

    Returns:
        The runs that failed.

    Raises:
        UserError: before training starts, if any run's config is invalid, a result was made with other settings, or
            another process is working in the folder.
    """
    folder = Path(config["folder"]).resolve()
    create(folder)
    with locked(folder):
        left = unfinished(runs)
        configs = {run: compose(run.overrides, run.seed, paths_of(run, config["paths"])) for run in left}
        write_json(folder / "ablation.json", describe(config["questions"]))
        processes = max(1, min(at_once(config["processes"]), len(left)))
        info(f"ablation         {len(runs)} runs, {len(runs) - len(left)} finished; {processes} at once")
        info(f"folder           {folder}")
        if not left:
            return []
        build(configs[left[0]]["data"]).prepare_data()  # once; an error in the data must not count as a run's result
        with progress("runs", len(runs), done=len(runs) - len(left)) as advance, resumable(folder):
            return train_runs(lambda: left, configs.__getitem__, processes, train, lambda: advance(1))
