"""The planner against the peak of a real run."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "recomputed", "batch_kept"),
    [
        (["trainer=cpu", "model.depth=16", "data.batch_size=64"], 0, True),
        pytest.param(
            ["trainer=ddp_sim", "model.depth=24", "data.batch_size=32", "model.checkpointing.every=4"],
            24,
            False,
            marks=pytest.mark.long,
        ),
    ],
    ids=["one process, all kept", "two processes, recomputed"],
)
def test_planned_is_measured(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    data_dir: Path,
    overrides: list[str],
    recomputed: int,
    batch_kept: bool,
) -> None:
    common = ["data=digits", "model=digits", "model.width=256", f"paths.data_dir={data_dir}", "measure=true"]
    done = run_script("bench.py", "memory", *common, *overrides)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("logs/bench_memory/runs/*/bench_memory.json")
    result = json.loads(file.read_text())
    assert result["recomputed"] == recomputed
    assert result["gib"]["total"] > 0.4  # what is planned is no small part of it
    assert result["measured_gib"] == pytest.approx(result["planned_gib"], rel=0.1)
    beside_the_process = result["measured_gib"] - result["base_gib"]
    assert beside_the_process == pytest.approx(result["gib"]["total"], rel=0.25)
    assert (result["gib"]["activations"] > 0.5) == batch_kept
    assert "planned / measured" in done.stdout
