"""Finds the runs below a folder and groups those that differ only in their seed."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvsplit.stability.tables import CHEAP, Table, read_table
from mvsplit.stability.thresholds import Thresholds
from mvsplit.utils.errors import UserError
from mvsplit.utils.flat import flatten
from mvsplit.utils.limits import parse_yaml, read_small

# Keys that do not affect training. `module` holds copies of other groups, and how often it measures.
IGNORED = ("seed", "tags", "task_name", "ckpt_path", "optimized_metric", "train", "test",
           "paths", "logger", "extras", "module", "hydra")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run's folder; tables without a file are empty and named in `missing`."""

    folder: Path
    config: dict[str, Any]
    trace: Table
    depth: Table = field(default_factory=dict)
    time_probe: Table = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Thresholds of the collapse detector."""

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        return nested(self.config, key, default)

    @property
    def last_step(self) -> int:
        return int(self.trace["step"][-1])

    @property
    def max_steps(self) -> int:
        """Planned number of steps; the actual number if the config does not name one."""
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


def nested(config: Any, key: str, default: Any = None) -> Any:
    """The value at a dotted key of nested dicts; the default if it is missing or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return default if config is None else config


def thresholds_of(config: dict[str, Any]) -> Thresholds:
    """The collapse detector's thresholds in a run's config; defaults for the others.

    Raises:
        UserError: for a value that is not a positive number.
    """
    node = nested(config, "callbacks.monitor.thresholds") or nested(config, "callbacks.guard")
    given = {f.name: nested(node, f.name) for f in fields(Thresholds) if nested(node, f.name) is not None}
    for name, value in given.items():
        kinds = type(getattr(Thresholds, name)), int
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= 10**6:
            raise UserError(f"detector threshold {name} = {value}: must be a positive number up to 10^6")
    return Thresholds(**given)


def find_groups(folder: Path) -> tuple[list[Group], list[str]]:
    """All runs below a folder, grouped and labelled, in the order of their folders; and notes on what was left out.

    If the folder has an `ablation.json`, its variants are the groups, in that order.

    Raises:
        UserError: if the folder does not exist or holds no readable run, or if its `ablation.json` is invalid.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    runs, notes = _find_runs(folder)
    plan = folder / "ablation.json"
    groups, more = _variants(folder, _read_plan(plan), runs) if plan.exists() else (_alike(runs), [])
    notes += more
    labels: Counter[tuple[str, str]] = Counter()
    for place, group in enumerate(groups):
        labels[group.question, group.label] += 1
        number = labels[group.question, group.label]
        name = group.label if number == 1 else f"{group.label} ({number})"
        groups[place] = replace(_one_per_seed(group, folder, notes), label=name)  # figures identify groups by label
    if not groups:
        raise UserError(f"{folder}: no run with a stability/trace.csv below it" + "".join(f"; {n}" for n in notes[:3]))
    return groups, notes


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
            why = "it has no stability/trace.csv (failed at its start, or trained without it)"
            notes.append(f"{name}: left out, {why}")
    return sorted(runs, key=lambda run: _natural(run.folder)), sorted(notes)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        config = parse_yaml(read_small(folder / "config.yaml"), "config.yaml")
    except UserError as error:
        raise UserError(f"config.yaml cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError("config.yaml is not a mapping")
    return config


def read_run(folder: Path) -> Run:
    """Read one run's files.

    Raises:
        UserError: without a usable config or trace; other missing or damaged files are only noted.
    """
    config = read_config(folder)
    trace = read_table(folder / "stability" / "trace.csv", growing=True)
    absent = [name for name in ("step", "loss") if name not in trace]
    if absent:
        raise UserError(f"trace.csv has no column '{absent[0]}'")
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
            if wrong := {"step", "block"} - table.keys():
                raise UserError(f"{path}: no column '{min(wrong)}'")
            tables[name] = _without_replays(table)
        except UserError as error:
            missing.append(str(error))
    return Run(folder, config, _without_replays(trace, unique=True), tables.get("depth", {}),
               tables.get("time_probe", {}), tuple(missing), thresholds_of(config))  # fmt: skip


def _without_replays(table: Table, unique: bool = False) -> Table:
    """Drop rows of steps that were repeated after a resume or rollback, and rows without a step; {} if none is left."""
    table = {name: column[np.isfinite(table["step"])] for name, column in table.items()}
    step = table["step"]
    if not len(step):
        return {}
    following = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
    kept = step < following if unique else step <= following
    return {name: column[kept] for name, column in table.items()}


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config that affect training, flattened; of paths to data only the last part."""
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
            groups.append((flat, members := []))
        members.append(run)
    tags = [{(run.setting("tags") or [""])[-1] for run in members} for _, members in groups]
    labels = [str(min(tag)) for tag in tags if len(tag) == 1 and min(tag)]
    if len(groups) == 1 or len(set(labels)) != len(groups):
        labels = differences([flat for flat, _ in groups])
    return [Group(label, members) for label, (_, members) in zip(labels, groups, strict=True)]


def differences(flats: list[dict[str, Any]]) -> list[str]:
    """A label for each flat config, `residual=PostNorm optim.lr=0.001`: the keys in which they differ.

    Arguments of a class are listed only if configs with that class differ in them.
    """
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    keys.sort(key=lambda key: not key.startswith("residual"))  # the usual difference between runs comes first
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
        variants = json.loads(read_small(path))["variants"]
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
        others = [run for run in others if run not in own]  # a variant may belong to two questions
        if not own:
            notes.append(f"{variant['name']}: planned in ablation.json, no run yet")
            continue
        groups.append(Group(variant["name"], own, variant["question"], variant["overrides"]))
        if len({" ".join(sorted(map(str, _comparable(run.config).items()))) for run in own}) > 1:
            notes.append(f"{variant['name']}: its runs differ in more than their seed")
    return groups + _alike(others), notes


def _one_per_seed(group: Group, folder: Path, notes: list[str]) -> Group:
    """Keep one run per seed, since a restart makes another: the one that got furthest, or the last of equals."""
    best: dict[int, Run] = {}
    for run, seed in zip(group.runs, group.seeds, strict=True):
        if seed not in best or run.last_step >= best[seed].last_step:
            best[seed] = run
    for run in group.runs:
        if run not in best.values():
            notes.append(f"{run.folder.relative_to(folder)}: left out, another run has its config and seed")
    return replace(group, runs=[run for run in group.runs if run in best.values()])
