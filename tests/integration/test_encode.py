"""src/encode.py as users start it, killed as it happens, and what it wrote trained on."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config

import encode

KEYS = ["data=digits", "kind=latents", "autoencoder=tiny", "shard_size=6", "batch_size=4"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' latents, written in one go by one process: this."""
    folder = tmp_path_factory.mktemp("whole")
    paths = [f"paths.data_dir={data_dir}", f"paths.output_dir={folder}", f"output={folder}/out"]
    return encode.encode(compose_config(*KEYS, *paths, name="encode.yaml"))


def processes_of(folder: Path) -> list[int]:
    """Processes with a file open in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd).startswith(str(folder)) for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_killed_ten_times_it_ends_with_the_very_files(
    script: Callable[..., list[str]], data_dir: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "out"
    command = [*script("encode.py", *KEYS), f"paths.data_dir={data_dir}", f"output={out}", "num_processes=2"]
    rng = random.Random(0)
    reached = []
    for kill in range(10):
        before = len(list(out.glob("*.tar")))
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # Four at any time of the start, the others while shards are written.
        starting, until = kill in (1, 3, 6, 8), time.monotonic() + rng.uniform(0.5, 5)
        while time.monotonic() < until if starting else len(list(out.glob("*.tar"))) < before + 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1) * (not starting))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "train.manifest.json").exists()
        reached.append(len(list(out.glob("*.tar"))))
    assert reached == sorted(reached)
    assert 20 < reached[-1] < 300
    time.sleep(0.5)
    assert not processes_of(out)  # the workers have gone with the main process
    final = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert final.returncode == 0, final.stdout + final.stderr
    assert "of 300 shards are there already" in final.stdout
    mine, theirs = files(out), files(whole)
    assert len([name for name in mine if name.endswith(".tar")]) == 300
    assert [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)] == []


def test_an_error_in_one_process_ends_all_with_its_line(
    run_script: Callable[..., subprocess.CompletedProcess[str]], data_dir: Path, tmp_path: Path
) -> None:
    overrides = ["data=digits", f"paths.data_dir={data_dir}", f"output={tmp_path}/out", "num_processes=2"]
    tiny = ["kind=latents", "autoencoder=tiny", "autoencoder.channels=1", "data.channels=3"]
    result = run_script("encode.py", *overrides, *tiny, "shard_size=100")
    assert result.returncode not in (0, 2)  # a defect keeps its traceback
    assert "in a process of its own:" in result.stderr
    assert "pixel_unshuffle" in result.stderr or "conv2d" in result.stderr
    (tmp_path / "out").joinpath("train-000000.tar").mkdir()  # cannot be written
    result = run_script("encode.py", *overrides, *tiny[:2], "shard_size=100", f"output={tmp_path}/out")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_latent_set_trains(train_here: Callable[..., tuple[dict[str, float], dict[str, Any]]], whole: Path) -> None:
    sizes = ["data.channels=4", "data.image_size=[4,4]", "data.num_classes=10", "data.num_workers=0"]
    metrics, objects = train_here("data=imagenet_latents", f"data.folder={whole}", *sizes)
    assert objects["trainer"].global_step == 6
    assert 0.1 < metrics["val/loss"] < 10
    assert objects["datamodule"].format.statistics is not None
