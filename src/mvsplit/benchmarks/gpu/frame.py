"""`src/bench.py gpu`: runs cases one after the other and saves each result, so that the command can be repeated.

`<folder>/<device>/results.json` is complete at any moment. A case is finished if it has a result there with the same
key: a hash of its config, the seed, the machine and the code. A case that fails, hangs or crashes is a result like any
other and does not stop the rest.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, make_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len, MinLen
from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from mvsplit.benchmarks.common import write_json
from mvsplit.benchmarks.gpu import device_cases, speed_cases, train_cases
from mvsplit.benchmarks.gpu.cases import Bench, CaseError, DeadlineError, Run, SkipError, TrainedRun, make_empty
from mvsplit.training.session import locked
from mvsplit.training.settings import Paths
from mvsplit.utils.config import Seed
from mvsplit.utils.console import info, print_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import read_small
from mvsplit.utils.run_dirs import PROJECT_ROOT

SECTIONS: dict[str, Callable[[Bench], dict[str, Run]]] = {
    "tests": device_cases.tests,
    "strategies": train_cases.strategies,
    "faults": train_cases.faults,
    "scripts": train_cases.scripts,
    "two_processes": train_cases.two_processes,
    "share": device_cases.share,
    "speed": speed_cases.speed,
    "memory": device_cases.memory,
}
"""Sections in the order in which they run: cheap and informative cases come first."""
MARK = ".bench_gpu"
"""File that marks a folder as ours."""
COLOURS = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow", "NOT RUN": "dim"}


def per_device(values: Any) -> type:
    """A group of the keys `cuda` and `cpu`: values for both kinds of device."""
    return make_dataclass("PerDevice", [("cuda", values), ("cpu", values)])


Overrides = dict[str, list[str]]
"""Named overrides of `train.yaml`."""
Variants = per_device(Annotated[Overrides, MinLen(1)])
KEYS: dict[str, Any] = {  # of `bench_gpu.yaml`
    "task_name": str, "ckpt_path": None, "seed": Seed, "paths": Paths, "folder": str,
    "device": Literal["auto", "cuda", "cpu"], "sections": Annotated[list[str], MinLen(1)] | None,
    "minutes": PositiveFloat, "limit_s": PositiveFloat, "again": bool | Literal["failed"] | list[str],
    "training": per_device(list[str]), "scripts": per_device(list[str]),
    "strategies": Variants, "faults": Variants, "two_processes": Variants,
    "tests": per_device(dict[str, PositiveInt | list[PositiveInt]]), "share": per_device(dict[str, PositiveInt]),
    "speed": per_device(make_dataclass("Speed", dict.fromkeys(speed_cases.CASES, list[str]).items())),
    "memory": per_device(make_dataclass("Memory", {
        "network": list[str], "latents": Annotated[list[PositiveInt], Len(3)], "depths": list[PositiveInt],
        "strategies": Overrides, "modes": Overrides, "deepest": Overrides,
    }.items())),
}  # fmt: skip
Config = make_dataclass("Config", KEYS.items())


@dataclass
class CaseResult:
    """An entry of `results.json`."""

    status: Literal["PASS", "FAIL", "SKIP"]
    why: str
    checks: dict[str, bool]
    figures: dict[str, Any]
    seconds: float
    key: str

    def details(self) -> str:
        """Failed checks, the reason, and the plain figures, in one line."""
        broken = [f"NOT {name}" for name, held in self.checks.items() if not held]
        shown = {n: f"{x:.4g}" if isinstance(x, float) else str(x) for n, x in self.figures.items()}
        figures = [f"{name} {text}" for name, text in shown.items() if not isinstance(self.figures[name], dict)]
        return "; ".join(part for part in (", ".join(broken), self.why, ", ".join(figures)) if part) or "ok"


@dataclass
class ResultsFile:
    """The content of `results.json`."""

    machine: dict[str, Any]
    cases: dict[str, CaseResult]


def read_results(path: Path) -> dict[str, CaseResult]:
    """The cases in a file of results. Raises `UserError` if this benchmark did not write it."""
    try:
        return TypeAdapter(ResultsFile).validate_json(read_small(path, 16 << 20)).cases
    except ValidationError:
        raise UserError(f"{path}: damaged, or not written by this benchmark; move it away to start over") from None


def save_results(results: dict[str, CaseResult], bench: Bench) -> None:
    write_json(bench.folder / "results.json", asdict(ResultsFile(bench.machine, results)))


def all_cases(bench: Bench) -> dict[str, Run]:
    """The cases by path: `section/name`."""
    cases = {f"{section}/{name}": run for section, make in SECTIONS.items() for name, run in make(bench).items()}
    for path in cases:  # their folders are emptied: a name must not lead out of ours
        if not re.fullmatch(r"\w+(/\w+)+", path):
            raise UserError(f"{path}: a name may only contain letters, digits and _")
    return cases


def chosen(paths: Iterable[str], patterns: list[str] | None, key: str = "sections") -> list[str]:
    """The paths that match the patterns: names of sections, or of cases as `section/name`."""
    found = {p: [path for path in paths if fnmatchcase(path, p) or path.startswith(f"{p}/")] for p in patterns or "*"}
    if missing := [pattern for pattern, matches in found.items() if not matches]:
        allowed = f"allowed: {', '.join(SECTIONS)}, or section/case"
        raise UserError(f"{key} = {missing[0]}: no such section or case; {allowed}")
    return [path for path in paths if any(path in matches for matches in found.values())]


def find_machine(device: str, folder: Path) -> dict[str, Any]:
    """A description of the machine, made in a child process: this one never uses a GPU."""
    bench = Bench({}, {"kind": "cpu"}, folder, time.monotonic() + 300)
    machine = bench.child(folder, "machine", cpu=device == "cpu")
    if device == "cuda" and machine["kind"] != "cuda":
        raise UserError("device = cuda: this machine has no usable GPU; use auto or cpu")
    return machine | {"code": code_version()}


def code_version() -> str:
    """A hash of all code and configs that cases may use, committed or not."""
    digest = hashlib.sha256()
    for file in sorted([*PROJECT_ROOT.glob("src/**/*.py"), *PROJECT_ROOT.glob("configs/**/*.yaml")]):
        if "local" not in file.parts and file.name != "bench_gpu.yaml":  # whose values are in the key
            digest.update(str(file.relative_to(PROJECT_ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def key_of(path: str, bench: Bench) -> str:
    """A hash of everything that a result depends on."""
    about = [bench.config["seed"], bench.config["limit_s"], bench.of("training"), bench.of(path.partition("/")[0])]
    about += [bench.machine["name"], bench.machine["code"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def own_folder(folder: Path) -> None:
    """Make a device's folder, in which folders are emptied later, and mark it as ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder = {folder.parent}: cannot be created ({error.strerror})") from None
    if not (folder / MARK).exists() and any(folder.iterdir()):
        raise UserError(f"folder = {folder.parent}: {folder} contains files of another program; choose another folder")
    (folder / MARK).touch()


