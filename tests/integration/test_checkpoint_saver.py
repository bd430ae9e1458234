"""Checkpoints are written in the background, once for each step; which ones stay; nothing is lost by a kill."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import differences, state
from disturbed_train import DisturbWrites
from lightning import Callback

import train
from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.training import checkpoint_io, checkpoint_writer
from mvsplit.training.checkpoint_format import Saved
from mvsplit.utils.errors import AgreedError

Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]
QUICK = ["test=false", "~logger", "callbacks.sample_grid=null", "callbacks.time_probe=null",
         "callbacks.monitor=null", "data.num_workers=0",
         "trainer.limit_val_batches=1", "optim.warmup_steps=2"]  # fmt: skip


@pytest.fixture
def with_callback(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callback], None]:
    """`with_callback(callback)`: runs of this test have it too."""

    def add(callback: Callback) -> None:
        build_each = train.build_each
        monkeypatch.setattr(
            train, "build_each", lambda nodes: build_each(nodes) + [callback] * ("ema" in (nodes or ()))
        )

    return add


@pytest.fixture
def undisturbed() -> Iterator[None]:
    """Takes back what `DisturbWrites` does in this process."""
    changed = {
        (kind, name): getattr(kind, name)
        for kind, name in (
            (checkpoint_writer.HashedFile, "write"),
            (checkpoint_writer.HashedFile, "__exit__"),
            (checkpoint_writer.CheckpointWriter, "_finish"),
            (CheckpointSaver, "_link"),
        )
    }
    yield
    for (kind, name), original in changed.items():
        setattr(kind, name, original)


def steps_of(folder: Path) -> dict[str, list[int]]:
    """Steps of the whole checkpoints of a run, and of the links."""
    whole = sorted(Saved(path).verify().step for path in folder.glob("step-*.ckpt"))
    links = {
        name: [Saved(folder / f"{name}.ckpt").step] for name in ("last", "best") if (folder / f"{name}.ckpt").exists()
    }
    return {"whole": whole, **links}


def test_a_step_is_written_once_and_retention_decides_what_stays(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations at 3, 6 and 9, of which the second is the best; saves at 2, 4, …, and every fourth for good."""
    written: list[str] = []
    run = checkpoint_writer.CheckpointWriter.run
    monkeypatch.setattr(
        checkpoint_writer.CheckpointWriter, "run", lambda self: (written.append(self.path.stem), run(self))[1]
    )
    losses = {3: 2.0, 6: 1.0, 9: 3.0}
    monkeypatch.setattr(CheckpointSaver, "_score", lambda self, trainer: losses[trainer.global_step])
    _, objects = train_here(*QUICK, "trainer.max_steps=11", "callbacks.checkpoint.keep_every_n_steps=4")
    assert written == [f"step-{step:08d}" for step in (2, 3, 4, 6, 8, 10, 11)]
    folder = tmp_path / "run" / "checkpoints"
    assert steps_of(folder) == {"whole": [4, 6, 8, 10, 11], "last": [11], "best": [6]}
    assert len(list(folder.iterdir())) == 7
    (saver,) = [c for c in objects["callbacks"] if isinstance(c, CheckpointSaver)]
    assert saver.summary() == [
        f"last checkpoint  {folder}/last.ckpt",
        f"best checkpoint  {folder}/step-00000006.ckpt",
    ]


def test_a_metric_that_is_not_logged_is_named(train_here: Train) -> None:
    with pytest.raises(AgreedError, match=r"monitor = val/fid: not logged; allowed: .*val/loss"):
        train_here(*QUICK, "callbacks.checkpoint.monitor=val/fid", "trainer.max_steps=3")


