"""ZeRO-3, really: who moves the module when, and where an offloaded optimiser's gradients are looked at."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SUPPORT

WORKER = SUPPORT / "device_worker.py"


@pytest.mark.long
def test_zero3_places_the_module_and_looks_at_gradients_where_they_lie(
    script: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = script(
        "train.py", "trainer=deepspeed_offload", "trainer.accelerator=cpu", "trainer.devices=1",
        "module._target_=device_worker.Recorded", "+callbacks.recorder={_target_:device_worker.Recorder}",
    )  # fmt: skip
    file = tmp_path / "record.json"
    done = subprocess.run(
        [command[0], str(WORKER), *command[2:]], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"RECORD": str(file)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(file.read_text())
    # Lightning takes the module away after each: the test would find it in host memory.
    assert record["moves"] == [["fit", "cpu"], ["fit", "taken away"], ["test", "cpu"], ["test", "taken away"]]
    assert record["norm"] == pytest.approx(record["expected"], rel=1e-6)
    assert record["norms"] == pytest.approx(record["expected"], rel=1e-6)
    assert record["rows"] == pytest.approx(record["expected_rows"], rel=1e-6)
