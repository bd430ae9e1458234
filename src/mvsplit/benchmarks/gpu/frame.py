"""`src/bench.py gpu`: cases one after the other, each result kept at once, so that the command can be repeated.

`<folder>/<device>/results.json` is whole at every moment. A case is done if a result stands there with the same key: of
its config, the seed, the machine and the code. Repeating the command does the others. A case that fails, hangs or
crashes is a result like any other, and stops none.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import PositiveFloat

from mvsplit.benchmarks.gpu import faults, memory, network, processes, scripts, share, strategies
from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome, SkipError, make_empty
from mvsplit.benchmarks.gpu.commands import CaseError, DeadlineError
from mvsplit.benchmarks.gpu.results import Results
from mvsplit.benchmarks.gpu.table import report, told
from mvsplit.training.run import Paths, locked
from mvsplit.utils.console import say
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Seed
from mvsplit.utils.runs import PROJECT_ROOT

SECTIONS: dict[str, Callable[[Bench], list[Case]]] = {
    "tests": network.cases,
    "strategies": strategies.cases,
    "faults": faults.cases,
    "scripts": scripts.cases,
    "two_processes": processes.cases,
    "share": share.cases,
    "memory": memory.cases,
}
"""In this order: what is cheap and tells most comes first."""
ASKED_WITHIN_S = 300.0
MARK = ".bench_gpu"
"""File in a folder that is ours to empty."""


@dataclass
class Overrides:
    """Of `train.yaml`, by kind of device."""

    cuda: list[str]
    cpu: list[str]


@dataclass
class Variants:
    """Named overrides of `train.yaml`, by kind of device."""

    cuda: Annotated[dict[str, list[str]], MinLen(1)]
    cpu: Annotated[dict[str, list[str]], MinLen(1)]


@dataclass
class TestsConfig:
    cuda: network.NetworkSizes
    cpu: network.NetworkSizes


@dataclass
class MemoryConfig:
    cuda: memory.MemorySizes
    cpu: memory.MemorySizes


@dataclass
class ShareConfig:
    cuda: share.ShareSizes
    cpu: share.ShareSizes


@dataclass
class Config:
    """Top-level keys of `bench_gpu.yaml`."""

    task_name: str
    ckpt_path: None
    seed: Seed
    device: Literal["auto", "cuda", "cpu"]
    sections: Annotated[list[str], MinLen(1)] | None
    minutes: PositiveFloat
    limit_s: PositiveFloat
    again: bool | Literal["failed"] | list[str]
    folder: str
    loss_tolerance: PositiveFloat
    state_tolerance: PositiveFloat
    training: Overrides
    tests: TestsConfig
    strategies: Variants
    faults: Variants
    scripts: Overrides
    two_processes: Variants
    share: ShareConfig
    memory: MemoryConfig
    paths: Paths


# ------------------------------------------------------------------- what to do


def chosen(cases: list[Case], patterns: list[str] | None, key: str = "sections") -> list[Case]:
    """The cases that the patterns name: sections, or cases `section/name`.

    Raises:
        UserError: for one that names none.
    """
    if patterns is None:
        return cases
    for pattern in patterns:
        if not any(_named(case, pattern) for case in cases):
            allowed = ", ".join(SECTIONS)
            raise UserError(f"{key} = {pattern}: no such section or case; allowed are {allowed}, or section/case")
    return [case for case in cases if any(_named(case, pattern) for pattern in patterns)]


def _named(case: Case, pattern: str) -> bool:
    return case.section == pattern or fnmatchcase(case.path, pattern)


def find_machine(device: str, folder: Path) -> dict[str, Any]:
    """The machine's description, asked in a process of its own: this one never touches a GPU.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    bench = Bench({}, {"kind": "cpu"}, folder, time.monotonic() + ASKED_WITHIN_S)
    machine = bench.child(folder, "machine", cpu=device == "cpu")
    if device == "cuda" and machine["kind"] != "cuda":
        raise UserError("device = cuda: this machine has no usable GPU; allowed here are auto and cpu")
    return machine


