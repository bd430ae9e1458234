"""Whole sets of samples as users draw them: on several processes, killed, from every kind of checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import compose_config
from PIL import Image
from safetensors import safe_open

import convert
import sample
from mvsplit.data.shard_set import ShardSet
from mvsplit.evaluation.sample_set import SampleSet, choose_labels
from mvsplit.utils.errors import UserError

SET = ["num_samples=64", "batch_size=6", "sampler.steps=3", "weights=raw"]
Script = Callable[..., subprocess.CompletedProcess[str]]
Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]


def files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".lock")}


@pytest.fixture
def run_folder(train_here: Train, tmp_path: Path) -> Path:
    """A run of two large steps: the network is no longer the zero that it begins as."""
    train_here("trainer.max_steps=2", "optim.warmup_steps=1", "optim.lr=0.05")
    return tmp_path / "run"


@pytest.fixture
def sample_here(tmp_path: Path) -> Callable[..., Path]:
    """`sample_here(name, *overrides)`: draw a set in this process, and return its folder."""

    def run(name: str, *overrides: str) -> Path:
        (tmp_path / "out").mkdir(exist_ok=True)
        paths = [f"paths.output_dir={tmp_path}/out", f"paths.log_dir={tmp_path}/logs", f"output={tmp_path}/{name}"]
        config = compose_config(*SET, "trainer.accelerator=cpu", *paths, *overrides, name="sample.yaml")
        sample.sample(config)
        return tmp_path / name

    return run


def test_a_plain_numpy_script_reads_what_was_drawn(
    run_folder: Path, sample_here: Callable[..., Path], tmp_path: Path
) -> None:
    folder = sample_here("set", f"ckpt_path={run_folder}", "format=npz")
    code = """
import sys, numpy
with numpy.load(sys.argv[1]) as file:
    images, labels = file["arr_0"], file["arr_1"]
