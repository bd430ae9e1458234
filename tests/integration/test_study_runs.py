"""src/study.py as users start it: interrupted, resumed, with runs of several processes, and reported."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = [
    "model.width=16", "model.num_heads=2", "data.batch_size=8", "trainer.accelerator=cpu", "logger=null",
    "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "callbacks=metrics", "sampler.steps=2",
    "callbacks.metrics.num_samples=20", "callbacks.metrics.every_n_steps=1000000", "callbacks.time_probe=null",
    "callbacks.sample_grid=null", "callbacks.checkpoint=null", "callbacks.stop_signals=null", "data.num_workers=1",
]  # fmt: skip
METHODS = {"siamese_norm": ["residual=siamese_norm", "trainer=ddp_sim"]}
RUNS = {f"depth_{depth}/siamese_norm/rate_1/seed_3" for depth in (1, 2)}


@pytest.mark.slow
def test_an_interrupted_study_of_depth_resumes_and_is_reported(
    script: Callable[..., list[str]], data_dir: Path, tmp_path: Path
) -> None:
    methods = re.sub(r'"(\w+)": ', r"\1:", json.dumps(METHODS))  # Hydra's keys are not quoted
    call = script(
        "study.py", "depth", f"overrides={json.dumps(TINY)}", "~methods", f"+methods={methods}", "depths=[1,2]",
        "steps=4", "equal_compute=null", "rates=[1]", "seeds=[3]", f"folder={tmp_path}/out", "processes=1",
        f"paths.data_dir={data_dir}",
    )  # fmt: skip

    def results() -> dict[str, int]:
        found = (tmp_path / "out").rglob("result.json")
        return {str(file.parent.relative_to(tmp_path / "out")): file.stat().st_mtime_ns for file in found}

    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 200
    try:
        while not results():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert f"`python src/study.py report {tmp_path}/out` reports on finished runs" in said
    before = results()
    assert 0 < len(before) < len(RUNS)
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"study            {len(before)} runs finished, at most {len(RUNS) - len(before)} left; 1 at once"
        in done.stdout
    )
    after = results()
    assert set(after) == RUNS
    assert before.items() <= after.items()  # none was trained twice
    found = json.loads((tmp_path / "out" / "depth_2/siamese_norm/rate_1/seed_3/result.json").read_text())["metrics"]
    assert {"test/loss", "sample/fid", "sample/is", "sample/recognised", "sample/seconds"} <= found.keys()
    assert found["sample/seconds"] > 0
    log = (tmp_path / "out" / "depth_2/siamese_norm/rate_1/seed_3/log.txt").read_text()
    assert "running on       2 CPU processes" in log
    table = (tmp_path / "out" / "report" / "report.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| siamese_norm")]
    assert [row[1:3] for row in rows] == [["1", "4"], ["2", "4"]]
    assert "At equal steps (4)" in done.stdout
