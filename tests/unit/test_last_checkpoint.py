"""Who acts on a signal: the training process, and no process that it has forked."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning import LightningModule, Trainer

from mvsplit.callbacks.last_checkpoint import SIGNALS, LastCheckpoint


@pytest.fixture
def handling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LastCheckpoint]:
    """The callback before the first step, in a SLURM job; a stand-in for `scontrol` creates `requeued`."""
    command = tmp_path / "scontrol"
    command.write_text(f"#!/bin/sh\ntouch {tmp_path}/requeued\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    callback, module = LastCheckpoint(str(tmp_path)), LightningModule()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    callback.setup(trainer, module, "fit")
    yield callback
    callback.teardown(trainer, module, "fit")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_forked_process_leaves_signals_before_the_first_step_to_the_training(
    handling: LastCheckpoint, tmp_path: Path, number: signal.Signals
) -> None:
    child = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), number))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert not (tmp_path / "requeued").exists()
    with pytest.raises(SystemExit, match=str(128 + number)):
        os.kill(os.getpid(), number)
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)
