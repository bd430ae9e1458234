"""src/eval.py and the metrics callback: what they measure, against what, and what they record of it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import encode_png

import eval as evaluation
from mvsplit.data.digits import write_digits
from mvsplit.evaluation.image_files import open_images
from mvsplit.evaluation.npz_files import write_npz
from mvsplit.utils.errors import UserError

Script = Callable[..., subprocess.CompletedProcess[str]]
Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]
Eval = Callable[..., dict[str, float]]


@pytest.fixture
def eval_here(tmp_path: Path, data_dir: Path) -> Eval:
    """`eval_here(*overrides)`: evaluate in this process; the metrics."""

    def run(*overrides: str) -> dict[str, float]:
        (tmp_path / "eval").mkdir(exist_ok=True)
        paths = [f"paths.output_dir={tmp_path}/eval", f"paths.log_dir={tmp_path}/logs", f"paths.data_dir={data_dir}"]
        return evaluation.evaluate(compose_config("trainer.accelerator=cpu", *paths, *overrides, name="eval.yaml"))

    return run


def digits(path: Path, split: str, count: int | None = None) -> Path:
    """Real digits as a .npz file."""
    from data_tools import datamodule

    write_digits(path.parent / f"{path.stem}_shards")
    data = datamodule(path.parent / f"{path.stem}_shards", path.parent, val=f"{split}-*.tar", batch_size=1)
    batches = [((batch["image"] + 1) * 127.5).round().to(torch.uint8) for batch in data.batches("val")][:count]
    write_npz(path, len(batches), (1, 8, 8), batches)
    return path


@pytest.mark.long
def test_digits_metrics_order_an_untrained_a_half_trained_and_a_trained_network(
    train_here: Train, eval_here: Eval, tmp_path: Path
) -> None:
    sizes = ["model.depth=6", "model.width=64", "model.num_heads=4", "data.batch_size=32", "trainer.max_steps=400"]
    cadence = ["trainer.val_check_interval=400", "callbacks.checkpoint.every_n_steps=400",
               "callbacks.checkpoint.keep_every_n_steps=200", "callbacks.monitor=null"]  # fmt: skip
    train_here(*sizes, *cadence, run="trained")
    train_here(*sizes, *cadence, "trainer.max_steps=1", run="untrained")
    found = {}
    for name, path in {
        "untrained": "untrained",
        "half": "trained/checkpoints/step-00000200.ckpt",
        "trained": "trained",
    }.items():
        found[name] = eval_here(f"ckpt_path={tmp_path}/{path}", "num_samples=300", "data=digits", "sampler.cfg_scale=1")
    trained = found["trained"]
    for metric, falls in {
        "fid": True,
        "sfid": True,
        "kid": True,
        "is": False,
        "precision": False,
        "recognised": False,
    }.items():
        values = [found[name][f"eval/{metric}"] for name in ("untrained", "half", "trained")]
        assert values == sorted(values, reverse=falls), metric
        assert len(set(values)) == 3
    assert trained["eval/fid"] < 0.3 * found["untrained"]["eval/fid"]
    # Real held-out digits, the floor: at most as far as the best network's samples.
    assert 0 < trained["eval/real_fid"] < found["half"]["eval/fid"]
    assert trained["eval/real_precision"] > 0.85
    assert trained["eval/classifier_accuracy"] > 0.98


def test_every_number_is_stored_with_what_it_depends_on(
    train_here: Train, eval_here: Eval, tmp_path: Path, capsys: Any
) -> None:
    train_here("trainer.max_steps=2")
    found = eval_here(f"ckpt_path={tmp_path}/run", "num_samples=40", "batch_size=16", "data=digits", "sampler.steps=3")
    content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert {name: content[name] for name in found} == found
    protocol = content["protocol"]
    samples = protocol["samples"]
    assert samples["sampler"] == {
        "solver": "euler", "steps": 3, "cfg_scale": 2.0, "cfg_interval": None, "time_shift": 1.0, "guide": None,
    }  # fmt: skip
    assert (samples["seed"], samples["num_samples"], samples["labels"]) == (0, 40, "equal")
    assert (samples["weights"], samples["precision"], samples["device"]) == ("ema", "float32", "CPU")
    assert samples["network"]["step"] == content["step"] == 2
    assert len(samples["network"]["weights_sha256"]) == 16
    assert samples["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert protocol["features"]["name"] == "TrainedClassifier"
    assert len(protocol["features"]["sha256"]) == 64
    assert protocol["reference"]["path"] == "training set"
    # A table to paste, with the floor below.
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| | FID | sFID | IS | Precision | Recall | KID | Recognised |"
    assert lines[2].startswith(f"| samples | {found['eval/fid']:.4g} | ")
    assert lines[3].startswith(f"| real | {found['eval/real_fid']:.4g} | ")
    # Another evaluation of the same samples draws none again.
    (drawn,) = (tmp_path / "logs" / "samples").iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in (drawn / "parts").iterdir()}
    eval_here(f"ckpt_path={tmp_path}/run", "num_samples=40", "batch_size=16", "data=digits", "sampler.steps=3")
    assert {path.name: path.stat().st_mtime_ns for path in (drawn / "parts").iterdir()} == stamps


def test_the_papers_protocol_is_one_word(tmp_path: Path) -> None:
    paths = [f"paths.output_dir={tmp_path}", "data=digits"]
    config = evaluation.checked(compose_config("protocol=paper", *paths, name="eval.yaml"))
    assert config["num_samples"] == 50_000
    assert config["sampler"] == {
        "_target_": "mvsplit.flow.sampler.Sampler",
        "solver": "euler", "steps": 25, "cfg_scale": 2.0, "cfg_interval": None, "time_shift": 4.0, "guide": None,
    }  # fmt: skip
    fewer = evaluation.checked(compose_config("protocol=paper", "num_samples=1000", *paths, name="eval.yaml"))
    assert fewer["num_samples"] == 1000  # chosen keys still win


def test_images_of_another_program_are_measured_like_samples(eval_here: Eval, tmp_path: Path) -> None:
    train, val = digits(tmp_path / "train.npz", "train", 400), digits(tmp_path / "val.npz", "val")
    given = ["data=digits", f"samples={val}"]
    against_set = eval_here(*given)
    # The validation set is what the floor is measured with: the same images give the same numbers.
    for metric in ("fid", "sfid", "is", "precision", "recall", "kid"):
        assert against_set[f"eval/{metric}"] == pytest.approx(against_set[f"eval/real_{metric}"], rel=1e-6, abs=1e-6)
    against_npz = eval_here(*given, f"reference={train}")
    images = open_images(str(train))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, image in enumerate(torch.cat(list(images.batches(100)))):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:05d}.png")
    against_folder = eval_here(*given, f"reference={folder}")
    assert against_folder == pytest.approx(against_npz, rel=1e-6, abs=1e-6)
    shards = tmp_path / "train_shards"
    (shards / "val-000000.tar").unlink()
    against_shards = eval_here(*given, f"reference={shards}")
    assert against_shards == pytest.approx(against_set, rel=1e-6, abs=1e-6)
    itself = eval_here("data=digits", f"samples={val}", f"reference={val}")
    assert itself["eval/fid"] < 1e-3
    assert itself["eval/precision"] == itself["eval/recall"] == 1
    content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert content["protocol"]["samples"]["num_samples"] == 297
    assert content["protocol"]["samples"]["sha256"] == content["protocol"]["reference"]["fingerprint"]


def broken_png(folder: Path) -> Path:
    folder.mkdir()
    for number in range(5):
        png = encode_png(torch.full((1, 8, 8), number, dtype=torch.uint8)).numpy().tobytes()
        (folder / f"{number}.png").write_bytes(png if number != 3 else png[:30])
    return folder


def test_bad_input_is_one_line(eval_here: Eval, tmp_path: Path, train_here: Train) -> None:
    samples = digits(tmp_path / "val.npz", "val", 20)
    given = ["data=digits", f"samples={samples}"]
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}, []], dtype=object))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 16, 16, 1), np.uint8))
    np.savez(tmp_path / "colour.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    inception = ["features=inception", f"features.weights={tmp_path}/weights.pth"]
    missing = ["features=inception", f"features.weights={tmp_path}/none.pth"]
    of_other = {name: ["data=digits", f"samples={tmp_path}/{name}"] for name in ("objects.npz", "colour.npz", "pngs")}
    broken_png(tmp_path / "pngs")
    cases = [
        (r"features\.weights = \S+/none\.pth: no such file", [*given, *missing]),
        (r"its sha256 is \w+, must be features\.sha256 = 00", [*given, *inception, "features.sha256='00'"]),
        (r"features\.weights = \S+/weights\.pth: not a file of tensors", [*given, *inception]),
        (r"\S+/pngs/3\.png: cannot be decoded", of_other["pngs"]),
        (r"\S+/empty: contains no images", [*given, f"reference={tmp_path}/empty"]),
        (r"array 'arr_0' cannot be read \(.*never unpickled", of_other["objects.npz"]),
        (r"1, 16, 16\]: the classifier was trained on \[1, 8, 8\]", [*given, f"reference={tmp_path}/large.npz"]),
        (r"must be 1 × 8 × 8 as the reference's images", of_other["colour.npz"]),
        (r"'mu' has the shape \[2048\], must be \[64\]", [*given, f"reference={tmp_path}/statistics.npz"]),
        (r"\S+/nothing: no such file", [*given, f"reference={tmp_path}/nothing"]),
        (r"features = None: no data are given; use data=… \(e\.g\. data=digits\), features=", [f"samples={samples}"]),
        (r"samples: 1; at least 2 are needed", ["data=digits", f"samples={digits(tmp_path / 'one.npz', 'val', 1)}"]),
        (r"num_samples = 1: must be 0 \(the validation loss only\) or at least 2", ["num_samples=1"]),
    ]
    for message, overrides in cases:
        with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
            eval_here(*overrides)
    train_here("trainer.max_steps=1")
    with pytest.raises(UserError, match=r"^classes = 12: must be in 0 … 9, the classes of the network$"):
        eval_here(f"ckpt_path={tmp_path}/run", "data=digits", "classes=[3,12]", "num_samples=4")


def scalars(run: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_the_callback_logs_metrics_and_best_follows_them(train_here: Train, tmp_path: Path) -> None:
    keys = ["callbacks=metrics", "callbacks.metrics.every_n_steps=6", "callbacks.metrics.num_samples=30",
            "callbacks.metrics.batch_size=12", "callbacks.checkpoint.monitor=sample/fid", "trainer.max_steps=12",
            "optim.warmup_steps=1", "optim.lr=0.01"]  # fmt: skip
    metrics, objects = train_here(*keys)
    curve = scalars(tmp_path / "run", "sample/fid")
    assert sorted(curve) == [5, 11]  # curves count from 0; of validations at 3, 6, 9 and 12 every other one measures
    saver = next(c for c in objects["callbacks"] if type(c).__name__ == "CheckpointSaver")
    best = min(curve, key=lambda step: curve[step]) + 1
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").resolve().name == f"step-{best:08d}.ckpt"
    assert saver.scores[f"step-{best:08d}.ckpt"] == pytest.approx(min(curve.values()), rel=1e-5)
    assert metrics["sample/fid"] == pytest.approx(curve[11], rel=1e-5)


def test_a_cadence_longer_than_the_run_is_reported(train_here: Train, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "mvsplit"):
        train_here("callbacks=metrics", "callbacks.metrics.every_n_steps=50", "callbacks.metrics.num_samples=8")
    expected = "every_n_steps = 50: only the final weights are measured, after trainer.max_steps = 6"
    assert any(expected in line for line in caplog.messages)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp"])
def test_all_ranks_draw_and_one_measures(train_here: Train, run_script: Script, tmp_path: Path, strategy: str) -> None:
    """The same samples: FID equals that of a single process, up to rounding to 8 bits."""
    keys = ["callbacks=metrics", "callbacks.metrics.every_n_steps=3", "callbacks.metrics.num_samples=50",
            "callbacks.metrics.batch_size=8", "optim.warmup_steps=1", "optim.lr=0.01"]  # fmt: skip
    train_here(*keys)
    done = run_script("train.py", *keys, f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    (other,) = (tmp_path / "logs" / "train" / "runs").iterdir()
    for tag in ("sample/fid", "sample/is", "sample/precision"):
        one, two = scalars(tmp_path / "run", tag), scalars(other, tag)
        assert sorted(one) == sorted(two) == [2, 5]
        assert list(two.values()) == pytest.approx(list(one.values()), rel=0.02), tag
