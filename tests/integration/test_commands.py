"""The command line as users type it: real processes, real signals, real mistakes."""

import csv
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import differences, last, state, weights

from mvsplit.utils.locks import locked

Run = Callable[..., subprocess.CompletedProcess[str]]
LONG = ["trainer.max_steps=60", "trainer.val_check_interval=20", "callbacks.checkpoint.every_n_steps=5"]


def runs(tmp_path: Path, task: str = "train") -> list[Path]:
    return sorted((tmp_path / "logs" / task / "runs").iterdir())


def signalled(command: list[str], cwd: Path, checkpoint: str, number: signal.Signals) -> int:
    """Start a command, send it a signal once a checkpoint is there, and return its exit status."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(cwd.glob(checkpoint)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(number)
    print(process.communicate(timeout=60)[0])  # shown by pytest if the test fails
    return process.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs it: the final state of the run that nobody stopped."""
    return {}


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_interrupted_and_continued_ends_with_the_very_weights(
    script: Callable[..., list[str]],
    run_script: Run,
    tmp_path: Path,
    uninterrupted: dict[str, Any],
    number: signal.Signals,
    status: int,
) -> None:
    if not uninterrupted:
        assert run_script("train.py", *LONG, "task_name=whole").returncode == 0
        uninterrupted |= state(runs(tmp_path, "whole")[0])
    command = [*script("train.py", *LONG), "ckpt_path=last"]  # the same line at first and afterwards
    # Ctrl-C reaches a process that was started with the default handler; a shell's background job has it ignored.
    assert signalled(command, tmp_path, "logs/train/runs/*/checkpoints/last.ckpt", number) == status
    (run,) = runs(tmp_path)
    stopped_at = last(run)["global_step"]
    assert 5 <= stopped_at < 60
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr
    assert f"resuming from step {stopped_at}" in second.stdout
    assert runs(tmp_path) == [run]  # in place
    assert differences(uninterrupted, state(run)) == []


@pytest.mark.long
def test_last_belongs_to_the_same_command(run_script: Run, tmp_path: Path) -> None:
    """Or to one that differs only in how long it trains, or on what: that extends the run."""
    options = ["optim.warmup_steps=1", "trainer.max_steps=2"]
    assert run_script("train.py", *options).returncode == 0
    (run,) = runs(tmp_path)
    longer = run_script("train.py", *options, "trainer.max_steps=4", "data.num_workers=1", "ckpt_path=last")
    assert longer.returncode == 0, longer.stderr
    assert f"resuming from step 2 of {run}" in longer.stdout
    assert "trainer.max_steps = 4, was 2; the cosine schedule now ends there" in longer.stdout
    assert runs(tmp_path) == [run]
    assert last(run)["global_step"] == 4
    assert "nothing left to train" not in longer.stdout
    again = run_script("train.py", *options, "trainer.max_steps=4", "data.num_workers=1", "ckpt_path=last")
    assert again.returncode == 0, again.stderr
    assert "nothing left to train: trainer.max_steps = 4 is reached; a higher value extends it\n" in again.stdout
    other = run_script("train.py", *options, "seed=1", "ckpt_path=last")
    assert other.returncode == 0
    assert "no earlier run" in other.stdout
    assert len(runs(tmp_path)) == 2


@pytest.mark.slow
def test_a_killed_run_can_be_resumed_at_once(script: Callable[..., list[str]], tmp_path: Path) -> None:
    """Its reading processes live for seconds after it; they do not hold its lock."""
    command = script("train.py", *LONG, "data.num_workers=2")
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        while not list(tmp_path.glob("logs/train/runs/*/checkpoints/last.ckpt")):
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
    with locked(runs(tmp_path)[0] / ".lock") as free:
        assert any(Path(f"/proc/{worker}").exists() for worker in workers)
        assert free


