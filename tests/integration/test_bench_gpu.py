"""`src/bench.py gpu` on a machine without a GPU: its parts for CPUs run at a tiny size, are killed, and resumed."""

import json
import math
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config

from mvsplit.benchmarks.common import override
from mvsplit.benchmarks.gpu import device_cases, frame, train_cases
from mvsplit.benchmarks.gpu.cases import Bench, CaseError, Command, Outcome, SkipError
from mvsplit.benchmarks.gpu.overlap_cases import side_work
from mvsplit.benchmarks.gpu.overrides import PROBES, TWO_MACHINES
from mvsplit.benchmarks.plan import plan, read_planned_run
from mvsplit.training import settings
from mvsplit.utils import config
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.errors import UserError

Script = Callable[..., list[str]]
Run = Callable[..., subprocess.CompletedProcess[str]]
OFFLOAD, WRONG = "strategies/checkpointing_offload", "strategies/wrong"
CHOSEN = ["strategies/cpu", OFFLOAD, WRONG, "faults/cpu/nan", "share"]


def command(script: Script, data_dir: Path, *chosen: str) -> list[str]:
    wrong = '+strategies.cpu.wrong=["trainer.max_stepz=3"]'
    sections, data = f"sections=[{','.join(chosen)}]", f"paths.data_dir={data_dir}"
    return script("bench.py", "gpu", "device=cpu", data, "share.cpu.depth=12", wrong, sections)


def started(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("starting ")]


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


@pytest.mark.long
def test_a_killed_benchmark_resumes_with_the_unfinished_cases(script: Script, data_dir: Path, tmp_path: Path) -> None:
    """And a case with a wrong override fails with a reason and does not stop the others."""
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
    assert started(second.stdout) == ["faults/cpu/nan", "share/fsdp"]
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
    assert started(third.stdout) == [WRONG]
    assert (third.returncode, third.stdout.count("NOT RUN")) == (0, 3)  # a line, the table, the sum: out of time
    assert cases() == {path: case for path, case in done.items() if path != WRONG}


def test_a_section_that_does_not_exist_is_one_line(run_script: Run) -> None:
    done = run_script("bench.py", "gpu", "device=cpu", "sections=[stratgies]")
    allowed = "allowed: tests, strategies, faults, scripts, two_processes, share, speed, memory, or section/case"
    assert (done.returncode, done.stderr) == (2, f"error: sections = stratgies: no such section or case; {allowed}\n")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    composed = to_plain(compose_config(f"paths.output_dir={tmp_path}", "limit_s=1", name="bench_gpu.yaml"))
    check_config(composed, frame.Config)
    return Bench(composed, {"kind": "cpu", "name": "cpu", "torch": "?", "code": "code"}, tmp_path)


def test_only_its_own_folder_is_emptied(bench: Bench, tmp_path: Path) -> None:
    foreign = tmp_path / "theirs" / "cpu"
    (foreign / "share" / "fsdp").mkdir(parents=True)
    (foreign / "share" / "fsdp" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="contains files of another program"):
        frame.own_folder(foreign)
    bench.folder = tmp_path / "ours"
    frame.own_folder(bench.folder)
    (bench.folder / "share").symlink_to(foreign / "share")
    result = frame.run_case("share/fsdp", lambda bench, place: Outcome(), bench, time.monotonic() + 60)
    assert result is not None
    assert result.status == "FAIL"
    assert "is a link, or inside one" in result.why
    assert (foreign / "share" / "fsdp" / "thesis.tex").read_text() == "precious"
    frame.own_folder(bench.folder)  # ours by now


DAMAGED = ["", "{", "[1]", '{"cases": 5}', '{"cases": {"a/b": {"status": "PASS"}}}', "[" * 10**5]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_of_results_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(UserError, match="damaged, or not written by this benchmark"):
        frame.read_results(file)