def measure(config: dict[str, Any], output_dir: Path) -> bool:
    """Run the unfinished cases and report on all selected ones. Returns whether none has failed."""
    for_any = [path for kind in ("cpu", "cuda") for path in all_cases(Bench(config, {"kind": kind}, output_dir))]
    chosen(for_any, config["sections"])  # a mistake is reported before the machine is examined
    machine = find_machine(config["device"], output_dir)
    slug = re.sub(r"\W+", "_", machine["name"].lower()).strip("_")
    bench = Bench(config, machine, Path(config["folder"]).resolve() / slug)
    cases, again = all_cases(bench), config["again"]
    paths = chosen(cases, config["sections"])
    anew = chosen(paths, again, "again") if isinstance(again, list) else paths if again else []
    own_folder(bench.folder)
    with locked(bench.folder):
        file = bench.folder / "results.json"
        results = read_results(file) if file.exists() else {}
        for path in anew:
            if path in results and (again != "failed" or results[path].status == "FAIL"):
                del results[path]
                save_results(results, bench)
        finished = {path for path in cases if path in results and results[path].key == key_of(path, bench)}
        bench.runs = {path: TrainedRun(bench.folder / path) for path in finished if results[path].status == "PASS"}
        left = {path: cases[path] for path in paths if path not in finished}
        info(f"machine          {machine['name']}, torch {machine['torch']}")
        info(f"folder           {bench.folder}")
        info(f"cases            {len(paths)}, {len(paths) - len(left)} finished")
        finished |= _run(left, bench, results)
        rows = {path: results[path] if path in finished else None for path in paths}
        report(rows, bench)
    return not any(result is not None and result.status == "FAIL" for result in rows.values())


