"""Folders of runs: which one a command resumes, what it is called, who holds it; and the end of a sweep."""

import csv
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_only

from mvsplit.training.session import locked as run_locked
from mvsplit.utils import launch, run_dirs, sweeps
from mvsplit.utils.locks import locked


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """`made(name, *overrides)`: a run's folder with a checkpoint, newer than those before."""

    def make(name: str, *overrides: str) -> Path:
        run = tmp_path / "train" / "runs" / name
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
        mark = run / "checkpoints" / "last-00000002.ckpt" / "COMPLETE"
        mark.parent.mkdir(parents=True)
        mark.touch()
        number = len(list(run.parent.iterdir()))
        os.utime(mark, (number, number))
        return run

    return make


def resumed(tmp_path: Path, *overrides: str) -> str:
    run_dirs.run_name.cache_clear()
    return run_dirs.run_dir.__wrapped__(str(tmp_path), "train", "last", (*overrides, "ckpt_path=last"))


@pytest.mark.parametrize(
    "change",
    ["trainer.max_steps=9", "trainer=ddp_sim", "trainer.devices=2", "data.num_workers=1", "logger=csv", "~logger",
     "callbacks.progress.line_every_s=1", "+callbacks.checkpoint.keep_last=3", "test=false"],
)  # fmt: skip
def test_a_command_with_such_a_change_resumes_its_run(made: Callable[..., Path], tmp_path: Path, change: str) -> None:
    run = made("a", "residual=post_norm", "trainer.max_steps=4")
    made("b", "residual=rezero", change)
    assert resumed(tmp_path, "residual=post_norm", change) == str(run)


