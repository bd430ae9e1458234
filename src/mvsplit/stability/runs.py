"""Finds the runs below a folder, and puts together those that differ only in their seed."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mvsplit.stability.traces import CHEAP, Table, read_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.flat import flatten

# What changes nothing in what is trained. `module` holds copies of other groups, and how often it measures.
IGNORED = ("seed", "tags", "task_name", "ckpt_path", "optimized_metric", "train", "test",
           "paths", "logger", "extras", "module", "hydra")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """One run's files; a table that is not there is empty, and `missing` says so."""

    folder: Path
    config: dict[str, Any]
    trace: Table
    depth: Table = field(default_factory=dict)
    time_probe: Table = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def last_step(self) -> int:
        return int(self.trace["step"][-1])

    @property
    def max_steps(self) -> int:
        """How many steps it was to have; as many as it has if the config does not say."""
        return int(self.setting("trainer.max_steps", self.last_step + 1))

    @property
    def finished(self) -> bool:
        return self.last_step + 1 >= self.max_steps


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; `question` and `overrides` come from `ablation.json`."""

    label: str
    runs: list[Run]
    question: str = ""
    overrides: str = ""

    @property
    def seeds(self) -> list[int]:
        return [run.setting("seed", 0) for run in self.runs]


@dataclass(frozen=True)
class Found:
    """What lies below a folder. `notes` tell what was left out, one line each."""

    groups: list[Group]
    notes: list[str]


def find_groups(folder: Path) -> Found:
    """All runs below a folder, grouped and labelled, in the order of their folders.

    Where the folder has an `ablation.json`, its variants are the groups, in its order.

    Raises:
        UserError: if the folder is not there, holds no run that can be read, or its `ablation.json` is not one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    runs, notes = _find_runs(folder)
    plan = folder / "ablation.json"
    if plan.exists():
        groups, more = _variants(folder, _read_plan(plan), runs)
        notes += more
    else:
        groups = _alike(runs)
    labels: Counter[tuple[str, str]] = Counter()
    for place, group in enumerate(groups):
        labels[group.question, group.label] += 1
        number = labels[group.question, group.label]
        name = group.label if number == 1 else f"{group.label} ({number})"
        groups[place] = replace(_one_per_seed(group, folder, notes), label=name)  # figures tell groups by their labels
    if not groups:
        raise UserError(f"{folder}: no run with a stability/trace.csv below it" + "".join(f"; {n}" for n in notes[:3]))
    return Found(groups, notes)


def _natural(path: Path) -> list[Any]:
    """Sorts 2 before 10."""
    return [[(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
            for name in path.parts]  # fmt: skip


def _find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    runs: list[Run] = []
    failed: list[Path] = []
    notes = []
    for place, folders, files in os.walk(folder):
        path = Path(place)
        if (path / "stability" / "trace.csv").exists():
            folders.clear()  # checkpoints hold many files
            try:
                runs.append(read_run(path))
            except (UserError, OSError) as error:
                notes.append(f"{path.relative_to(folder)}: left out, {error}")
            continue
        if "config.yaml" in files or ".hydra" in folders:
            failed.append(path)
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".ckpt")]
    for path in failed:
        if not any(path in run.folder.parents for run in runs):
            name = path.relative_to(folder) if path != folder else path
            notes.append(f"{name}: left out, it has no stability/trace.csv (failed at its start, or made without one)")
    return sorted(runs, key=lambda run: _natural(run.folder)), sorted(notes)