def _run(cases: dict[str, Run], bench: Bench, results: dict[str, CaseResult]) -> set[str]:
    """Run cases until the time is up, save their results, and return their paths."""
    end, done = time.monotonic() + 60 * bench.config["minutes"], set[str]()
    for path, run in cases.items():
        result = run_case(path, run, bench, end) if time.monotonic() < end else None
        if result is None:
            info(f"NOT RUN          {len(cases) - len(done)} cases: {bench.config['minutes']:g} minutes have passed")
            break
        done.add(path)
        results[path] = result
        if result.status == "PASS":
            bench.runs[path] = TrainedRun(bench.folder / path)
        save_results(results, bench)
        info(f"{result.status:16} {path}, {result.seconds:.1f} s: {result.details()}")
    return done


def run_case(path: str, run: Run, bench: Bench, end: float) -> CaseResult | None:
    """The result of one case, whatever happens; None if the command's time is up (`end`, as in `time.monotonic`)."""
    info(f"starting         {path}")
    began = time.monotonic()
    bench.deadline = min(began + bench.config["limit_s"], end)
    result = CaseResult("FAIL", "", {}, {}, 0.0, key_of(path, bench))
    try:
        make_empty(bench.folder / path)
        outcome = run(bench, bench.folder / path)
        result.checks, result.figures = outcome.checks, outcome.figures
        result.status = "PASS" if all(outcome.checks.values()) else "FAIL"
    except SkipError as reason:
        result.status, result.why = "SKIP", str(reason)
    except DeadlineError as reason:
        if bench.deadline == end:
            return None
        result.why = f"took longer than {bench.config['limit_s']:g} s: {reason}"
    except Exception as error:  # a defect in a case must not stop the others
        result.why = str(error) if isinstance(error, CaseError) else f"{type(error).__name__}: {error}"
    finally:
        for job in bench.commands:
            job.kill()
        bench.commands.clear()
    result.why, result.seconds = " ".join(result.why.split())[:500], round(time.monotonic() - began, 1)
    return result


def report(rows: dict[str, CaseResult | None], bench: Bench) -> None:
    """Print a table, and write it as `results.md`."""
    title = f"{bench.machine['name']}, torch {bench.machine['torch']}"
    table, counts = Table("section", "case", "", "figures", "s", title=title), dict.fromkeys(COLOURS, 0)
    lines = [title, "", "| section | case | | figures | s |", "|-|-|-|-|-:|"]
    for path, result in rows.items():
        section, _, name = path.partition("/")
        row = [section, name, "NOT RUN", "", ""]
        if result is not None:
            row[2:] = result.status, result.details(), f"{result.seconds:.0f}"
        counts[row[2]] += 1
        table.add_row(*map(escape, row), style=COLOURS[row[2]])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    print_table(table)
    (bench.folder / "results.md").write_text("\n".join(lines) + "\n")
    info(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if counts["NOT RUN"]:
        info("repeat the command to run the remaining cases")
    info(f"figures          {bench.folder / 'results.json'}")
    info(f"table            {bench.folder / 'results.md'}")