print(images.dtype, images.shape, labels.dtype, labels.tolist())
numpy.save(sys.argv[2], images)
"""
    read = [sys.executable, "-I", "-c", code, str(folder / "samples.npz"), str(tmp_path / "read.npy")]
    printed = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert printed.split("int64")[0] == "uint8 (64, 8, 8, 1) "
    assert json.loads(printed.split("int64")[1]) == [i % 10 for i in range(64)]
    images = np.load(tmp_path / "read.npy")
    assert images.std() > 20
    for form in ("png", "shards"):
        assert sample_here("set", f"ckpt_path={run_folder}", f"format={form}") == folder
    pngs = sorted((folder / "png").iterdir())
    assert [p.name for p in pngs[:2]] == ["000000_class_0.png", "000001_class_1.png"]
    assert all(np.array_equal(np.asarray(Image.open(p)), image[..., 0]) for p, image in zip(pngs, images, strict=True))
    assert sorted(p.name for p in (folder / "shards").glob("*.tar")) == ["samples-000000.tar"]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["num_samples"] == 64
    assert settings["sampler"] == {
        "solver": "euler", "steps": 3, "cfg_scale": 2.0, "cfg_interval": None, "time_shift": 1.0, "guide": None,
    }  # fmt: skip
    assert {"seed", "labels", "weights", "precision", "network", "autoencoder", "versions"} <= settings.keys()


def test_exported_shards_are_a_data_set(run_folder: Path, sample_here: Callable[..., Path], tmp_path: Path) -> None:
    from data_tools import datamodule

    folder = sample_here("set", f"ckpt_path={run_folder}", "format=shards", "labels=random")
    data = datamodule(folder / "shards", tmp_path, train="samples-*.tar", val="samples-*.tar")
    assert isinstance(data.shards["train"], ShardSet)
    found = list(data.batches("val"))
    images = torch.cat([batch["image"][batch["weight"] > 0] for batch in found])
    drawn = torch.cat(list(SampleSet(folder, json.loads((folder / "settings.json").read_text())).batches()))
    assert torch.equal(((images + 1) * 127.5).round(), drawn.float())
    labels = torch.cat([batch["label"][batch["weight"] > 0] for batch in found])
    assert torch.equal(labels, choose_labels(0, torch.arange(64), list(range(10)), "random"))


def test_labels_are_equally_frequent_or_drawn_evenly() -> None:
    index = torch.arange(50_000)
    equal = choose_labels(0, index, list(range(1000)), "equal")
    assert (torch.bincount(equal) == 50).all()
    drawn = choose_labels(0, index, list(range(1000)), "random")
    counts = torch.bincount(drawn, minlength=1000).double()
    assert abs(float(counts.var() / counts.mean()) - 1) < 0.15  # as of independent draws
    assert set(choose_labels(1, index, [3, 7], "random").tolist()) == {3, 7}
    assert torch.equal(choose_labels(0, index[40:60], list(range(1000)), "random"), drawn[40:60])


def test_a_converted_file_gives_the_same_files(
    run_folder: Path, sample_here: Callable[..., Path], tmp_path: Path
) -> None:
    whole = files(sample_here("whole", f"ckpt_path={run_folder}"))
    file = tmp_path / "model.safetensors"
    (tmp_path / "convert").mkdir()
    keys = [f"ckpt_path={run_folder}", "weights=[raw]", f"output={file}", f"paths.output_dir={tmp_path}/convert"]
    convert.main(compose_config(*keys, f"paths.log_dir={tmp_path}/logs", name="convert.yaml"))
    assert files(sample_here("converted", f"ckpt_path={file}")) == whole
    # bf16 weights are other settings, and other samples.
    with pytest.raises(UserError, match="precision = float32, not bfloat16"):
        sample_here("whole", f"ckpt_path={run_folder}", "precision=bfloat16")
    half = files(sample_here("half", f"ckpt_path={run_folder}", "precision=bfloat16"))
    assert half["parts/part-000000.safetensors"] != whole["parts/part-000000.safetensors"]


def test_two_processes_draw_what_one_draws(
    run_folder: Path, sample_here: Callable[..., Path], run_script: Script, tmp_path: Path
) -> None:
    whole = files(sample_here("whole", f"ckpt_path={run_folder}"))
    done = run_script("sample.py", *SET, f"ckpt_path={run_folder}", "trainer=ddp_sim", f"output={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == whole
    # Without `output` the folder follows from the settings: the same command finds its samples again.
    for _ in range(2):
        sample_here("whole", f"ckpt_path={run_folder}", "output=null")
        (place,) = (tmp_path / "logs" / "samples").iterdir()
        assert files(place) == whole
        for left in ("settings.json", "parts/part-000001.safetensors", "png/000000_class_0.png"):
            place.joinpath(f"{left}.4711.partial").touch()  # by a killed process


@pytest.mark.long
def test_killed_in_the_middle_it_redoes_no_batch(
    run_folder: Path,
    sample_here: Callable[..., Path],
    script: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    small = ["batch_size=2", "sampler.steps=20"]
    whole = files(sample_here("whole", f"ckpt_path={run_folder}", *small))
    out = tmp_path / "cut"
    command = script("sample.py", *SET, *small, f"ckpt_path={run_folder}", f"output={out}", "trainer=ddp_sim")
    stamps: dict[str, int] = {}
    for kill in range(3):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 120
        while len(list(out.glob("parts/*.safetensors"))) < 5 * (kill + 1):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.safetensors")}
        assert {name: now[name] for name in stamps} == stamps  # none was drawn again
        stamps = now
    assert 15 <= len(stamps) < 32
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in stamps} == stamps
    assert files(out) == whole


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp"])
def test_a_sharded_checkpoint_gives_the_same_files(
    run_folder: Path, sample_here: Callable[..., Path], run_script: Script, tmp_path: Path, strategy: str
) -> None:
    """The same weights, saved by two processes of a sharded strategy: a further step of a vanishing learning rate."""
    whole = files(sample_here("whole", f"ckpt_path={run_folder}"))
    keys = [f"trainer={strategy}", "trainer.devices=2", "trainer.max_steps=3", "optim.lr=1e-30", "task_name=sharded"]
    done = run_script("train.py", *keys, f"ckpt_path={run_folder}/checkpoints/last.ckpt")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "logs" / "sharded" / "runs").iterdir()
    sharded = files(sample_here("sharded", f"ckpt_path={run}"))
    settings = [json.loads(content.pop("settings.json")) for content in (whole, sharded)]
    names = [SampleSet.name(one).encode() for one in settings]
    assert [one["network"].pop("step") for one in settings] == [2, 3]
    assert settings[0] == settings[1]
    # Each part begins with the name of its set, which follows from the settings, the step among them.
    assert {name: content.replace(names[1], names[0]) for name, content in sharded.items()} == whole


def test_what_cannot_be_drawn_is_one_line(
    run_folder: Path, sample_here: Callable[..., Path], tmp_path: Path, train_here: Train
) -> None:
    given = f"ckpt_path={run_folder}"
    with pytest.raises(UserError, match=r"^classes = 10: must be in 0 … 9, the classes of the network$"):
        sample_here("set", given, "classes=[3,10]")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"^output = .*/other: contains other files; choose another folder$"):
        sample_here("other", given)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]
    folder = sample_here("set", given)
    with pytest.raises(UserError, match=r"^output = .*/set: contains samples with seed = 0, not 1; choose another"):
        sample_here("set", given, "seed=1")
    part = folder / "parts" / "part-000003.safetensors"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-000003\.safetensors: damaged .*; remove it, and the same command draws"):
        sample_here("set", given)
    other = (folder / "parts" / "part-000002.safetensors").read_bytes()
    part.write_bytes(other)
    with pytest.raises(UserError, match=r"-000003\.safetensors: damaged \(it belongs to another place or another set"):
        sample_here("set", given)
    with safe_open(folder / "parts" / "part-000002.safetensors", "pt") as file:
        place = file.metadata()["part_of"].rpartition(" ")[0] + " 3"
    large = {"images": torch.zeros(6, 3, 64, 64, dtype=torch.uint8), "labels": torch.zeros(6, dtype=torch.int64)}
    part.write_bytes(safetensors.torch.save(large, {"part_of": place}))
    with pytest.raises(UserError, match=r"damaged \(images of \[6, 3, 64, 64\], not \[6, 1, 8, 8\]\)"):
        sample_here("set", given)
    part.unlink()
    sample_here("set", given)
    (folder / "settings.json").write_text("[1]")
    with pytest.raises(UserError, match=r"settings\.json: damaged; remove it if"):
        sample_here("set", given)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output = .*/file: must be a folder$"):
        sample_here("file", given)
    with pytest.raises(UserError, match=r"^sampler\.guide = /nowhere: no such file or folder$"):
        sample_here("guided", given, "sampler.guide=/nowhere")
    train_here("trainer.max_steps=2", "data.image_size=[4,4]", "data.format.transform.flip=false", run="other_size")
    with pytest.raises(UserError, match=r"^sampler\.guide = .*: trained on other data than "):
        sample_here("guided", given, f"sampler.guide={tmp_path}/other_size")
    with pytest.raises(UserError, match=r"^sampler\.guide = x: only sample\.py and eval\.py load a guide"):
        train_here("sampler.guide=x")


def test_a_guide_changes_samples_only_where_it_differs(
    run_folder: Path, sample_here: Callable[..., Path], train_here: Train, tmp_path: Path
) -> None:
    """With itself as the guide any scale is no guidance; an earlier checkpoint is another guide."""
    none = sample_here("none", f"ckpt_path={run_folder}", "sampler.cfg_scale=1")
    guided = ["sampler.cfg_scale=3", f"sampler.guide={run_folder}"]
    own = sample_here("own", f"ckpt_path={run_folder}", *guided)
    for png in (none / "png").iterdir():
        images = [np.asarray(Image.open(path)).astype(int) for path in (png, own / "png" / png.name)]
        assert np.abs(images[0] - images[1]).max() <= 1  # rounding
    train_here("trainer.max_steps=6", "optim.warmup_steps=1", "optim.lr=0.05", run="longer")
    other = files(sample_here("other", f"ckpt_path={tmp_path}/longer", *guided))
    plain = files(sample_here("plain", f"ckpt_path={tmp_path}/longer", "sampler.cfg_scale=3"))
    assert json.loads(other["settings.json"])["sampler"]["guide"]["step"] == 2
    assert other["parts/part-000000.safetensors"] != plain["parts/part-000000.safetensors"]
