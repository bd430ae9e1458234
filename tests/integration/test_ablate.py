"""src/ablate.py as users start it, and interrupted."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

Command = Callable[..., list[str]]
Run = Callable[..., subprocess.CompletedProcess[str]]

TINY = [
    "model=tiny", "data.batch_size=8", "trainer.accelerator=cpu", "trainer.max_steps=3", "trainer.val_check_interval=3",
    "trainer.limit_val_batches=1", "callbacks.sample_grid=null", "callbacks.checkpoint=null",
    "callbacks.stop_signals=null", "logger=null", "test=false",
]  # fmt: skip
QUESTIONS = {"which": {"a": ["residual=post_norm"], "b": ["residual=mvsplit"]}}
RUNS = ["a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1"]


@pytest.fixture
def command(script: Command, data_dir: Path, tmp_path: Path) -> Command:
    """`command(*overrides, questions=…, more=…)`: two variants, two seeds, two processes, three steps."""

    def make(
        *overrides: str, questions: Any = QUESTIONS, more: tuple[str, ...] = (), saving: bool = False
    ) -> list[str]:
        asked = re.sub(r'"(\w+)": ', r"\1:", json.dumps(questions))  # Hydra's keys are not quoted
        own = [o for o in TINY if not (saving and o == "callbacks.checkpoint=null")]
        keys = [f"overrides={json.dumps([*own, *more])}", "~questions", f"+questions={asked}"]
        return script(
            "ablate.py", *keys, f"folder={tmp_path}/out", "seeds=[0,1]", "processes=2", f"paths.data_dir={data_dir}",
            *overrides,
        )  # fmt: skip

    return make


@pytest.fixture
def ablate(command: Command, tmp_path: Path) -> Run:
    def run(*overrides: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        call = command(*overrides, **settings)
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)

    return run


def results(folder: Path) -> dict[str, Any]:
    return {
        str(f.parent.relative_to(folder)): json.loads(f.read_text()) for f in sorted(folder.glob("*/*/result.json"))
    }


def stamps(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.glob("*/*/result.json")}


@pytest.mark.long
def test_all_runs_are_trained_once_and_other_settings_are_refused(ablate: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ablate()
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert list(found) == RUNS
    for name, result in found.items():
        assert result["status"] == "finished"
        assert result["metrics"]["train/loss"] > 0
        assert "val/loss" in result["metrics"]
        assert "run finished" in (out / name / "log.txt").read_text()
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert config["seed"] == config["module"]["seed"] == int(name[-1])
        assert config["residual"]["_target_"].endswith({"a": "PostNorm", "b": "MVSplit"}[name[0]])
    assert found["a/seed_0"]["metrics"] != found["a/seed_1"]["metrics"]
    assert "4 runs, 0 finished; 2 at once" in done.stdout
    assert "finished         b/seed_1: train/loss" in done.stdout
    assert "run finished" not in done.stdout
    rows = json.loads((out / "ablation.json").read_text())["variants"]
    assert [(row["name"], row["question"]) for row in rows] == [("a", "which"), ("b", "which")]

    before = stamps(out)
    other = ablate(more=("optim.lr=0.01",))
    assert other.returncode == 2
    assert "has the result of other settings (now optim.lr=0.01); set folder=" in other.stderr
    assert stamps(out) == before

    wrong = ablate(f"folder={tmp_path}/other", "seeds=[0]", more=(f"ckpt_path={tmp_path}",))
    assert wrong.returncode == 1
    assert f"FAILED           a/seed_0: stopped: ckpt_path = {tmp_path}: not a checkpoint" in wrong.stdout
    assert results(tmp_path / "other") == {}  # it says nothing about the method: the next command tries again


def wait_for(process: subprocess.Popen[str], happened: Callable[[], Any]) -> Any:
    until = time.monotonic() + 120
    while not (value := happened()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    return value


def workers(folder: Path) -> dict[str, int]:
    """Processes that train, by the name of their run."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            log = Path(os.readlink(process / "fd" / "1"))
        except OSError:
            continue
        if log.name == "log.txt" and log.is_relative_to(folder):
            found[str(log.parent.relative_to(folder))] = int(process.name)
    return found


@pytest.mark.long
def test_a_killed_command_resumes(command: Command, ablate: Run, tmp_path: Path) -> None:
    """Ctrl-C is tested with src/study.py, which trains its runs by the same code."""
    steps = ("trainer.max_steps=100", "callbacks.checkpoint.every_n_steps=10")
    out, call = tmp_path / "out", command(more=steps, saving=True)
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def saved() -> list[str]:
        return [name for name in workers(out) if any((out / name / "checkpoints").glob("step-*.ckpt/COMPLETE"))]

    interrupted = wait_for(process, lambda: results(out) and saved())
    pids = list(workers(out).values())
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not workers(out)
    before = stamps(out)
    assert 0 < len(before) < len(RUNS)
    done = ablate(more=steps, saving=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in interrupted:
        assert name in {run for run in RUNS if "resuming from step" in (out / run / "log.txt").read_text()}
    assert f"4 runs, {len(before)} finished" in done.stdout
    assert list(results(out)) == RUNS
    assert before.items() <= stamps(out).items()


@pytest.mark.long
def test_a_killed_run_is_reported_and_the_others_continue(command: Command, tmp_path: Path) -> None:
    out, call = tmp_path / "out", command(more=("trainer.max_steps=25",))
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    name, pid = next(iter(wait_for(process, lambda: workers(out)).items()))
    os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert f"FAILED           {name}: killed (exit status -9)" in said
    assert set(RUNS) - set(results(out)) == {name}


@pytest.mark.long
def test_a_run_that_stops_itself_is_a_result_and_a_defect_is_not(ablate: Run, tmp_path: Path) -> None:
    # Gains that overflow, and a folder in the way of a file that a callback writes.
    questions = {
        "which": {
            "good": ["residual=mvsplit"],
            "stops": ["residual=mvsplit", "residual.beta_init=1e38"],
            "fails": ["residual=mvsplit", "callbacks=record", "callbacks.record.folder=\\${paths.output_dir}/log.txt"],
        }
    }
    done = ablate("seeds=[0]", questions=questions)
    out = tmp_path / "out"
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)
    assert {name: result["status"] for name, result in found.items()} == {
        "good/seed_0": "finished", "stops/seed_0": "stopped"
    }  # fmt: skip
    assert "not finite at step" in found["stops/seed_0"]["why"]
    assert "Traceback" in (out / "fails" / "seed_0" / "log.txt").read_text()
    assert "FAILED           fails/seed_0: " in done.stdout


@pytest.mark.long
def test_mistakes_are_reported_before_anything_runs(ablate: Run, tmp_path: Path) -> None:
    done = ablate("only=[c]")
    assert done.returncode == 2
    assert "only = ['c']: no such question or variant; allowed: which, a, b" in done.stderr
    assert not (tmp_path / "out").exists()
