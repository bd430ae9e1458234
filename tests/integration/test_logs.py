"""What runs write to their loggers: each point once, however often a run was killed, and nothing without a step."""

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning import Callback
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import train
from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.utils import loggers
from mvsplit.utils.errors import UserError

Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]


class Kill(Callback):
    """Ends this process without a warning: at the start of a step, for `x.5` in its validation, for `-x` once saved."""

    def __init__(self, step: float, number: int) -> None:
        self.step, self.number = step, number
        self.save = CheckpointSaver.save

    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        def save(saver: CheckpointSaver, trainer: Any, score: float | None = None) -> None:
            self.save(saver, trainer, score)
            if trainer.global_step == -self.step:
                saver.settle(trainer, wait=True)
                os.kill(os.getpid(), self.number)

        CheckpointSaver.save = save  # type: ignore[method-assign]  # in this process

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_validation_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step - 0.5:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def killed(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`killed(step, *overrides)`: a run in a process of its own, which dies there."""
    build_each = train.build_each

    def run(step: float, *overrides: str, number: int = signal.SIGKILL) -> None:
        kill = Kill(step, number)
        monkeypatch.setattr(train, "build_each", lambda nodes: build_each(nodes) + [kill] * ("ema" in nodes))
        process = multiprocessing.get_context("fork").Process(target=train_here, args=overrides, kwargs={"run": "cut"})
        process.start()
        process.join(60)
        monkeypatch.setattr(train, "build_each", build_each)
        assert process.exitcode == (-number if number == signal.SIGKILL else 0)

    return run


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the points of each curve, and the steps of each picture."""
    guidance = {"scalars": 0, "images": 0}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=guidance).Reload()
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return points | {tag: [(e.step, 0.0) for e in events.Images(tag)] for tag in events.Tags()["images"]}


def rows(run: Path) -> list[tuple[int, str]]:
    """Step and column of each value in the CSV file."""
    (path,) = (run / "csv").rglob("metrics.csv")
    with path.open() as file:
        return [(int(row["step"]), key) for row in csv.DictReader(file) for key in row if row[key] and key != "step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "steps"),
    # Before the first checkpoint, behind it, …
    [pytest.param(1, (1, -2, 3, 4.5, -4, 5, 6, 9, 12.5, -12), marks=pytest.mark.long), (2, (5, -6, 6, 8.5))],
)
def test_a_run_killed_and_resumed_has_the_points_of_an_uninterrupted_one(
    train_here: Train, killed: Callable[..., None], tmp_path: Path, accumulate: int, steps: tuple[float, ...]
) -> None:
    options = ["trainer.max_steps=12", f"trainer.val_check_interval={4 * accumulate}", "logger=many_loggers",
               f"trainer.accumulate_grad_batches={accumulate}", "trainer.log_every_n_steps=2",
               "callbacks.monitor.probe.every=2", "callbacks.monitor.board.images_every=2"]  # fmt: skip
    train_here(*options, run="whole")
    for step in steps:
        killed(step, *options, "ckpt_path=last", number=signal.SIGTERM if step == 6 else signal.SIGKILL)
    train_here(*options, "ckpt_path=last", run="cut")
    whole, cut = curves(tmp_path / "whole"), curves(tmp_path / "cut")
    assert cut.keys() == whole.keys()
    for tag, points in whole.items():
        assert (tag, [step for step, _ in cut[tag]]) == (tag, [step for step, _ in points])
        if not tag.startswith(("time/", "memory/")):
            assert cut[tag] == points, tag
    assert [step for step, _ in whole["val/loss"]] == [3, 7, 11]
    assert [step for step, _ in whole["time/images_per_s"]] == [1, 3, 5, 7, 9, 11]
    assert sorted(rows(tmp_path / "cut")) == sorted(rows(tmp_path / "whole"))