def read_run(folder: Path) -> Run:
    """Read one run's files.

    Raises:
        UserError: if there is no usable config or trace; what else is missing or damaged is only noted.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config.yaml cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise UserError("config.yaml holds no config")
    trace = read_table(folder / "stability" / "trace.csv", growing=True)
    absent = [name for name in ("step", "loss") if name not in trace]
    if absent:
        raise UserError(f"trace.csv has no column {absent[0]}")
    if not np.isfinite(trace["step"]).any():
        raise UserError("trace.csv has no step yet")
    trace = {name: trace.get(name, np.full(len(trace["step"]), np.nan)) for name in ("step", *CHEAP)}
    missing, tables = [], {}
    for name in ("depth", "time_probe"):
        path = folder / "stability" / f"{name}.csv"
        if not path.exists():
            missing.append(f"no {name}.csv")
            continue
        try:
            table = read_table(path, growing=True)
            wrong = {"step", "block"} - table.keys()
            if wrong:
                raise UserError(f"{path}: no column {min(wrong)}")
            tables[name] = _without_replays(table)
        except UserError as error:
            missing.append(str(error))
    return Run(folder, config, _without_replays(trace, unique=True), tables.get("depth", {}),
               tables.get("time_probe", {}), tuple(missing))  # fmt: skip


def _without_replays(table: Table, unique: bool = False) -> Table:
    """Drop rows of steps that were done again after a resume or a roll-back, and rows without a step."""
    table = {name: column[np.isfinite(table["step"])] for name, column in table.items()}
    step = table["step"]
    if not len(step):
        return table
    following = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
    kept = step < following if unique else step <= following
    return {name: column[kept] for name, column in table.items()}


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config makes a difference to training, flat; of the paths only the names of the data."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key not in IGNORED:
            flat |= flatten(value, key)
    data = config.get("data") or {}
    names = {f"data.{key}": Path(value).name for key, value in data.items() if isinstance(value, str) and "/" in value}
    return {key: value for key, value in (flat | names).items() if key.rpartition(".")[2] != "seed"}


def _alike(runs: list[Run]) -> list[Group]:
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        flat = _comparable(run.config)
        members = next((members for known, members in groups if known == flat), None)
        if members is None:
            groups.append((flat, [run]))
        else:
            members.append(run)
    tags = [{(run.setting("tags") or [""])[-1] for run in members} for _, members in groups]
    own = [min(tag) for tag in tags if len(tag) == 1 and min(tag)]
    if len(groups) > 1 and len(set(own)) == len(groups):
        labels = [str(tag) for tag in own]
    else:
        labels = differences([flat for flat, _ in groups])
    return [Group(label, members) for label, (_, members) in zip(labels, groups, strict=True)]


def differences(flats: list[dict[str, Any]]) -> list[str]:
    """A label for each flat config: `residual=PostNorm optim.lr=0.001`, the keys in which they differ.

    Arguments of a class are told only where configs with that same class differ in them.
    """
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    keys.sort(key=lambda key: not key.startswith("residual"))  # what runs of this project mostly differ in
    labels: list[list[str]] = [[] for _ in flats]
    for key in keys:
        parent = key.rpartition(".")[0]
        rivals: dict[Any, set[Any]] = {}
        for flat in flats:
            rivals.setdefault(flat.get(parent), set()).add(flat.get(key))
        for label, flat in zip(labels, flats, strict=True):
            if len(rivals[flat.get(parent)]) > 1:
                value = flat.get(key, "null")
                label.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    alone = [f"residual={flat['residual']}" if "residual" in flat else "all runs" for flat in flats]
    return [" ".join(label) or other for label, other in zip(labels, alone, strict=True)]


def _read_plan(path: Path) -> list[dict[str, Any]]:
    try:
        variants = json.loads(path.read_text())["variants"]
        return [{"name": str(v["name"]), "question": str(v.get("question") or ""),
                 "overrides": " ".join(map(str, v.get("overrides") or []))} for v in variants]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = '{"variants": [{"name": …, "question": …, "overrides": […]}, …]}'
        raise UserError(f"{path}: not a list of variants like {wanted}") from None


def _variants(folder: Path, plan: list[dict[str, Any]], runs: list[Run]) -> tuple[list[Group], list[str]]:
    groups, notes, others = [], [], runs
    order = list(dict.fromkeys(variant["question"] for variant in plan))
    for variant in sorted(plan, key=lambda v: order.index(v["question"])):
        own = [run for run in runs if run.folder.is_relative_to(folder / variant["name"])]
        others = [run for run in others if run not in own]  # a variant may stand under two questions
        if not own:
            notes.append(f"{variant['name']}: planned in ablation.json, no run yet")
            continue
        groups.append(Group(variant["name"], own, variant["question"], variant["overrides"]))
        mixed = Counter(" ".join(sorted(map(str, _comparable(run.config).items()))) for run in own)
        if len(mixed) > 1:
            notes.append(f"{variant['name']}: its runs differ in more than their seed")
    return groups + _alike(others), notes


def _one_per_seed(group: Group, folder: Path, notes: list[str]) -> Group:
    """Of runs with the same seed, as after a new start, the one that came furthest, the last of equals."""
    best: dict[int, Run] = {}
    for run, seed in zip(group.runs, group.seeds, strict=True):
        if seed not in best or run.last_step >= best[seed].last_step:
            best[seed] = run
    for run in group.runs:
        if run not in best.values():
            notes.append(f"{run.folder.relative_to(folder)}: left out, another run has its config and seed")
    return replace(group, runs=[run for run in group.runs if run in best.values()])
