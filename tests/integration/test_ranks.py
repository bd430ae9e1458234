"""Runs of several processes that are killed, stopped, fail or are told to stop: all end, in time, with one message."""

import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comparison import last
from conftest import SUPPORT
from jobs import BOUND_S, ZERO3, Job, errors

from .test_commands import runs

TIMEOUT_S = 5
LONG = ["trainer.max_steps=4000", "trainer.val_check_interval=4000", "callbacks.checkpoint.every_n_steps=5"]
WATCH = f"callbacks.rank_watch.timeout_s={TIMEOUT_S}"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

Script = Callable[..., list[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(command: list[str], name: str = "job", **env: str) -> Job:
        jobs.append(Job(command, tmp_path, name, **env))
        return jobs[-1]

    yield begin
    for job in jobs:
        for pid in job.others():
            os.kill(pid, signal.SIGKILL)
        job.process.kill()
        job.process.wait()


def saved(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("logs/train/runs/*/checkpoints/last.ckpt"))


def disturbed(command: list[str], **what: object) -> list[str]:
    """The command, with a rank that is disturbed, see `disturbed_train.py`."""
    keys = "".join(f",{key}:{value}" for key, value in what.items())
    script = str(SUPPORT / "disturbed_train.py")
    return [command[0], script, *command[2:], f"+callbacks.disturb={{_target_:disturbed_train.Disturb{keys}}}"]


@pytest.mark.long
def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_before_the_step(
    script: Script, start: Callable[..., Job], tmp_path: Path
) -> None:
    """Under ZeRO-3, whose engine would take its step first and tell later; the second micro-batch of a step has it."""
    options = [*ZERO3, "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=8000"]
    job = start(disturbed(script("train.py", *LONG, WATCH, *options), what="spoil", when="train", rank=1))
    assert job.ends(120) == 2
    (line,) = errors(job.text)
    assert "the loss or its gradient is not finite at step 7 " in line
    assert "the step was not taken" in line
    (run,) = (tmp_path / "logs" / "train" / "runs").iterdir()
    for rank in (0, 1):
        report = json.loads((run / "stability" / f"nonfinite_step_7_rank_{rank}.json").read_text())
        assert math.isfinite(float(report["loss"]))
        assert "nan" in report["gradient_norms"].values()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank", "trainer"),
    [
        (signal.SIGKILL, 1, ["trainer=ddp_sim"]),
        pytest.param(signal.SIGKILL, 0, ["trainer=ddp_sim"], marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 1, ["trainer=ddp_sim"], marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 1, ZERO3, marks=pytest.mark.long),
    ],
    ids=["kill 1", "kill 0", "stop 1", "ZeRO-3 kill 1"],
)
def test_a_lost_rank_ends_the_others(
    script: Script, start: Callable[..., Job], tmp_path: Path, number: int, rank: int, trainer: list[str]
) -> None:
    job = start(script("train.py", *LONG, WATCH, *trainer))
    job.until(lambda: saved(tmp_path))
    (child,) = job.others()
    pids = [job.process.pid, child]
    time.sleep(3)  # a beat of each, one a second: the step is written by one rank, then read by the other
    os.kill(pids[rank], number)
    began = time.monotonic()
    # A stopped child is ended by its parent: nothing stays behind.
    assert job.ends() == (-signal.SIGKILL if rank == 0 else 75)
    print(f"the others ended after {time.monotonic() - began:.1f} s")
    (line,) = errors(job.text)
    how = "has not answered" if number == signal.SIGSTOP else "is gone"
    assert f"rank {rank} ({socket.gethostname()}, pid {pids[rank]}) {how}" in line
    assert "resume with ckpt_path=last" in line
    assert int(line.partition("last seen in step ")[2].partition(";")[0]) > 0
    assert "Traceback" not in job.text
    assert saved(tmp_path)


@pytest.mark.long
def test_a_lost_first_rank_that_is_only_stopped(script: Script, start: Callable[..., Job], tmp_path: Path) -> None:
    job = start(script("train.py", *LONG, WATCH, "trainer=ddp_sim"))
    job.until(lambda: saved(tmp_path))
    os.kill(job.process.pid, signal.SIGSTOP)
    job.until(lambda: not job.others(), BOUND_S)
    assert "error: rank 0 (" in job.text
    assert f"has not answered for {TIMEOUT_S} s: killed, stopped or cut off" in job.text
    os.kill(job.process.pid, signal.SIGCONT)  # and then it ends too
    assert job.ends() == 75


@pytest.mark.long
def test_a_rank_killed_before_the_ranks_are_connected(script: Script, start: Callable[..., Job]) -> None:
    for rank in (0, 1):
        job = start(script("train.py", *LONG, WATCH, "trainer=ddp_sim"))
        job.until(job.others)
        os.kill((job.process.pid, *job.others())[rank], signal.SIGKILL)
        assert job.ends() == (75 if rank else -signal.SIGKILL)
        assert "Traceback" not in job.text


@pytest.mark.long
@pytest.mark.parametrize(("what", "rank", "status"), [("defect", 1, 1), ("mistake", 1, 2), ("defect", -1, 1)])
def test_an_error_is_told_once_by_the_rank_that_has_it(
    script: Script, start: Callable[..., Job], what: str, rank: int, status: int
) -> None:
    job = start(disturbed(script("train.py", *LONG, WATCH, "trainer=ddp_sim"), what=what, when="train", rank=rank))
    assert job.ends(120) == status
    own = "ZeroDivisionError: disturbed by a defect" if what == "defect" else "error: disturbed by a mistake"
    assert job.text.count(own) == 1
    assert job.text.count("Traceback (most recent call last)") == (what == "defect")
    told = [line for line in errors(job.text) if line != own]  # by rank 0 of another one
    assert len(told) == (rank == 1 or (rank == -1 and "[rank1]: Traceback" in job.text))
    assert all("failed in step 7, see its own message" in line for line in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "when", "rank", "status", "step"),
    [
        ("SIGTERM", "validation", 1, 143, 10),  # the validation is finished, no step is added
        pytest.param("SIGUSR1", "train", 1, 138, 8, marks=pytest.mark.long),
        pytest.param("SIGUSR1+SIGTERM+SIGTERM", "save", 0, 138, 11, marks=pytest.mark.long),  # of step 10
        pytest.param("SIGTERM", "test", 1, 143, 12, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_any_rank_at_any_moment(
    script: Script, start: Callable[..., Job], tmp_path: Path, what: str, when: str, rank: int, status: int, step: int
) -> None:
    steps = ["trainer.max_steps=12", "trainer.val_check_interval=10", "callbacks.checkpoint.every_n_steps=5"]
    steps[2] = "callbacks.checkpoint.every_n_steps=10" if when == "save" else steps[2]
    steps[1] = "trainer.val_check_interval=12" if when == "save" else steps[1]
    command = disturbed(script("train.py", *steps, WATCH, "trainer=ddp_sim"), what=what, when=when, rank=rank)
    job = start(command)
    assert job.ends(120) == status
    assert errors(job.text) == []
    assert "Traceback" not in job.text
    (run,) = runs(tmp_path)
    assert last(run)["global_step"] == step
    if status == 138:
        assert "SIGUSR1: saving step" in job.text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_torchrun_on_two_machines(script: Script, start: Callable[..., Job], tmp_path: Path) -> None:
    """Here two agents on one machine. They agree on the folder; a lost rank ends both."""
    command = script("train.py", *LONG, WATCH, "trainer=ddp_sim", "trainer.devices=1", "trainer.num_nodes=2")
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    agents = [
        start([*TORCHRUN, "--nnodes=2", f"--node-rank={node}", *meeting, *command[1:]], f"node_{node}")
        for node in (0, 1)
    ]
    agents[0].until(lambda: saved(tmp_path))
    assert len(runs(tmp_path)) == 1
    (worker,) = [pid for pid, parent in agents[1].others().items() if parent == agents[1].process.pid]
    os.kill(worker, signal.SIGKILL)
    assert [agent.ends(60) != 0 for agent in agents] == [True, True]
    (line,) = errors(agents[0].text + agents[1].text)
    assert f"pid {worker}) has not answered for {TIMEOUT_S} s" in line


@pytest.mark.long
def test_torchrun_starts_again_in_the_same_folder(script: Script, start: Callable[..., Job], tmp_path: Path) -> None:
    steps = ["trainer.max_steps=40", "trainer.val_check_interval=40", "callbacks.checkpoint.every_n_steps=5"]
    command = script("train.py", *steps, WATCH, "trainer=ddp_sim", "ckpt_path=last")
    command = disturbed(command, what="SIGKILL", when="train", rank=1, step=12)
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", *command[1:]]
    job = start(launch, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert job.ends(120) != 0
    (run,) = runs(tmp_path)
    assert last(run)["global_step"] == 10
    assert "resuming from step 10" in job.text  # and killed again, two steps later
    assert len(errors(job.text)) == 2


WRONG_LAUNCHES = {
    "torchrun's shared store": (
        {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "1",
         "WORLD_SIZE": "2", "RANK": "0"},
        "error: torchrun --max-restarts: its store outlives a restart",
    ),
    "SLURM's --ntasks alone": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        "error: You set `--ntasks=2` in your SLURM bash script, but this variable is not supported",
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", WRONG_LAUNCHES)
def test_a_wrong_launch_is_refused(script: Script, start: Callable[..., Job], kind: str) -> None:
    env, message = WRONG_LAUNCHES[kind]
    job = start(script("train.py"), **env)
    assert job.ends() == 2
    assert job.text.startswith(message)
    assert job.text.count("\n") == 1


def slurm(job: int, rank: int, port: int, restarts: int = 0) -> dict[str, str]:
    """What srun sets for a task of two on one machine."""
    names = {"JOB_ID": job, "STEP_ID": 0, "PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": 2, "NNODES": 1,
             "STEP_NUM_TASKS": 2, "NTASKS_PER_NODE": 2, "NODELIST": "localhost", "RESTART_COUNT": restarts,
             "JOB_NAME": "train"}  # fmt: skip
    return {f"SLURM_{name}": str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def scontrol(tmp_path: Path) -> str:
    """PATH with a stand-in for SLURM's command, which is not here: writes what it is called with to scontrol.txt."""
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    command.chmod(0o755)
    return f"{command.parent}:{os.environ['PATH']}"


@pytest.mark.long
def test_signals_to_reading_processes_neither_end_the_run_nor_queue_it_again(
    script: Script, start: Callable[..., Job], tmp_path: Path
) -> None:
    steps = ["trainer.max_steps=12", "trainer.val_check_interval=10", "data.num_workers=1"]
    command = disturbed(script("train.py", *steps), what="SIGUSR1+SIGINT", when="start", rank=0, step=0, readers=True)
    later = "_target_:disturbed_train.Disturb,what:SIGUSR1+SIGINT+SIGTERM,when:train,rank:0,readers:true"
    command.append(f"+callbacks.later={{{later}}}")
    job = start(command, PATH=scontrol(tmp_path), SLURM_JOB_ID="77")
    assert job.ends(120) == 0
    assert not (tmp_path / "scontrol.txt").exists()
    assert last(runs(tmp_path)[0])["global_step"] == 12


@pytest.mark.long
def test_slurm_job_is_queued_again_and_goes_on(script: Script, start: Callable[..., Job], tmp_path: Path) -> None:
    path = scontrol(tmp_path)
    steps = ["trainer.max_steps=400", "trainer.val_check_interval=400", "callbacks.checkpoint.every_n_steps=5"]
    command = script("train.py", *steps, WATCH, "trainer=ddp_sim", "test=false", "ckpt_path=last")
    port = free_port()
    tasks = [start(command, f"first_{r}", PATH=path, **slurm(77, r, port)) for r in (0, 1)]
    tasks[0].until(lambda: saved(tmp_path))
    for task in tasks:  # as `--signal=USR1@120` does
        task.process.send_signal(signal.SIGUSR1)
    assert [task.ends() for task in tasks] == [138, 138]
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    (run,) = runs(tmp_path)
    assert run.name.startswith("slurm_77_0_")
    stopped_at = last(run)["global_step"]
    assert stopped_at < 400
    # The second task comes late, and sees another run of the same command that is newer: it follows the first.
    port = free_port()
    first = start(command, "again_0", PATH=path, **slurm(77, 0, port, restarts=1))
    first.until(lambda: f"resuming from step {stopped_at}" in first.text)
    newer = run.with_name("slurm_99_0")
    shutil.copytree(run, newer, symlinks=True, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.log"))
    second = start(command, "again_1", PATH=path, **slurm(77, 1, port, restarts=1))
    assert [first.ends(120), second.ends(120)] == [0, 0]
    assert last(run)["global_step"] == 400
    assert not list(newer.glob("*.log"))
    assert errors(first.text + second.text) == []
