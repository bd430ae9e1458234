"""The training process acts on a signal; processes that it has forked do not."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from lightning import LightningModule, Trainer

from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.callbacks.stop_signals import SIGNALS, StopOnSignal
from mvsplit.utils.errors import AgreedError


@pytest.fixture
def handling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StopOnSignal]:
    """The callback before the first step, in a SLURM job; a stand-in for `scontrol` creates `requeued`."""
    command = tmp_path / "scontrol"
    command.write_text(f"#!/bin/sh\ntouch {tmp_path}/requeued\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    callback, module = StopOnSignal(), LightningModule()
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[CheckpointSaver("saved")])
    callback.setup(trainer, module, "fit")
    yield callback
    callback.teardown(trainer, module, "fit")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_forked_process_leaves_signals_before_the_first_step_to_the_training(
    handling: StopOnSignal, tmp_path: Path, number: signal.Signals
) -> None:
    child = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), number))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert not (tmp_path / "requeued").exists()
    with pytest.raises(SystemExit, match=str(128 + number)):
        os.kill(os.getpid(), number)
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)


def test_without_a_saver_it_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(AgreedError, match=r"callbacks\.checkpoint is missing.*use callbacks\.stop_signals=null"):
        StopOnSignal().setup(trainer, LightningModule(), "fit")


@pytest.mark.parametrize(("requeue", "after"), [("auto", {10}), ("any", {10, 15}), ("never", set())])
def test_which_signals_requeue_a_job(requeue: Literal["auto", "any", "never"], after: set[int]) -> None:
    assert StopOnSignal(requeue).requeue_after == after