def test_results_are_read_as_they_were_written(bench: Bench) -> None:
    result = frame.CaseResult("FAIL", "why", {"agrees": False}, {"apart": math.inf, "parts": {"a": 1.5}}, 2.0, "key")
    frame.save_results({"share/fsdp": result}, bench)
    assert frame.read_results(bench.folder / "results.json") == {"share/fsdp": result}


def test_cases_are_chosen_by_section_and_pattern(bench: Bench) -> None:
    cases = frame.all_cases(bench)
    assert len(cases) == 37
    assert frame.chosen(cases, None) == list(cases)
    assert frame.chosen(cases, ["faults/*/nan", "share"]) == [
        "faults/cpu/nan", "faults/deepspeed/nan", "share/fsdp"
    ]  # fmt: skip
    with pytest.raises(UserError, match="again = strategies/nothing: no such section or case; allowed: tests, "):
        frame.chosen(cases, ["share", "strategies/nothing"], "again")


@pytest.mark.parametrize("path", ["/a", "/a, b='c' [d]", "/it's \\'", "/end\\"])
def test_paths_with_special_characters_are_quoted_in_overrides(path: str) -> None:
    assert compose_config(override("paths.data_dir", path)).paths.data_dir == path


def test_whatever_a_case_does_is_only_its_own_result(bench: Bench, tmp_path: Path) -> None:
    def result(work: Any, end: float = 1e9) -> frame.CaseResult | None:
        return frame.run_case("tests/one", work, bench, end)

    def ending(work: Any) -> tuple[str, str]:
        found = result(work)
        assert found is not None
        return found.status, found.why

    def raising(error: Exception) -> Any:
        def fail(bench: Bench, place: Path) -> Outcome:
            raise error

        return fail

    assert ending(lambda bench, place: Outcome({"a": True}, {"x": 1.0})) == ("PASS", "")
    assert ending(lambda bench, place: Outcome({"a": True, "b": False})) == ("FAIL", "")
    assert ending(raising(SkipError("not here"))) == ("SKIP", "not here")
    assert ending(raising(CaseError("two\nlines"))) == ("FAIL", "two lines")
    assert ending(raising(ZeroDivisionError("defect"))) == ("FAIL", "ZeroDivisionError: defect")
    assert ending(device_cases.gpu_tests) == ("SKIP", "needs a GPU")

    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])"

    def hanging(bench: Bench, place: Path) -> Outcome:
        bench.start(["-c", hang, f"{tmp_path}/"], place, "hang").succeed()
        return Outcome()

    began = time.monotonic()
    assert ending(hanging)[1].startswith("took longer than 1 s")
    assert (
        result(hanging, end=time.monotonic() + 0.5) is None
    )  # the limit of the whole command was reached: it will be repeated
    assert time.monotonic() - began < 10
    assert living(tmp_path) == []


def test_a_result_only_counts_for_its_own_config(bench: Bench) -> None:
    key = frame.key_of("memory/one", bench)
    bench.config["sections"], bench.config["minutes"] = ["memory"], 5.0
    assert frame.key_of("memory/one", bench) == key
    bench.machine["code"] = "other code"
    assert frame.key_of("memory/one", bench) != key
    bench.machine["code"] = "code"
    bench.config["memory"]["cpu"]["depths"] = [5]
    assert frame.key_of("memory/one", bench) != key


