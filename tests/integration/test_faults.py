"""Two processes of ZeRO-3 that are killed, stopped, run out of space or find a damaged checkpoint: nothing is lost."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparison import differences, state
from conftest import SUPPORT
from jobs import ZERO3, Job, errors

from mvsplit.training.checkpoint_format import COMPLETE, Saved

from .test_commands import runs

KILLS = 4
STEPS = 12 * KILLS
WITHIN_S = 60
"""How soon a disturbed run must have ended, all of it."""
BEGUN_S = 180
"""How soon a run must have saved for the first time."""
OPTIONS = [
    *ZERO3,
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=1000",
    "trainer.limit_test_batches=1",
    "optim.warmup_steps=5",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.sample_grid=null",
    "callbacks.checkpoint.keep_best=0",
    "callbacks.rank_watch.timeout_s=20",
    "+callbacks.slow={_target_:disturbed_train.DisturbWrites,seconds:0.001}",  # many steps happen during a write
]
Script = Callable[..., list[str]]


@pytest.fixture
def command(script: Script) -> list[str]:
    """A run whose checkpoints are written slowly."""
    python, _, *overrides = script("train.py", *OPTIONS)
    return [python, str(SUPPORT / "disturbed_train.py"), *overrides]


class Disturbed(Job):
    """A run of two processes that has been started, to be disturbed."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.folder = cwd / "logs" / "train" / "runs"
        self.before = self.saves()
        super().__init__(command, cwd)

    def saves(self) -> int:
        """Steps of the newest complete checkpoint."""
        names = [mark.parent.name for mark in self.folder.glob(f"*/checkpoints/step-*.ckpt/{COMPLETE}")]
        return max((int(name.removesuffix(".ckpt").rpartition("-")[2]) for name in names), default=0)

    def reach(self, moment: str, delay: float) -> list[int]:
        """Wait for a moment of the run; returns the processes of its ranks."""
        first = self.before + 2
        self.until(lambda: self.saves() >= first, BEGUN_S)
        ranks = [self.process.pid, *self.others()]
        if moment == "in a save":
            self.until(lambda: list(self.folder.glob("*/checkpoints/*.partial")))
        elif moment == "after a save":
            done = self.saves()
            self.until(lambda: self.saves() > done)
        else:
            time.sleep(delay)
        return ranks


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """Filled by the first test that needs it."""
    return {}


@pytest.fixture
def finish(
    command: list[str], tmp_path: Path, uninterrupted: dict[str, Any]
) -> Callable[[], subprocess.CompletedProcess[str]]:
    """`finish()`: repeat the command to its end, and compare with a run that nobody disturbed, bit for bit."""

    def end() -> subprocess.CompletedProcess[str]:
        def run(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
            )

        if not uninterrupted:
            whole = run("task_name=whole")
            assert whole.returncode == 0, whole.stderr
            uninterrupted.update(state(runs(tmp_path, "whole")[0]))
        last = run("ckpt_path=last")
        assert last.returncode == 0, last.stderr
        (folder,) = runs(tmp_path)  # all in one
        assert differences(uninterrupted, state(folder)) == []
        return last

    return end


@pytest.mark.long
def test_a_rank_killed_at_any_moment(command: list[str], tmp_path: Path, finish: Callable[[], Any]) -> None:
    chance = random.Random(0)
    for attempt in range(KILLS):
        run = Disturbed([*command, "ckpt_path=last"], tmp_path)
        ranks = run.reach(("in a step", "in a save", "after a save")[attempt % 3], chance.random())
        victim = chance.randrange(2)
        os.kill(ranks[victim], signal.SIGKILL)
        status = run.ends(WITHIN_S)
        assert status == (75 if victim else -signal.SIGKILL), run.text
        lost = [line for line in run.text.splitlines() if f"rank {victim} (" in line]
        assert len(lost) == 1, run.text
        assert "Traceback" not in run.text
    finish()


@pytest.mark.long
def test_stopped_by_signals_at_any_moment(command: list[str], tmp_path: Path, finish: Callable[[], Any]) -> None:
    chance = random.Random(1)
    for attempt in range(KILLS):
        run = Disturbed([*command, "ckpt_path=last"], tmp_path)
        ranks = run.reach(("in a step", "in a save", "in a step")[attempt % 3], chance.random())
        for pid in chance.choice((ranks, ranks[:1], ranks[1:])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert run.ends(WITHIN_S) == 128 + signal.SIGTERM, run.text
        Saved(next(run.folder.glob("*/checkpoints/last.ckpt"))).verify()
    finish()


@pytest.mark.long
def test_one_rank_cannot_write(command: list[str], tmp_path: Path, finish: Callable[[], Any]) -> None:
    """Its files may no longer grow (as with a full disk or quota): all ranks stop with one line, nothing is damaged."""
    run = Disturbed([*command, "ckpt_path=last"], tmp_path)
    ranks = run.reach("after a save", 0)
    resource.prlimit(ranks[1], resource.RLIMIT_FSIZE, (1000, 1000))
    assert run.ends(WITHIN_S) == 2, run.text
    (error,) = errors(run.text)
    assert "the checkpoint could not be written: " in error
    assert "File too large (rank 1); earlier ones are untouched" in error
    finish()


@pytest.mark.slow
def test_one_byte_of_the_newest_has_changed(
    train_here: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_here("trainer.max_steps=4", "optim.schedule=constant", "callbacks.checkpoint.keep_best=0", run="cut")
    newest = tmp_path / "cut" / "checkpoints" / "step-00000004.ckpt"
    file = newest / "optimizer-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with caplog.at_level("INFO"):
        train_here("ckpt_path=last", "optim.schedule=constant", run="cut")
    assert f"skipped: {newest}: damaged, {file.name} fails its checksum" in capsys.readouterr().err
    assert f"resuming from step 2 of {newest.with_name('step-00000002.ckpt')}" in caplog.text
    train_here("optim.schedule=constant", run="whole")
    assert differences(state(tmp_path / "cut"), state(tmp_path / "whole")) == []


@pytest.mark.long  # mounts a file system
def test_a_full_disk(command: list[str], tmp_path: Path, finish: Callable[[], Any]) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(logs)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = Disturbed([*command, "ckpt_path=last"], tmp_path)
        run.reach("after a save", 0)
        filler = logs / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        status = run.ends(WITHIN_S)
        assert status == 2, run.text
        assert "No space left on device" in run.text
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(logs)], check=True)
        finish()
    finally:
        subprocess.run(["umount", "-l", str(logs)], check=False)