@pytest.mark.parametrize("link", ["checkpoints", ".hydra/config.yaml", "stability", ".lock", "train.log", "wandb"])
def test_a_run_with_a_link_that_leads_out_is_not_resumed(
    made: Callable[..., Path], tmp_path: Path, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resuming it would write there, and clear away old checkpoints."""
    run = made("a", "seed=1")
    (run / "checkpoints" / "last.ckpt").symlink_to("last-00000002.ckpt")  # one of our own
    assert resumed(tmp_path, "seed=1") == str(run)
    victim = tmp_path / "victim"
    if (run / link).is_dir():
        (run / link).rename(victim)
    else:
        victim.write_text("precious")
    (run / link).symlink_to(victim)
    assert resumed(tmp_path, "seed=1") != str(run)
    assert f"skipped: {run / link} points outside the run's folder" in capsys.readouterr().err
    assert victim.is_dir() or victim.read_text() == "precious"


@pytest.mark.parametrize("content", ["- 2001-99-99", "[" * 3000, "pipe"])
def test_an_odd_record_of_a_command_is_passed_over(made: Callable[..., Path], tmp_path: Path, content: str) -> None:
    run, odd = made("a", "seed=1"), made("b", "seed=1")
    record = odd / ".hydra" / "overrides.yaml"
    if content == "pipe":
        record.unlink()
        os.mkfifo(record)
    else:
        record.write_text(content)
    assert resumed(tmp_path, "seed=1") == str(run)


@pytest.mark.parametrize(
    "change", ["seed=1", "optim.lr=0.1", "data=digits", "trainer.precision=bf16-true", "model=tiny"]
)
def test_a_command_with_another_change_is_another_run(made: Callable[..., Path], tmp_path: Path, change: str) -> None:
    made("a", "residual=post_norm")
    assert not Path(resumed(tmp_path, "residual=post_norm", change)).exists()


def test_the_very_command_comes_before_a_newer_one_that_is_alike(made: Callable[..., Path], tmp_path: Path) -> None:
    """Two runs of different lengths side by side keep their folders."""
    short, long = made("short", "trainer.max_steps=4"), made("long", "trainer.max_steps=8")
    assert resumed(tmp_path, "trainer.max_steps=4") == str(short)
    assert resumed(tmp_path, "trainer.max_steps=8") == str(long)
    assert resumed(tmp_path, "trainer.max_steps=16") == str(long)
    with locked(long / ".lock"):  # lives: it is not taken away from its command
        assert resumed(tmp_path, "trainer.max_steps=16") == str(short)
        with locked(short / ".lock"):
            assert not Path(resumed(tmp_path, "trainer.max_steps=16")).exists()
            assert resumed(tmp_path, "trainer.max_steps=8") == str(long)  # which then says that it is in use


def test_what_a_sweep_varies_never_counts_as_the_same() -> None:
    assert run_dirs.lasting(["trainer.max_steps=4,8", "trainer.devices=2"]) == ["trainer.max_steps=4,8"]
    assert run_dirs.lasting(["trainer.max_steps=range(4,8)"]) == ["trainer.max_steps=range(4,8)"]


def test_names_tell_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path(
        resumed(tmp_path, "residual=post_norm", "model.depth=100", "paths.data_dir=/x", "trainer.devices=2")
    ).name
    assert name.endswith("_residual-post_norm_depth-100")
    monkeypatch.setattr(run_dirs, "sweeps", {})
    sweep = ("residual=mvsplit,post_norm", "model.depth=100", "trainer.max_steps=2")
    folder = Path(run_dirs.sweep_dir(str(tmp_path), "train", None, sweep))
    jobs = [("residual=mvsplit", *sweep[1:]), ("residual=post_norm", *sweep[1:])]
    names = [run_dirs.job_dir(str(tmp_path), "train", None, job, number) for number, job in enumerate(jobs)]
    assert names == ["0_residual-mvsplit", "1_residual-post_norm"]
    (folder / "1").mkdir(parents=True)  # a sweep from before goes on where it is
    assert run_dirs.job_dir(str(tmp_path), "train", None, jobs[1], 1) == "1"
    long = [f"data.k{i}={'x' * 20}" for i in range(30)]
    assert len(Path(resumed(tmp_path, *long)).name) < 100


def idle(up: Any, goes_on: Any) -> None:
    up.set()
    goes_on.wait(60)


def test_a_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    up, goes_on = context.Event(), context.Event()
    with locked(tmp_path / ".lock") as mine:
        assert mine
        child = context.Process(target=idle, args=(up, goes_on))
        child.start()
        assert up.wait(60)
        with locked(tmp_path / ".lock") as free:
            assert not free
    with locked(tmp_path / ".lock") as free:
        assert child.is_alive()
        assert free
    goes_on.set()
    child.join()


def test_a_command_on_the_second_machine_is_not_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    launch.set_rank()
    with locked(tmp_path / ".lock"), run_locked(tmp_path):  # the first machine's, in a shared folder
        pass
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    launch.set_rank()
    assert rank_zero_only.rank == 0  # type: ignore[attr-defined]


def jobs_of(tmp_path: Path, **values: Any) -> list[sweeps.SweepJob]:
    kind = "val/loss", "minimize"
    return [
        sweeps.SweepJob(number, [f"optim.lr={name}"], tmp_path / str(number), 0, 1.0, status, *kind, value)
        for number, (name, (status, value)) in enumerate(values.items())
    ]


def test_the_best_of_a_sweep_is_finished_and_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    values = {"a": ("finished", nan), "b": ("finished", 0.5), "c": ("failed", 0.1), "d": ("finished", 0.4),
              "e": ("finished", float("-inf"))}  # fmt: skip
    jobs = jobs_of(tmp_path, **values)
    best = sweeps.best_of(jobs)
    assert best is not None
    assert best.overrides == ["optim.lr=d"]
    for one in jobs:
        one.direction = "maximize"
    best = sweeps.best_of(jobs)
    assert best is not None
    assert best.overrides == ["optim.lr=b"]
    assert sweeps.best_of(jobs_of(tmp_path, a=("finished", nan), b=("failed", 0.5))) is None
    sweeps._show(jobs)
    assert "optim.lr" in capsys.readouterr().out
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "finished", "finished"]
    assert [row["best"] for row in rows] == ["0", "1", "0", "0", "0"]