def code_version() -> str:
    """A hash of all code and configs that cases may use, committed or not."""
    digest = hashlib.sha256()
    for folder, pattern in (("src", "*.py"), ("configs", "*.yaml")):
        for file in sorted((PROJECT_ROOT / folder).rglob(pattern)):
            if "local" not in file.parts and file.name != "bench_gpu.yaml":  # that one's values are in the key
                digest.update(str(file.relative_to(PROJECT_ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def key_of(case: Case, bench: Bench, code: str) -> str:
    """What a result belongs to."""
    about = [bench.config[key] for key in ("seed", "loss_tolerance", "state_tolerance", "limit_s")]
    about += [bench.config["training"][bench.kind], bench.of(case.section), bench.machine["name"], code]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


# -------------------------------------------------------------------- doing it


def measure(config: dict[str, Any], output_dir: Path) -> bool:
    """Do what is not done yet, show everything that was asked for.

    Returns:
        Whether nothing has failed.

    Raises:
        UserError: for sections that do not exist, or if another process works in the folder.
    """
    names = {pattern.partition("/")[0] for pattern in config["sections"] or []}
    if unknown := sorted(name for name in names if not any(fnmatchcase(section, name) for section in SECTIONS)):
        raise UserError(f"sections = {unknown[0]}: no such section; allowed are {', '.join(SECTIONS)}, or section/case")
    machine = find_machine(config["device"], output_dir)
    slug = re.sub(r"\W+", "_", machine["name"].lower()).strip("_")
    folder = Path(config["folder"]).resolve() / slug
    bench = Bench(config, machine, folder)
    everything = [case for make in SECTIONS.values() for case in make(bench)]
    for case in everything:  # their folders are emptied: names must not lead out of ours
        if not re.fullmatch(r"\w+(/\w+)+", case.path):
            raise UserError(f"{case.path}: a name in {case.section} may hold letters, digits and _ alone")
    cases = chosen(everything, config["sections"])
    again = config["again"]
    anew = chosen(cases, again, "again") if isinstance(again, list) else cases if again is True else []
    own_folder(folder)
    with locked(folder):
        code = code_version()
        results = Results(folder / "results.json", machine | {"code": code})
        for case in cases:
            known = results.cases.get(case.path)
            if case in anew or (again == "failed" and known is not None and known["status"] == "FAIL"):
                results.drop(case)
        _run(cases, everything, bench, results, code)
        rows = [(case, results.done(case, key_of(case, bench, code))) for case in cases]
        report(rows, machine, folder)
    return not any(result is not None and result["status"] == "FAIL" for _, result in rows)


def own_folder(folder: Path) -> None:
    """Make a device's folder, in which folders are emptied later, and mark it as ours.

    Raises:
        UserError: if it holds something and is not marked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        if any(folder.iterdir()):
            raise UserError(f"folder = {folder.parent}: {folder} holds what this benchmark did not write; take another")
        (folder / MARK).touch()


def _run(cases: list[Case], everything: list[Case], bench: Bench, results: Results, code: str) -> None:
    end = time.monotonic() + 60 * bench.config["minutes"]
    left = [case for case in cases if results.done(case, key_of(case, bench, code)) is None]
    known = [(case, results.done(case, key_of(case, bench, code))) for case in everything]
    bench.done = {case.path for case, result in known if result is not None and result["status"] == "PASS"}
    say(f"machine          {bench.machine['name']}, torch {bench.machine['torch']}")
    say(f"folder           {bench.folder}")
    say(f"cases            {len(cases)}, {len(cases) - len(left)} of them done")
    for number, case in enumerate(left):
        if time.monotonic() > end:
            say(f"NOT RUN          {len(left) - number} cases: {bench.config['minutes']:g} minutes are used up")
            return
        say(f"begins           {case.path}")
        result = run_case(case, bench, end)
        if result is None:
            say(f"NOT RUN          {case.path}: not done when {bench.config['minutes']:g} minutes were used up")
            return
        results.put(case, result | {"key": key_of(case, bench, code)})
        if result["status"] == "PASS":
            bench.done.add(case.path)
        say(f"{result['status']:16} {case.path}, {result['seconds']:.1f} s: {told(result)}")


def run_case(case: Case, bench: Bench, end: float) -> dict[str, Any] | None:
    """Try one case, whatever comes of it; None if the whole command's time was used up meanwhile.

    Args:
        end: of the whole command, on the clock `time.monotonic`.
    """
    began = time.monotonic()
    bench.deadline = min(began + bench.config["limit_s"], end)
    place = bench.folder / case.section / case.name
    try:
        if case.needs_gpu and bench.kind != "cuda":
            raise SkipError("needs a GPU")
        make_empty(place)
        outcome = case.run(bench, place)
        status = "PASS" if all(outcome.checks.values()) else "FAIL"
    except SkipError as reason:
        status, outcome = "SKIP", Outcome(why=str(reason))
    except DeadlineError as reason:
        if bench.deadline == end:
            return None
        status, outcome = "FAIL", Outcome(why=f"took longer than {bench.config['limit_s']:g} s: {reason}")
    except CaseError as reason:
        status, outcome = "FAIL", Outcome(why=str(reason))
    except Exception as error:  # a defect of ours must not stop the others
        status, outcome = "FAIL", Outcome(why=f"{type(error).__name__}: {error}")
    finally:
        for job in bench.commands:
            job.end()
        bench.commands.clear()
    why = " ".join(outcome.why.split())[:500]
    seconds = round(time.monotonic() - began, 1)
    return {"status": status, "why": why, "checks": outcome.checks, "figures": outcome.figures, "seconds": seconds}