@pytest.mark.long
@pytest.mark.apart
def test_every_run_on_a_gpu_has_a_valid_config(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    """Runs that need a GPU are composed and checked like any training."""
    monkeypatch.setattr(config, "PACKAGES", (*config.PACKAGES, f"{PROBES}."))  # as in benchmarks/gpu/train_run.py
    bench.machine["kind"] = "cuda"
    assert len(frame.all_cases(bench)) == 83
    channels, *sides = bench.of("memory")["latents"]
    (tmp_path / "data" / f"latents_{channels}_{sides[0]}_{sides[1]}").mkdir(parents=True)
    strategies, faulty = bench.of("strategies"), bench.of("faults")
    assert list(strategies)[:5] == ["gpu", "ddp", "fsdp", "deepspeed", "deepspeed_offload"]
    commands = [*strategies.values()]
    commands += [[*given, *device] for device in faulty.values() for given, _ in train_cases.FAULTS.values()]
    commands += [[*given, *TWO_MACHINES] for given in bench.of("two_processes").values()]
    sizes = bench.of("memory")
    modes = [[*s, *m] for s in sizes["strategies"].values() for m in sizes["modes"].values()]
    commands += [device_cases.latents_run(bench, tmp_path, 28, given) for given in [*modes, *sizes["deepest"].values()]]
    assert len(commands) == 9 + 4 * 6 + 3 + 9 + 2
    for given in commands:
        chosen = to_plain(compose_config(f"paths.output_dir={tmp_path}", *bench.of("training"), *given))
        assert (chosen["trainer"]["accelerator"], chosen["trainer"]["devices"]) == ("gpu", 1)
        check_config(chosen, settings.TrainConfig)
        settings.check_together(chosen)
    planned = plan(read_planned_run(chosen))  # of deepspeed_offload
    assert 0.5 < planned.total / 2**30 < 20
    assert planned.host / 2**30 > 5  # weights, optimiser and average are there


@pytest.mark.parametrize("wrong", ["minutes=0", "device=tpu", "again=some", "tests=null"])
def test_wrong_values_are_reported(tmp_path: Path, wrong: str) -> None:
    composed = to_plain(compose_config(f"paths.output_dir={tmp_path}", wrong, name="bench_gpu.yaml"))
    with pytest.raises(UserError, match=wrong.lstrip("+").partition("=")[0]):
        check_config(composed, frame.Config)


def test_workers_are_distinguished_from_other_processes(tmp_path: Path) -> None:
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
    time.sleep(0.2)  # the other one runs another program by now
    assert job.workers() == [int(job.text)]
    job.process.kill()
    assert job.process.wait(10) == -signal.SIGKILL
    assert len(job.family()) == 2
    job.kill()
    assert job.family() == {}


def test_work_beside_the_network_is_distinguished_from_its_own() -> None:
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


@pytest.mark.parametrize(("limit", "found"), [(130, 115), (110, 100), (90, 85), (10, 0)])
def test_the_deepest_is_searched_around_the_plan(
    bench: Bench, tmp_path: Path, monkeypatch: Any, limit: int, found: int
) -> None:
    monkeypatch.setattr(device_cases, "latents_run", lambda bench, place, depth, given: [str(depth)])
    monkeypatch.setattr(device_cases, "_plan", lambda *_: {"largest_depth": 100})
    monkeypatch.setattr(device_cases, "_train", lambda bench, place, line: {} if int(line[0]) <= limit else None)
    outcome = device_cases.find_deepest(bench, tmp_path, [])
    assert (outcome.figures["trains"], outcome.checks["as_deep_as_planned"]) == (found, found > 0)


@pytest.mark.long
def test_parts_of_each_kind_for_cpus(script: Script, data_dir: Path, tmp_path: Path) -> None:
    # All 37 take ten minutes: `python src/bench.py gpu device=cpu`. Strategies and the share are in the test above.
    parts = "tests,faults/cpu/kill,scripts/sample"
    line = script("bench.py", "gpu", "device=cpu", f"sections=[{parts}]", f"paths.data_dir={data_dir}")
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    cases = json.loads((tmp_path / "logs" / "bench_gpu" / "cpu" / "results.json").read_text())["cases"]
    assert {p: c["why"] or c["checks"] for p, c in cases.items() if c["status"] == "FAIL"} == {}, done.stderr
    assert done.returncode == 0
    skipped = {path for path, case in cases.items() if case["status"] == "SKIP"}
    assert skipped == {"tests/pytest"}
