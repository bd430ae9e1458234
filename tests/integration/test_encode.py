"""src/encode.py as users start it: killed, resumed, and its output used for training."""

import functools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import compose_config

import encode
from mvsplit.utils.errors import UserError

KEYS = ["data=digits", "kind=latents", "autoencoder=tiny", "shard_size=6", "batch_size=4"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def encode_into(folder: Path, data_dir: Path, *overrides: str, output: str = "out") -> Path:
    paths = [f"paths.data_dir={data_dir}", f"paths.output_dir={folder}", f"output={folder}/{output}"]
    return encode.encode(compose_config(*KEYS, *paths, *overrides, name="encode.yaml"))


@pytest.fixture
def encode_here(data_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    return functools.partial(encode_into, tmp_path, data_dir)


@pytest.fixture(scope="module")
def whole(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' latents, written by this process, without interruption."""
    return encode_into(tmp_path_factory.mktemp("whole"), data_dir)


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


@pytest.mark.long
def test_killed_again_and_again_it_ends_with_the_very_files(
    script: Callable[..., list[str]], data_dir: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "out"
    command = [*script("encode.py", *KEYS), f"paths.data_dir={data_dir}", f"output={out}", "num_processes=2"]
    rng = random.Random(0)
    reached = []
    for kill in range(4):
        before = len(list(out.glob("*.tar")))
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # Every other one at any time of the start, the rest while shards are written.
        starting, until = kill % 2 == 1, time.monotonic() + rng.uniform(0.5, 5)
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
    assert 5 < reached[-1] < 300
    time.sleep(0.5)
    assert not processes_of(out)  # the workers have gone with the main process
    final = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert final.returncode == 0, final.stdout + final.stderr
    assert "of 300 shards already exist" in final.stdout
    mine, theirs = files(out), files(whole)
    assert len([name for name in mine if name.endswith(".tar")]) == 300
    assert [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)] == []


def test_an_error_in_one_process_ends_all_with_its_line(
    run_script: Callable[..., subprocess.CompletedProcess[str]], data_dir: Path, tmp_path: Path
) -> None:
    (blocked := tmp_path / "out" / ".encode" / "train-000001.tar.safetensors").mkdir(parents=True)  # cannot be written
    paths = [f"paths.data_dir={data_dir}", f"output={tmp_path}/out"]
    result = run_script("encode.py", "data=digits", *paths, "shard_size=100", "num_processes=2")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {blocked}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_defect_or_a_death_in_one_process_ends_all(encode_here: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="to have 4 channels") as caught:
        encode_here("num_processes=2", "data.channels=3", "autoencoder.channels=1", output="defect")
    assert "conv2d" in str(caught.value.__cause__)  # the worker's own traceback

    def kill_one() -> None:
        while not list((tmp_path / "killed").glob("*.tar")):
            time.sleep(0.005)
        (server,) = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
        server.children()[0].kill()

    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(UserError, match="num_processes: a worker process was killed"):
        encode_here("num_processes=2", "shard_size=2", output="killed")
    thread.join()
    assert not processes_of(tmp_path / "killed")


@pytest.mark.long
def test_ctrl_c_ends_all_processes_at_once(script: Callable[..., list[str]], data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*script("encode.py", *KEYS), f"paths.data_dir={data_dir}", f"output={out}", "num_processes=2"]
    process = subprocess.Popen(
        [*command, "shard_size=1"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while len(list(out.glob("*.tar"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not processes_of(out)
    assert not (out / "train.manifest.json").exists()


def test_a_latent_set_trains(train_here: Callable[..., tuple[dict[str, float], dict[str, Any]]], whole: Path) -> None:
    sizes = ["data.channels=4", "data.image_size=[4,4]", "data.num_classes=10", "data.num_workers=0"]
    metrics, objects = train_here("data=imagenet_latents", f"data.folder={whole}", *sizes)
    assert objects["trainer"].global_step == 6
    assert 0.1 < metrics["val/loss"] < 10
    assert len(objects["datamodule"].space.mean) == 4
