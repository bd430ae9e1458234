"""`src/bench.py gpu` on a machine without a GPU: its parts for CPUs run at a tiny size, are killed, and go on."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config

from mvsplit.benchmarks.gpu import faults, frame, memory, processes
from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome, SkipError
from mvsplit.benchmarks.gpu.commands import CaseError, Command
from mvsplit.benchmarks.gpu.faults import CALLBACKS
from mvsplit.benchmarks.gpu.overlap import side_work
from mvsplit.benchmarks.gpu.results import read_results
from mvsplit.training import run
from mvsplit.utils import config
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.errors import UserError

from .conftest import TIMES

Script = Callable[..., list[str]]
Run = Callable[..., subprocess.CompletedProcess[str]]
OFFLOAD, WRONG = "strategies/checkpointing_offload", "strategies/wrong"
CHOSEN = ["strategies/cpu", OFFLOAD, WRONG, "faults/cpu/nan", "share"]


def command(script: Script, data_dir: Path, *chosen: str) -> list[str]:
    wrong = '+strategies.cpu.wrong=["trainer.max_stepz=3"]'
    sections, data = f"sections=[{','.join(chosen)}]", f"paths.data_dir={data_dir}"
    return script("bench.py", "gpu", "device=cpu", data, "share.cpu.depth=12", wrong, sections)


def begun(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("begins ")]


def living(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, state = (place / "cmdline").read_text(), (place / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{folder}/" in words and state not in "ZX":
            found.append(words.replace("\0", " "))
    return found


def test_killed_in_the_middle_it_goes_on_with_what_is_not_done(script: Script, data_dir: Path, tmp_path: Path) -> None:
    """And a case with a wrong override fails, says why, and stops none."""
    line = command(script, data_dir, *CHOSEN)
    place = tmp_path / "logs" / "bench_gpu" / "cpu"
    results = place / "results.json"

    def cases() -> dict[str, Any]:
        return json.loads(results.read_text())["cases"] if results.exists() else {}  # whole whenever it is read

    first = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (len(cases()) >= 3 and (place / "faults" / "cpu" / "nan" / "train.log").exists()):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    killed = cases()
    assert {path: case["status"] for path, case in killed.items()} == {
        "strategies/cpu": "PASS", OFFLOAD: "PASS", WRONG: "FAIL"
    }  # fmt: skip
    assert "trainer.max_stepz" in killed[WRONG]["why"]
    assert "Traceback" not in killed[WRONG]["why"]
    assert killed[OFFLOAD]["figures"]["apart"] < 1e-6
    while left := living(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)

    second = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 1, second.stderr  # for the wrong one
    assert begun(second.stdout) == ["faults/cpu/nan", "share/fsdp"]
    done = cases()
    assert list(done) == [*killed, "faults/cpu/nan", "share/fsdp"]
    assert {path: done[path] for path in killed} == killed  # not touched
    assert done["faults/cpu/nan"]["status"] == done["share/fsdp"]["status"] == "PASS"
    share = done["share/fsdp"]["figures"]
    assert share["held_gib"] == pytest.approx(share["expected_gib"], rel=0.02)
    table = (place / "results.md").read_text()
    assert f"| strategies | wrong | FAIL | {killed[WRONG]['why']} |" in table
    assert table.count("| PASS |") == 4

    line = [*command(script, data_dir, "strategies/cpu", WRONG), "again=failed", "minutes=0.001"]
    third = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert begun(third.stdout) == [WRONG]
    assert (third.returncode, third.stdout.count("NOT RUN")) == (0, 3)  # a line, the table, the sum: time was up
    assert cases() == {path: case for path, case in done.items() if path != WRONG}


def test_a_section_that_does_not_exist_is_one_line(run_script: Run) -> None:
    done = run_script("bench.py", "gpu", "device=cpu", "sections=[stratgies]")
    allowed = "allowed are tests, strategies, faults, scripts, two_processes, share, memory, or section/case"
    assert (done.returncode, done.stderr) == (2, f"error: sections = stratgies: no such section; {allowed}\n")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    composed = to_plain(compose_config(f"paths.output_dir={tmp_path}", "limit_s=1", name="bench_gpu.yaml"))
    check_config(composed, frame.Config)
    return Bench(composed, {"kind": "cpu", "name": "cpu", "torch": "?"}, tmp_path)


def test_only_its_own_folder_is_emptied(bench: Bench, tmp_path: Path) -> None:
    foreign = tmp_path / "theirs" / "cpu"
    (foreign / "share" / "fsdp").mkdir(parents=True)
    (foreign / "share" / "fsdp" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds what this benchmark did not write"):
        frame.own_folder(foreign)
    bench.folder = tmp_path / "ours"
    frame.own_folder(bench.folder)
    (bench.folder / "share").symlink_to(foreign / "share")
    result = frame.run_case(Case("share", "fsdp", lambda bench, place: Outcome()), bench, time.monotonic() + 60)
    assert result is not None
    assert result["status"] == "FAIL"
    assert "is a link, or in one" in result["why"]
    assert (foreign / "share" / "fsdp" / "thesis.tex").read_text() == "precious"
    frame.own_folder(bench.folder)  # ours by now


DAMAGED = ["", "{", "[1]", '{"cases": 5}', '{"cases": {"a/b": {"status": "PASS"}}}', "[" * 10**5]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_of_results_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(UserError, match="damaged, or not written by this benchmark"):
        read_results(file)


def test_cases_are_chosen_by_section_and_pattern(bench: Bench) -> None:
    cases = [case for make in frame.SECTIONS.values() for case in make(bench)]
    assert frame.chosen(cases, None) == cases
    assert [case.path for case in frame.chosen(cases, ["faults/*/nan", "share"])] == [
        "faults/cpu/nan", "faults/deepspeed/nan", "share/fsdp"
    ]  # fmt: skip
    with pytest.raises(UserError, match="again = strategies/nothing: no such section or case; allowed are tests, "):
        frame.chosen(cases, ["share", "strategies/nothing"], "again")


def test_whatever_a_case_does_is_its_result_alone(bench: Bench, tmp_path: Path) -> None:
    def result(work: Any, end: float = 1e9, **case: Any) -> dict[str, Any] | None:
        return frame.run_case(Case("tests", "one", work, **case), bench, end)

    def told(work: Any, **case: Any) -> tuple[str, str]:
        found = result(work, **case)
        assert found is not None
        return found["status"], found["why"]

    def raising(error: Exception) -> Any:
        def fail(bench: Bench, place: Path) -> Outcome:
            raise error

        return fail

    assert told(lambda bench, place: Outcome({"a": True}, {"x": 1.0})) == ("PASS", "")
    assert told(lambda bench, place: Outcome({"a": True, "b": False})) == ("FAIL", "")
    assert told(raising(SkipError("not here"))) == ("SKIP", "not here")
    assert told(raising(CaseError("two\nlines"))) == ("FAIL", "two lines")
    assert told(raising(ZeroDivisionError("defect"))) == ("FAIL", "ZeroDivisionError: defect")
    assert told(raising(ZeroDivisionError("defect")), needs_gpu=True) == ("SKIP", "needs a GPU")

    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])"

    def hanging(bench: Bench, place: Path) -> Outcome:
        bench.start(["-c", hang, f"{tmp_path}/"], place, "hang").succeed()
        return Outcome()

    began = time.monotonic()
    assert told(hanging)[1].startswith("took longer than 1 s")
    assert result(hanging, end=time.monotonic() + 0.5) is None  # the whole command's time was over: to be done again
    assert time.monotonic() - began < 10
    assert living(tmp_path) == []


def test_a_result_counts_for_its_own_config_alone(bench: Bench) -> None:
    case = Case("memory", "one", lambda bench, place: Outcome())
    key = frame.key_of(case, bench, "code")
    bench.config["sections"], bench.config["minutes"] = ["memory"], 5.0
    assert frame.key_of(case, bench, "code") == key
    assert frame.key_of(case, bench, "other code") != key
    bench.config["memory"]["cpu"]["depths"] = [5]
    assert frame.key_of(case, bench, "code") != key


def test_every_run_on_a_gpu_has_a_valid_config(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    """What cannot be run here is composed and checked like any training."""
    monkeypatch.setattr(config, "PACKAGES", (*config.PACKAGES, f"{CALLBACKS}."))  # as in benchmarks/gpu/run.py
    bench.machine["kind"] = "cuda"
    channels, *sides = bench.of("memory")["latents"]
    (tmp_path / "data" / f"latents_{channels}_{sides[0]}_{sides[1]}").mkdir(parents=True)
    strategies, faulty = bench.of("strategies"), bench.of("faults")
    assert list(strategies)[:5] == ["gpu", "ddp", "fsdp", "deepspeed", "deepspeed_offload"]
    commands = [*strategies.values(), *([*faults.ENDLESS, *given, "data.num_workers=2"] for given in faulty.values())]
    commands += [[*faults.SHORT, *given, *faults.FORGED, *faults.SPOIL] for given in faulty.values()]
    commands += [[*given, *processes.MACHINES] for given in bench.of("two_processes").values()]
    sizes = bench.of("memory")
    modes = [[*s, *m] for s in sizes["strategies"].values() for m in sizes["modes"].values()]
    commands += [
        memory.training_overrides(bench, tmp_path, 28, given) for given in [*modes, *sizes["deepest"].values()]
    ]
    assert len(commands) == 9 + 4 + 4 + 3 + 9 + 2
    for given in commands:
        chosen = to_plain(compose_config(f"paths.output_dir={tmp_path}", *bench.of("training"), *given))
        assert (chosen["trainer"]["accelerator"], chosen["trainer"]["devices"]) == ("gpu", 1)
        check_config(chosen, run.TrainConfig)
        run.check_together(chosen)
    planned = memory.plan([*bench.of("training"), *commands[-1]])
    assert 0.5 < planned["planned_gib"] < 20
    assert planned["parts"]["host"] > 5  # weights, optimiser and average are there


@pytest.mark.parametrize("wrong", ["minutes=0", "device=tpu", "again=some", "+tests.cpu.dept=3"])
def test_wrong_values_are_told(tmp_path: Path, wrong: str) -> None:
    composed = to_plain(compose_config(f"paths.output_dir={tmp_path}", wrong, name="bench_gpu.yaml"))
    with pytest.raises(UserError, match=wrong.lstrip("+").partition("=")[0]):
        check_config(composed, frame.Config)


def test_reading_processes_are_told_from_others(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "other = subprocess.Popen(['sleep', '60'])\n"
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(60); os._exit(0)\n"
        "print(pid, flush=True); time.sleep(60)"
    )
    job = Command(["-c", code], tmp_path, time.monotonic() + 30, "forks")
    job.until(lambda: job.text.strip(), "the fork")
    job.until(lambda: len(job.family()) == 3, "the other one")
    time.sleep(0.2)  # the other one has become another program by now
    assert job.readers() == [int(job.text)]
    job.send(signal.SIGKILL)
    assert job.process.wait(10) == -signal.SIGKILL
    assert len(job.family()) == 2
    job.end()
    assert job.family() == {}


def test_work_beside_the_network_is_told_from_its_own() -> None:
    def kernel(stream: int, start: float, stop: float, name: str = "gemm", cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "ts": start, "dur": stop - start, "name": name, "args": {"stream": stream}}

    main = [kernel(7, 0, 1000), kernel(7, 1500, 2500)]
    side = [kernel(20, 500, 1000, "ncclDevKernel_AllGather"), kernel(20, 1000, 1500, "Memcpy DtoD", "gpu_memcpy"),
            kernel(24, 600, 700, "elementwise")]  # fmt: skip
    host = [{"cat": "cpu_op", "ts": 0, "dur": 9999, "name": "aten::mm"}]
    found = side_work([*side, *host, *main])
    assert found == {"main_ms": 2.0, "side_ms": 1.0, "gather_ms": 1.0, "overlapped": 0.5}
    assert side_work(host) == {}
    assert side_work(main) == {"main_ms": 2.0, "side_ms": 0, "gather_ms": 0}


@pytest.mark.parametrize(
    ("limit", "tries", "found"),
    [(100, 2, (100, 115)), (130, 3, (115, 132)), (90, 3, (85, 92)), (10, 2, (0, 85)), (0, 0, (0, None))],
)
def test_the_deepest_is_sought_around_the_plan(limit: int, tries: int, found: tuple[int, int | None]) -> None:
    assert memory.bracket(lambda depth: depth <= limit, 100, tries) == found


@pytest.mark.skipif(not TIMES, reason="long: MVSPLIT_FAULTS=1")
def test_all_parts_for_cpus(script: Script, data_dir: Path, tmp_path: Path) -> None:
    line = script("bench.py", "gpu", "device=cpu", f"paths.data_dir={data_dir}")
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    cases = json.loads((tmp_path / "logs" / "bench_gpu" / "cpu" / "results.json").read_text())["cases"]
    assert {p: c["why"] or c["checks"] for p, c in cases.items() if c["status"] == "FAIL"} == {}, done.stderr
    assert done.returncode == 0
    skipped = {path for path, case in cases.items() if case["status"] == "SKIP"}
    assert skipped == {"tests/pytest"}