class Recorder(Logger):
    """A logger of somebody else, with Lightning's interface and pictures, as that for Weights & Biases has them."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, Any] = {}
        self.pictures: list[tuple[str, int]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.params |= params

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        (image,) = images
        assert image.dtype == np.uint8
        assert image.ndim == image.shape[2] == 3
        assert step is not None
        self.pictures.append((key, step))


def test_config_and_pictures_go_to_every_logger(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_each, recorder = train.build_each, Recorder()
    monkeypatch.setattr(train, "build_each", lambda nodes: build_each(nodes) + [recorder] * ("csv" in nodes))
    _, objects = train_here("logger=many_loggers", "trainer.max_steps=3")
    assert recorder.params == objects["config"]
    assert recorder.pictures.count(("sample/grid", 2)) == 1
    assert {tag for tag, _ in recorder.pictures} == curves(tmp_path / "run").keys() - scalars(tmp_path / "run")
    (file,) = (tmp_path / "run" / "csv").rglob("hparams.yaml")
    assert yaml.safe_load(file.read_text())["model"]["depth"] == 4


def scalars(run: Path) -> set[str]:
    return set(EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"])


def test_hparams_tell_what_runs_differ_in(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loggers, "distinctive_overrides", lambda: ["flow.label_dropout=0.2", "seed=3", "experiment=null"]
    )
    monkeypatch.setattr(loggers, "group_choices", lambda: {"residual": "post_norm"})
    train_here("residual=post_norm", "seed=3", "flow.label_dropout=0.2")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("hparam")]
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    experiment = content["_hparams_/experiment"].experiment
    columns = [info.name for info in experiment.hparam_infos]
    assert columns[:4] == ["residual", "optim.lr", "model.depth", "seed"]
    assert "flow.label_dropout" in columns
    assert len(columns) <= 12
    assert {info.name.tag for info in experiment.metric_infos} <= scalars(tmp_path / "run")
    row = content["_hparams_/session_start_info"].session_start_info.hparams
    assert row["residual"].string_value == "post_norm"
    assert row["seed"].number_value == 3
    assert "_hparams_/session_end_info" in content
    assert {path.parent for path in (tmp_path / "run").rglob("events.*")} == {tmp_path / "run" / "tensorboard"}


@pytest.mark.parametrize("where", ["data", "first step"])
def test_without_a_step_there_is_nothing_in_tensorboard(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "data":
        with pytest.raises(UserError):
            train_here("data.folder=/nowhere", "data.prepare=null")
    else:
        build_each, stop = train.build_each, Raise()
        monkeypatch.setattr(train, "build_each", lambda nodes: build_each(nodes) + [stop] * ("ema" in nodes))
        with pytest.raises(UserError, match="stop here"):
            train_here()
    assert not list((tmp_path / "run").rglob("events.*"))


class Raise(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise UserError("stop here")


def test_a_resumed_run_is_read_after_what_it_continues(tmp_path: Path) -> None:
    # In one second, by a process whose number sorts before the first one's.
    (tmp_path / f"events.out.tfevents.{int(time.time())}.host.99999.0").touch()
    logger = loggers.TensorBoard(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.finalize("success")
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert ".host.99999.0" in first
    assert int(second.split(".")[3]) > int(first.split(".")[3])


def leveldb_records(log: bytes, begin: int = 7) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, in them parts with check sum, length and kind."""
    at, record = 0, b""
    while at + 7 <= len(log):
        left = 32768 - (at + begin) % 32768  # the file's own header counts
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_records(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Config and rows that W&B would upload from a run's folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:]):
            record = Record.FromString(data)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            if record.history.item:
                rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return config, rows


@pytest.mark.long
def test_weights_and_biases_offline(run_script: Callable[..., Any], tmp_path: Path) -> None:
    """Curves, images and config in the run's folder; the same command resumes the run, as the same one of W&B's."""
    command = ["train.py", "logger=wandb", "ckpt_path=last"]
    for steps in (3, 6):
        result = run_script(*command, f"trainer.max_steps={steps}")
        assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "logs" / "train" / "runs").iterdir()
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    assert len({file.name for file in (run / "wandb").glob("offline-run-*/*.wandb")}) == 1
    config, rows = wandb_records(run)
    assert config["model"]["depth"] == 4
    assert config["trainer"]["max_steps"] == 6
    assert {row["trainer/global_step"] for row in rows if "train/loss" in row} == set(range(6))
    assert any("val/loss" in row for row in rows)
    assert not any("epoch" in row for row in rows)
    assert len(list((run / "wandb").glob("offline-run-*/files/media/images/sample/grid_*.png"))) == 2


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_settings_of_wandb_in_a_run_folder_are_refused(tmp_path: Path, folder: str) -> None:
    """They could name another server, which would be sent the key."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    with pytest.raises(UserError, match=r"wandb/settings: W&B's settings are not read from a run's folder"):
        _ = loggers.Wandb(str(tmp_path)).experiment


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install -e '\.\[wandb\]'"):
        loggers.Wandb.check("run")
