"""Sweeps by plugins of Hydra: Optuna chooses the trials, submitit starts the jobs, in SLURM's stand-in too."""

import csv
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = [
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "callbacks.sample_grid=null",
    "callbacks.monitor=null",
]


def results(tmp_path: Path) -> list[dict[str, str]]:
    (file,) = tmp_path.glob("logs/train/multiruns/*/results.csv")
    with file.open() as table:
        return list(csv.DictReader(table))


@pytest.mark.slow
def test_optuna_chooses_four_trials_and_names_the_best(run_script: Run, tmp_path: Path) -> None:
    result = run_script("train.py", "hparams_search=optuna", *SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = results(tmp_path)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert len({row["optim.lr"] for row in rows}) == 4
    assert all(1e-3 <= float(row["optim.lr"]) <= 8e-3 for row in rows)
    (best,) = (row for row in rows if row["best"] == "1")
    assert float(best["val/loss"]) == min(float(row["val/loss"]) for row in rows)
    assert f"val/loss = {best['val/loss']}, {best['folder']}\n" in result.stdout


@pytest.mark.long
def test_a_wrong_trial_is_refused_before_a_folder_is_made(run_script: Run, tmp_path: Path) -> None:
    result = run_script("train.py", "hparams_search=optuna", "model.depth=0")
    assert result.returncode == 2
    assert result.stderr == "error: model.depth = 0: must be greater than 0\n"
    assert not (tmp_path / "logs").exists()


@pytest.mark.long
def test_submitit_starts_a_process_per_job(run_script: Run, tmp_path: Path) -> None:
    """The second job fails by a user's mistake, which its process reports."""
    (tmp_path / "empty").mkdir()
    jobs = ["seed=0", f"data.folder=${{paths.data_dir}}/digits,{tmp_path}/empty", "data.prepare=null"]
    result = run_script("train.py", "-m", "hydra/launcher=submitit_local", *jobs, *SHORT)
    assert result.returncode == 2, result.stderr
    assert [(row["status"], row["best"]) for row in results(tmp_path)] == [("finished", "1"), ("failed", "0")]
    (sweep,) = (tmp_path / "logs" / "train" / "multiruns").iterdir()
    assert sorted(path.name for path in sweep.glob("[01]_*")) == sorted(
        Path(row["folder"]).name for row in results(tmp_path)
    )
    logs = [file.read_text() for file in sorted(sweep.glob(".submitit/*/*_log.err"))]
    assert "no shards match 'train-*.tar'" in logs[-1]
    assert list(tmp_path.rglob("*.pkl"))
    assert all(".submitit" in path.parts for path in tmp_path.rglob("*.pkl"))


SLURM = {
    "sbatch": """#!/bin/sh
cp "$1" SCRIPT
for task in 0 1; do
    export SLURM_JOB_ID=8$task SLURM_ARRAY_JOB_ID=8 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1
    SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 setsid bash SCRIPT > OUTPUT 2>&1 &
done
echo "Submitted batch job 8"
""",
    "srun": """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
    case "$1" in --output|--error) shift 2;; *) shift;; esac
done
exec "$@"
""",
    "sacct": "#!/bin/sh\nprintf 'JobID|State|NodeList\\n8_0|RUNNING|a\\n8_1|RUNNING|a\\n'\n",
}
"""Stand-ins for SLURM's commands: one array of two jobs, run at once."""


@pytest.mark.long
def test_submitit_hands_jobs_to_slurm(run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(
            text.replace("SCRIPT", f"{tmp_path}/batch.sh").replace("OUTPUT", f"{tmp_path}/slurm.out")
        )
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    options = ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=90"]
    result = run_script("train.py", "-m", "hydra/launcher=submitit_slurm", *options, "seed=0,1", *SHORT)
    assert result.returncode == 0, result.stderr
    header = [line for line in (tmp_path / "batch.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    for line in ("--array=0-1%2", "--partition=gpu", "--gpus-per-node=1", "--time=90"):
        assert f"#SBATCH {line}" in header
    assert [(row["seed"], row["status"]) for row in results(tmp_path)] == [("0", "finished"), ("1", "finished")]


@pytest.mark.long
def test_without_slurm_one_line_says_what_to_use(run_script: Run, tmp_path: Path) -> None:
    result = run_script("train.py", "-m", "hydra/launcher=submitit_slurm", "seed=0,1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: hydra/launcher = submitit_slurm: this machine has no srun;")
    assert result.stderr.count("\n") == 1
    result = run_script("train.py", "-m", "hydra/launcher=submitit_local", "seed=0,1", "trainer=ddp_sim")
    assert result.stderr == (
        "error: trainer.devices = 2: must be 1; hydra/launcher=submitit_local runs a process per job\n"
    )
    assert not (tmp_path / "logs").exists()