@pytest.mark.slow
def test_two_ranks_train_like_one(run_script: Run, tmp_path: Path) -> None:
    assert run_script("train.py", "task_name=one").returncode == 0
    result = run_script("train.py", "trainer=ddp_sim", "task_name=two")
    assert result.returncode == 0, result.stderr
    (one,), (two,) = runs(tmp_path, "one"), runs(tmp_path, "two")  # both ranks share one folder
    assert last(two)["global_step"] == 6
    compare_weights(weights(one), weights(two))
    compare_weights(last(one)["tensors"]["ema"], last(two)["tensors"]["ema"])


def compare_weights(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        # Gradients are summed in another order, and Adam's first steps magnify the difference.
        torch.testing.assert_close(actual[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_ranks_stop_together(script: Callable[..., list[str]], tmp_path: Path) -> None:
    """SIGTERM to one process of two: both save, both end, and the run goes on."""
    command = [*script("train.py", *LONG, "trainer=ddp_sim", "trainer.max_steps=400"), "ckpt_path=last"]
    assert signalled(command, tmp_path, "logs/train/runs/*/checkpoints/last.ckpt", signal.SIGTERM) == 143
    (run,) = runs(tmp_path)
    assert 5 <= last(run)["global_step"] < 400


@pytest.mark.long
def test_multirun_over_residuals(run_script: Run, tmp_path: Path) -> None:
    names = ["mvsplit", "post_norm", "pre_norm", "layerscale", "rezero", "deepnorm", "channel_split"]
    result = run_script("train.py", "-m", f"residual={','.join(names)}", "trainer.max_steps=2")
    assert result.returncode == 0, result.stderr
    (sweep,) = (tmp_path / "logs" / "train" / "multiruns").iterdir()
    for number, name in enumerate(names):
        assert last(sweep / f"{number}_residual-{name}")["global_step"] == 2


@pytest.mark.long
def test_a_search_ends_with_its_table_and_the_best(run_script: Run, tmp_path: Path) -> None:
    result = run_script("train.py", "hparams_search=lr", "trainer.max_steps=3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run finished") == 3
    (file,) = tmp_path.glob("logs/train/multiruns/*/results.csv")
    with file.open() as table:
        rows = list(csv.DictReader(table))
    assert [row["optim.lr"] for row in rows] == ["0.001", "0.002", "0.004"]
    (best,) = (row for row in rows if row["best"] == "1")
    assert float(best["val/loss"]) == min(float(row["val/loss"]) for row in rows)
    assert f"optim.lr={best['optim.lr']}: val/loss = {best['val/loss']}, {best['folder']}\n" in result.stdout
    assert (Path(best["folder"]) / "config.yaml").exists()


@pytest.mark.slow
def test_a_job_that_fails_ends_neither_its_sweep_nor_the_table(run_script: Run, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folders = f"data.folder={tmp_path}/empty,{data_dir}/digits"
    result = run_script("train.py", "-m", folders, "data.prepare=null", "trainer.max_steps=3")
    assert result.returncode == 2
    assert re.fullmatch(r"error: data: no shards match 'train-\*\.tar' in .*/empty[^\n]*\n", result.stderr), (
        result.stderr
    )
    (file,) = tmp_path.glob("logs/train/multiruns/*/results.csv")
    with file.open() as table:
        rows = list(csv.DictReader(table))
    assert [(row["status"], row["best"]) for row in rows] == [("failed", "0"), ("finished", "1")]
    assert rows[1]["folder"] in result.stdout


@pytest.mark.long
def test_a_signal_before_training_ends_the_process(script: Callable[..., list[str]], tmp_path: Path) -> None:
    process = subprocess.Popen(script("train.py"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(1)  # still importing
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def write_bad_inputs(tmp_path: Path) -> None:
    (tmp_path / "corrupt.ckpt").write_bytes(os.urandom(1000))
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "foreign.ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    import io
    import tarfile

    (tmp_path / "unlabelled").mkdir()
    with tarfile.open(tmp_path / "unlabelled" / "train-0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 10
        tar.addfile(info, io.BytesIO(bytes(10)))


READ_ONLY = "/proc/logs" if os.geteuid() == 0 else "{tmp}/read_only"  # nothing is read-only to root, but /proc is
BAD_INPUTS = {
    "unknown key": (["model.deptth=3"], "model.deptth: unknown key; did you mean depth?"),
    "wrong value": (["residual.mean_update=leky"], "residual.mean_update = 'leky': must be"),
    "unknown option": (["residual=foo"], "Could not find 'residual/foo'; allowed: channel_split, deepnorm"),
    "missing file": (["ckpt_path={tmp}/none.ckpt"], "none.ckpt: no such file"),
    "corrupt checkpoint": (["ckpt_path={tmp}/corrupt.ckpt"], "corrupt.ckpt: not a checkpoint of this project"),
    "foreign checkpoint": (["ckpt_path={tmp}/foreign.ckpt"], "foreign.ckpt: not a checkpoint of this project"),
    "read-only log folder": ([f"paths.log_dir={READ_ONLY}"], "logs"),
    "log folder is a file": (["paths.log_dir={tmp}/file"], "Not a directory"),
    "empty shard list": (
        ["data.folder={tmp}/empty", "data.prepare=null"],
        "no shards match 'train-*.tar' in",
    ),
    "no class labels": (["data.folder={tmp}/unlabelled"], "sample 'a' has no class label"),
    "indivisible image": (["data.image_size=[9,8]"], "must divide the image size [9, 8]"),
    "no override": (["hello"], "hello: not a key=value override"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_ends_in_one_line(run_script: Run, tmp_path: Path, kind: str) -> None:
    write_bad_inputs(tmp_path)
    (tmp_path / "read_only").mkdir(mode=0o555)
    overrides, message = BAD_INPUTS[kind]
    result = run_script("train.py", *(o.format(tmp=tmp_path) for o in overrides))
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("name", ["sample.py", "eval.py"])
def test_bad_input_to_the_other_scripts(run_script: Run, tmp_path: Path, name: str) -> None:
    for overrides, message in (([], "train first or give a path"), (["sampler.solver=rk4"], "'heun' or 'multistep'")):
        result = run_script(name, *overrides)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert message in result.stderr


@pytest.mark.long
@pytest.mark.parametrize(("logger", "named"), [("tensorboard", "tfevents"), ("null", ".ckpt.partial")])
def test_a_run_folder_removed_in_mid_run_ends_it_in_one_line(
    script: Callable[..., list[str]], tmp_path: Path, logger: str, named: str
) -> None:
    command = script("train.py", *LONG, "trainer.max_steps=100000", "callbacks.sample_grid=null", f"logger={logger}")
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            if list(tmp_path.glob("logs/train/runs/*/checkpoints/last.ckpt")) or run.poll() is not None:
                break
            time.sleep(0.05)
        (tmp_path / "logs").rename(tmp_path / "gone")  # at once, where removing takes its time
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert named in errors


@pytest.mark.long
def test_an_interrupted_sweep_goes_on(script: Callable[..., list[str]], tmp_path: Path) -> None:
    command = script("train.py", "-m", "residual=mvsplit,rezero", *LONG, "ckpt_path=last")
    assert (
        signalled(command, tmp_path, "logs/train/multiruns/*/0_residual-mvsplit/checkpoints/last.ckpt", signal.SIGTERM)
        == 143
    )
    # Stopping means stopping: no validation, no pictures after the signal.
    (sweep,) = (tmp_path / "logs" / "train" / "multiruns").iterdir()
    jobs = [sweep / "0_residual-mvsplit", sweep / "1_residual-rezero"]
    stopped_at = last(jobs[0])["global_step"]
    assert stopped_at < 60
    assert not list((jobs[0] / "samples").glob(f"step_{stopped_at:08d}.png")) or stopped_at % 20 == 0
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert list((tmp_path / "logs" / "train" / "multiruns").iterdir()) == [sweep]
    assert [last(job)["global_step"] for job in jobs] == [60, 60]