class Watch(Callback):
    """Lets the first write begin only in the step after the next; copies the weights after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.release = folder, threading.Event()
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.seen: list[str] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.seen = sorted(path.name for path in self.folder.glob("*"))
            self.release.set()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.weights[trainer.global_step] = {name: p.detach().clone() for name, p in module.named_parameters()}


def test_training_continues_during_a_write_and_does_not_change_it(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_callback: Callable[[Callback], None]
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    watch, order = Watch(folder), []
    run = checkpoint_writer.CheckpointWriter.run

    def slow(self: checkpoint_writer.CheckpointWriter) -> None:
        assert threading.current_thread() is not threading.main_thread()
        order.append(("begins", self.about["step"]))
        assert watch.release.wait(60)
        time.sleep(0.1)  # the next save, and the end, come before this has ended
        run(self)
        order.append(("ends", self.about["step"]))

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "run", slow)
    with_callback(watch)
    options = ["callbacks.checkpoint.keep_best=0", "callbacks.checkpoint.keep_last=9"]
    train_here(
        *QUICK,
        *options,
        "trainer.max_steps=7",
        "callbacks.checkpoint.every_n_steps=2",
        *["trainer.val_check_interval=100"],
    )
    assert order == [(what, step) for step in (2, 4, 6, 7) for what in ("begins", "ends")]
    assert watch.seen == []
    assert steps_of(folder) == {"whole": [2, 4, 6, 7], "last": [7]}
    for step in (2, 4, 6, 7):
        saved = Saved(folder / f"step-{step:08d}.ckpt")
        assert saved.state()["global_step"] == step
        assert saved.state()["ShardDataModule"]["samples"] == saved.manifest["data"]["samples"] == 8 * step
        tensors = saved.tensors("weights")
        for name, weight in watch.weights[step].items():
            assert torch.equal(tensors.whole(name), weight), (step, name)


def test_a_full_disk_stops_the_run_and_leaves_what_was_there(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_writer.HashedFile.write

    def full(self: checkpoint_writer.HashedFile, data: Any) -> int:
        if "step-00000004" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(checkpoint_writer.HashedFile, "write", full)
    with pytest.raises(AgreedError, match=r"could not be written: .*No space left on device; earlier ones"):
        train_here(*QUICK, "trainer.max_steps=50", "callbacks.checkpoint.keep_best=0")
    folder = tmp_path / "run" / "checkpoints"
    assert steps_of(folder) == {"whole": [2], "last": [2]}
    assert len(list(folder.iterdir())) == 2


def test_without_room_for_a_copy_it_saves_in_the_foreground(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint_io, "available_memory", lambda: 1e5)
    monkeypatch.setattr(checkpoint_io.FolderCheckpoints, "_write", lambda *_: pytest.fail("a thread was started"))
    with caplog.at_level("INFO", "mvsplit"):
        train_here(*QUICK)
    lines = [line for line in caplog.messages if "no room for a copy" in line]
    assert len(lines) == 1
    assert "callbacks.checkpoint.async_save = true" in lines[0]
    assert steps_of(tmp_path / "run" / "checkpoints")["last"] == [6]


def test_available_memory_is_read() -> None:
    assert 1e7 < checkpoint_io.available_memory() < 1e14


def in_another_process(train_here: Train, *overrides: str, run: str = "cut") -> int | None:
    process = multiprocessing.get_context("fork").Process(target=train_here, args=overrides, kwargs={"run": run})
    process.start()
    process.join(120)
    return process.exitcode


class Terminate(Callback):
    """SIGTERM to this process at the start of a step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_sigterm_waits_for_the_checkpoint_of_its_step(
    train_here: Train, tmp_path: Path, with_callback: Callable[[Callback], None], undisturbed: None
) -> None:
    with_callback(Terminate())
    with_callback(DisturbWrites(seconds=0.01))
    assert in_another_process(train_here, *QUICK, "trainer.max_steps=50") == 0
    assert steps_of(tmp_path / "cut" / "checkpoints")["last"] == [5]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_in_a_background_write_resumes_to_the_same_weights(
    train_here: Train, tmp_path: Path, with_callback: Callable[[Callback], None], undisturbed: None, kills: int
) -> None:
    """Kills spread over all points of all writes: in each file, before and after the rename, between the links."""
    disturbance = DisturbWrites()
    with_callback(disturbance)
    options = [*QUICK, "trainer.max_steps=6", "ckpt_path=last"]
    train_here(*options, run="whole")
    whole, points = state(tmp_path / "whole"), disturbance.points
    assert points > 100
    for number in range(kills):
        disturbance.points, disturbance.kill = 0, 1 + number * (points - 1) // (kills - 1)
        run = f"cut_{number}"
        assert in_another_process(train_here, *options, run=run) == -signal.SIGKILL
        disturbance.kill = -1
        assert in_another_process(train_here, *options, run=run) == 0
        assert differences(state(tmp_path / run), whole) == []
        assert len(list((tmp_path / run / "checkpoints").iterdir())) == len(
            list((tmp_path / "whole" / "checkpoints").iterdir())
        )
