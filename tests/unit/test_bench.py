"""The benchmarks run at a tiny size and yield every figure; speed is only asserted with wide margins."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SRC, compose_config

import bench
from mvsplit.benchmarks import ablation, common, data, depth, monitor_cost, step_cost, synthetic_sets
from mvsplit.benchmarks.gpu import frame
from mvsplit.benchmarks.saving import TimedSaver, summarise
from mvsplit.data.order import StreamOrder
from mvsplit.kernels.merge_norm import merge_norm_reference
from mvsplit.utils.allowed import OwnersList
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.errors import UserError

TINY = [
    "rounds=1", "seconds=0.01", "workers=[0,1]", "images.samples=12", "images.shard_size=6", "images.batch_size=4",
    "images.picture_size=[48,64]", "images.image_size=[32,32]", "latents.samples=64", "latents.shard_size=16",
    "latents.shape=[4,8,8]", "latents.batch_size=8", "resume.shards=6", "resume.shard_size=8", "resume.batch_size=4",
    "permutation=1000", "latents.flip=false", "training.steps=4", "training.batch_size=4",
    'training.overrides=["model=tiny"]',
]  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


def numbers(tree: Any) -> Iterator[float]:
    for value in tree.values() if isinstance(tree, dict) else [tree]:
        yield from numbers(value) if isinstance(value, dict) else [value]


@pytest.mark.long
def test_all_figures_are_there_and_nothing_is_left(run_script: Run, tmp_path: Path, monkeypatch: Any) -> None:
    short = tempfile.mkdtemp(dir="/tmp")  # reading processes put sockets there, whose paths must be short
    monkeypatch.setenv("TMPDIR", short)
    done = run_script("bench.py", "data", *TINY)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("logs/bench_data/runs/*/bench_data.json")
    result = json.loads(file.read_text())
    assert set(result) == {
        "machine", "samples_per_s", "ratio", "first_batch_s", "resume_ratio", "permutation_s", "data_wait_share"
    }  # fmt: skip
    readers = {"latents": {"ours", "webdataset"}, "images": {"ours", "webdataset", "image_folder"}}
    for name, expected in readers.items():
        speeds, ratios = result["samples_per_s"][name], result["ratio"][name]
        assert set(speeds["0"]) == expected | {"tar"}
        assert set(speeds["1"]) == expected
        assert {workers: set(ratios[workers]) for workers in ratios} == {
            workers: set(speeds[workers]) - {"ours"} for workers in ("0", "1")
        }
    assert set(result["first_batch_s"]) == {"indexing", "fresh", "resumed_10", "resumed_90"}
    del result["machine"]
    assert all(math.isfinite(value) and value > 0 for value in numbers(result))
    assert result["data_wait_share"] < 1
    assert not list(Path(short).glob("mvsplit_bench_*"))
    shutil.rmtree(short)
    for part in ("ImageFolder", "tar alone", "resumed at 90 %", "share of a step"):
        assert part in done.stdout


def test_an_unknown_benchmark_is_reported_in_one_line() -> None:
    command = [sys.executable, str(SRC / "bench.py"), "memry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    names = "data, depth, gpu, kernels, memory, precision, sampling, save, stability, step"
    allowed = f"allowed: {names}, as in `python src/bench.py data`"
    assert (done.returncode, done.stderr) == (2, f"error: benchmark = memry: unknown; {allowed}\n")
    with pytest.raises(UserError, match="benchmark: missing; allowed: data"):
        bench.split_command(["bench.py", "rounds=1"])
    assert bench.split_command(["bench.py", "-m", "data", "rounds=1"]) == ("data", ["bench.py", "-m", "rounds=1"])


@pytest.mark.long
def test_depth_is_measured_by_real_runs(run_script: Run, data_dir: Path, tmp_path: Path) -> None:
    tiny = ["depths=[2,4]", "steps=3", "rounds=1", f"paths.data_dir={data_dir}"]
    done = run_script("bench.py", "depth", *tiny)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("logs/bench_depth/runs/*/bench_depth.json")
    result = json.loads(file.read_text())
    for strategy in ("deepspeed", "ddp"):
        assert set(result["runs"][strategy]) == {"2", "4"}
        assert all(math.isfinite(value) and value > 0 for value in numbers(result["runs"][strategy]))
    assert set(result["holds"]) == {"build_linear", "step_linear", "no_slow_step", "near_ddp"}
    failed = run_script("bench.py", "depth", *tiny, 'overrides=["model.depht=1"]')
    assert failed.returncode == 2
    assert "did you mean depth?" in failed.stderr


def test_limits_of_depth_are_checked() -> None:
    def run(build_s: float, step_s: float, worst: float = 1.0) -> dict[str, float]:
        return {"build_s": build_s, "step_s": step_s, "worst": worst}

    limits = {"growth": 1.2, "spread": 2.0, "ddp": 2.5}
    linear = {"deepspeed": {"100": run(2, 1), "200": run(3, 2.2)}, "ddp": {"100": run(1, 0.5), "200": run(1, 1)}}
    assert all(depth.check_limits(linear, limits).values())
    quadratic = {"deepspeed": {"100": run(1, 1), "200": run(4, 4, 3)}, "ddp": {"100": run(1, 1), "200": run(1, 1)}}
    assert not any(depth.check_limits(quadratic, limits).values())


def test_its_config_is_checked() -> None:
    check_config(to_plain(compose_config("paths.output_dir=/nowhere", name="bench_data.yaml")), data.Config)
    for wrong in ("rounds=0", "workers=[]", "latents.shape=[4,8]", "images.samples=no"):
        config = to_plain(compose_config("paths.output_dir=/nowhere", wrong, name="bench_data.yaml"))
        with pytest.raises(UserError, match=wrong.partition("=")[0].replace(".", r"\.")):
            check_config(config, data.Config)


def test_made_data_are_kept_and_used_again(tmp_path: Path) -> None:
    folder = synthetic_sets.write_set(tmp_path / "set", synthetic_sets.jpegs(5, [30, 40], seed=0), 5, shard_size=2)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == [f"train-{i:06d}.tar" for i in range(3)]
    again = synthetic_sets.write_set(tmp_path / "again", synthetic_sets.jpegs(5, [30, 40], seed=0), 5, shard_size=2)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first  # by the seed
    assert synthetic_sets.write_set(folder, iter(()), 5, shard_size=2) == folder


def test_an_epoch_of_imagenet_is_ordered_in_a_fifth_of_a_second() -> None:
    assert data.best_of_5(lambda: StreamOrder(1_281_167, 0).epoch(0)) < 0.5


def test_latents_are_read_faster_than_by_plain_webdataset(tmp_path: Path) -> None:
    changes = ["latents.samples=1000", "latents.shard_size=250", "rounds=3", "seconds=0.2", "workers=[0]"]
    config = to_plain(compose_config("paths.output_dir=/nowhere", *changes, name="bench_data.yaml"))
    ratios = data.race(
        "latents", synthetic_sets.latent_set(tmp_path, "latents", config["latents"], config["seed"]), 0, config
    )[1]
    assert ratios["webdataset"]["max"] >= 1.5  # 4 on an idle machine


@pytest.mark.long
def test_the_cost_of_monitoring_is_measured(run_script: Run, tmp_path: Path) -> None:
    tiny = ["steps=18", "limits.cheap=1e9", "limits.full=1e-9", 'overrides=["model=tiny","data.batch_size=4"]']
    done = run_script("bench.py", "stability", *tiny)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("logs/bench_stability/runs/*/bench_stability.json")
    result = json.loads(file.read_text())
    assert all(result[f"{name}_s"] > 0 for name in ("without", "cheap", "full", "drawing"))
    assert result["full_s"] > result["without_s"]
    assert result["holds"] == {"cheap": True, "full": result["full_share"] <= 1e-9}
    seconds = {"without": [1.0] * 9, "cheap": [1.02] * 9, "full": [1.5] * 9}
    found = monitor_cost.shares(seconds, [2.0] * 9, every=100, images_every=10)
    assert found["cheap_share"] == pytest.approx(0.02)
    assert found["full_share"] == pytest.approx(0.02 + 0.48 / 100 + 2 / 1000)


@pytest.mark.slow
def test_each_optimisation_of_a_step_is_timed_against_plain_eager(run_script: Run, tmp_path: Path) -> None:
    tiny = ["depths=[2,4]", "width=16", "num_heads=2", "batch_size=4", "sampled=2", "rounds=1"]
    done = run_script("bench.py", "step", *tiny)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("logs/bench_step/runs/*/bench_step.json")
    result = json.loads(file.read_text())
    ways = ["plain eager", "compiled block"]
    expected = {(depth, "train", way + end) for depth in (2, 4) for way in ways for end in ("", ", recomputed")}
    expected |= {(depth, "sample", way) for depth in (2, 4) for way in ways}
    assert {(row["blocks"], row["kind"], row["way"]) for row in result["steps"]} == expected
    for row in result["steps"]:
        assert row["ms_per_block"] == pytest.approx(1e3 * row["seconds"] / row["blocks"])
        assert row["ratios"][0] <= row["ratio"] <= row["ratios"][1]
        if row["way"].startswith("plain"):
            assert row["ratio"] == 1


@pytest.mark.long
def test_the_time_to_compile_does_not_grow_with_depth() -> None:
    changes = ["width=16", "num_heads=2", "batch_size=4", "sampled=2"]
    config = to_plain(compose_config("paths.output_dir=/nowhere", *changes, name="bench_step.yaml"))
    few, many = (step_cost.compile_seconds(config, depth) for depth in (2, 100))
    assert 1 < many < 2 * few  # 1.2 on an idle machine


def slow_merge(x: Any, update: Any, alpha: Any, beta: Any, segments: tuple[int, ...], eps: float) -> Any:
    return merge_norm_reference(x, update, alpha, beta, segments, eps)


@pytest.mark.slow
def test_operations_are_timed_against_a_copy_and_against_another_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "owners_list", lambda: OwnersList(targets=[f"{__name__}.slow_merge"]))
    changes = [
        "widths=[16]",
        "num_heads=2",
        "segments=[5,0]",
        "batch_size=2",
        "rounds=2",
        f"against={__name__}:slow_merge",
    ]
    cfg = compose_config(f"paths.output_dir={tmp_path}", *changes, name="bench_kernels.yaml")
    result = bench.bench("kernels", cfg)
    forms = {(row["operation"], row["form"]) for row in result["kernels"]}
    plain = {(op, form) for op in ("merge_norm", "rope_norm", "swiglu") for form in ("plain", "plain, compiled")}
    assert forms == plain | {("merge_norm", f"{__name__}:slow_merge")}
    assert all(row["forward_share"] > 0 and row["backward_share"] > 0 for row in result["kernels"])
    assert result["offline"], "compiled for a GPU that is not there"
    assert all(row["spills"] == 0 for row in result["offline"])
    assert json.loads((tmp_path / "bench_kernels.json").read_text())["settings"] == result["settings"]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("gpu", "again=foo", "again = 'foo': must be a boolean, 'failed' or a list"),
        ("gpu", "strategies=null", "strategies = None: must be a group of keys"),
        ("gpu", "limit_s=null", "limit_s = None: must be a number"),
        ("memory", "table=null", "table = None: must be a group of keys"),
        ("memory", "model.depth=1000000000000", "model.depth = 1000000000000: must be at most 100000"),
        ("memory", "model.width=1000000000000", "model.width = 1000000000000: must be at most 1000000"),
        (
            "memory",
            "module=classifier",
            "module = mvsplit.training.classifier.ClassifierModule: memory can only be planned",
        ),
        ("memory", "table.depths=[10000000000]", "table.depths = [10000000000]: must be less than or equal to 100000"),
        ("precision", "limits=null", "limits = None: must be a group of keys"),
        ("precision", "width=30", "width = 30: must be divisible by num_heads = 4"),
        ("step", "width=30", "width = 30: must be divisible by num_heads = 4"),
        ("step", "device=cuda", "device = cuda: this machine has no usable GPU; use auto or cpu"),
        ("step", "against=os:system", "against = os:system: must be in configs/local/allowed.yaml, as os.system"),
        ("step", "against=merge", "against = merge: must be package.module:function"),
        ("kernels", "widths=[1024,36]", "widths = 36: must be divisible by 4 · num_heads = 32"),
        ("kernels", "segments=[0,0]", "segments = [0, 0]: must contain a token"),
        ("kernels", "against=os:system", "against = os:system: must be in configs/local/allowed.yaml, as os.system"),
    ],
)
def test_wrong_keys_of_benchmarks_are_reported_with_their_names(name: str, wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        bench.check(name, compose_config("paths.output_dir=/nowhere", wrong, name=f"bench_{name}.yaml"))
    assert str(caught.value).startswith(message)


def test_a_folder_that_cannot_be_created_is_reported_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^folder = .*file: cannot be created \(Not a directory\)$"):
        frame.own_folder(tmp_path / "file" / "device")
    config = to_plain(compose_config(f"folder={tmp_path}/file/x", "paths.output_dir=/nowhere", name="ablate.yaml"))
    with pytest.raises(UserError, match=r"^folder = .*x: cannot be created \(Not a directory\)$"):
        ablation.run_all(config, ablation.all_runs(config), lambda *_: {}, lambda *_: {})


def test_the_pause_of_a_save_is_a_median_without_the_first() -> None:
    saver = TimedSaver(folder="none")
    saver.pauses = {"background": [90.0, 1.0, 2.0, 3.0], "foreground": [8.0, 10.0, 30.0]}
    saver.steps = {"alone": [50.0, 2.0, 2.0], "beside a write": [3.0, 3.0]}
    saver.bytes = 2**29
    assert summarise(saver) == {
        "gib": 0.5, "step_s": 2.0, "background_s": 2.0, "foreground_s": 10.0, "pause_ratio": 0.2, "slowdown": 1.5,
    }  # fmt: skip
