"""Small real runs in this process: what they leave behind, and that how they are cut up does not matter."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import differences, last, state, weights
from conftest import compose_config
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import mvsplit.training.module as module_file
from mvsplit.stability.tables import read_table
from mvsplit.utils.errors import UserError

Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]


def test_a_run_leaves_everything_behind(train_here: Train, tmp_path: Path) -> None:
    metrics, objects = train_here("optim.warmup_steps=2")
    run = tmp_path / "run"
    assert set(objects) == {"config", "datamodule", "module", "callbacks", "loggers", "trainer"}
    assert objects["trainer"].global_step == 6
    for name in ("train/loss", "val/loss", "test/loss"):
        assert math.isfinite(metrics[name])
    assert metrics["val/loss"] == metrics["test/loss"]  # the averaged weights, the same samples, times and noise
    checkpoints = {path.name: path.resolve().name for path in (run / "checkpoints").iterdir()}
    assert checkpoints.pop("last.ckpt") == "step-00000006.ckpt"
    assert checkpoints.pop("best.ckpt") in checkpoints
    assert {"step-00000004.ckpt", "step-00000006.ckpt"} <= set(checkpoints) <= {f"step-{n:08d}.ckpt" for n in (3, 4, 6)}
    assert {p.name for p in (run / "samples").iterdir()} == {"step_00000003.png", "step_00000006.png"}
    assert {p.name for p in (run / "stability").iterdir()} == {"trace.csv", "depth.csv", "time_probe.csv"}
    content = last(run)  # loads with tensors and plain containers only
    assert content["global_step"] == 6
    assert content["callbacks"]["EMA"]["num_updates"] == 6
    assert content["ShardDataModule"]["samples"] == 48


def test_tensorboard_shows_what_it_should(train_here: Train, tmp_path: Path) -> None:
    metrics, _ = train_here("callbacks.monitor.probe.every=2", "callbacks.monitor.board.images_every=2")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"train/loss", "train/lr", "train/grad_norm", "val/loss", "test/loss", "time/images_per_s",
                "time/steps_per_s", "time/data_wait_share", "memory/host_peak_gib", "val/loss_t_0.00-0.25",
                "val/loss_t_0.75-1.00"}  # fmt: skip
    assert expected <= tags
    assert any(tag.startswith("train/loss_t_") for tag in tags)
    assert [e.step for e in events.Scalars("train/loss")] == list(range(6))
    assert events.Scalars("val/loss")[-1].value == pytest.approx(metrics["val/loss"])
    assert [e.step for e in events.Images("sample/grid")] == [2, 5]
    stability = {tag.removeprefix("stability/") for tag in tags if tag.startswith("stability/")}
    by_depth = {tag.partition("_depth_")[0] for tag in stability if "_depth_" in tag}
    assert by_depth == {"rho", "token_cosine", "g_ratio", "q_grad"}
    assert len(stability) == 4 * 4 + 6  # not one for each block
    assert [e.step for e in events.Scalars("stability/rho")] == list(range(6))
    assert [e.step for e in events.Scalars("stability/rho_depth_0.75-1.00")] == [0, 2, 4, 5]
    for name in by_depth:
        assert [e.step for e in events.Images(f"stability/{name}_map")] == [2, 5]
        assert [e.step for e in events.Images(f"stability/{name}_profile")] == [2, 5]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"stability/token_cosine" in layout
    assert "config/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "max_steps: 6" in text


def test_a_resumed_run_has_one_row_for_each_step(train_here: Train, tmp_path: Path) -> None:
    options = ["callbacks.monitor.probe.every=2", "callbacks.checkpoint.every_n_steps=2"]
    train_here(*options, run="whole")
    train_here(*options, "trainer.max_steps=3", "test=false", run="cut")
    train_here(*options, "ckpt_path=last", run="cut")
    for name in ("trace.csv", "depth.csv", "time_probe.csv"):
        whole, cut = (read_table(tmp_path / run / "stability" / name) for run in ("whole", "cut"))
        for column, values in cut.items():
            np.testing.assert_array_equal(values, whole[column], err_msg=f"{name}: {column}")


def test_csv_logger(train_here: Train, tmp_path: Path) -> None:
    train_here("logger=csv")
    lines = (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0]
    assert len(lines) > 6


def test_training_learns(train_here: Train) -> None:
    """A floor on quality: an untrained network's loss is near 1.7; this one has seen 60 batches."""
    metrics, _ = train_here(
        "trainer.max_steps=60", "trainer.val_check_interval=60", "optim.warmup_steps=5", "callbacks.ema.decay=0.9"
    )
    assert metrics["val/loss"] < 1.25


def test_the_same_seed_gives_the_same_run_and_another_does_not(train_here: Train, tmp_path: Path) -> None:
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_here(f"seed={seed}", run=run)
    assert differences(state(tmp_path / "a"), state(tmp_path / "b")) == []
    assert differences(weights(tmp_path / "a"), weights(tmp_path / "c")) != []


@pytest.mark.long
def test_accumulated_micro_batches_give_the_same_weights(train_here: Train, tmp_path: Path) -> None:
    train_here(run="whole")
    train_here("trainer.accumulate_grad_batches=4", "trainer.val_check_interval=12", run="parts")
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert parts["global_step"] == 6
    assert differences(whole["ShardDataModule"], parts["ShardDataModule"]) == []
    for name, weight in whole["tensors"]["weights"].items():
        # Sums of gradients in another order: not to the bit, and Adam's first steps magnify the difference.
        torch.testing.assert_close(parts["tensors"]["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=name)


class Stop(Callback):
    """Sends this process a signal at the start of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.long), 2, 3, pytest.param(4, marks=pytest.mark.long)]
)  # 2: right after a save; 3: right after a validation
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_at_any_step_and_resumed_is_uninterrupted(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, accumulate: int
) -> None:
    import train

    options = [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.val_check_interval={3 * accumulate}"]
    train_here(*options, run="whole")
    build_each, stop = train.build_each, Stop(step, signal.SIGTERM)
    monkeypatch.setattr(train, "build_each", lambda nodes: build_each(nodes) + [stop] * ("ema" in nodes))
    _, objects = train_here(*options, run="cut")
    assert objects["trainer"].global_step == step + 1
    monkeypatch.setattr(train, "build_each", build_each)
    train_here(*options, "ckpt_path=last", run="cut")
    assert differences(state(tmp_path / "whole"), state(tmp_path / "cut")) == []


@pytest.mark.slow
def test_a_network_with_dropout_resumes_to_the_bit(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork's stateful random numbers: the global generator too is a function of the place in the stream."""
    import train
    from mvsplit.models.layers import SwiGLU

    plain = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: F.dropout(plain(self, x), 0.3, self.training))
    train_here(run="whole")
    build_each, stop = train.build_each, Stop(3, signal.SIGTERM)
    monkeypatch.setattr(train, "build_each", lambda nodes: build_each(nodes) + [stop] * ("ema" in nodes))
    train_here(run="cut")
    monkeypatch.setattr(train, "build_each", build_each)
    torch.manual_seed(12345)  # another process would be elsewhere
    train_here("ckpt_path=last", run="cut")
    assert differences(state(tmp_path / "whole"), state(tmp_path / "cut")) == []


@pytest.mark.parametrize("where", ["in the loss", "in all activations"])
def test_a_non_finite_loss_stops_before_the_step(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plain, calls = module_file.velocity_loss, 0

    def poisoned(network: Any, x0: torch.Tensor, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        factor = math.nan if calls == 4 and torch.is_grad_enabled() else 1
        if where == "in the loss":
            return plain(network, x0, *arguments) * factor
        return plain(network, x0 * factor, *arguments)  # the measures of the backward pass meet it first

    monkeypatch.setattr(module_file, "velocity_loss", poisoned)
    with pytest.raises(UserError, match=r"not finite at step 3 .* the step was not taken"):
        train_here("callbacks.checkpoint.every_n_steps=1", "callbacks.monitor.probe.every=1")
    report = json.loads((tmp_path / "run" / "stability" / "nonfinite_step_3_rank_0.json").read_text())
    assert report["loss"] == "nan"
    assert report["positions"] == list(range(24, 32))
    content = state(tmp_path / "run")
    assert content["global_step"] == content["updates"] == 3
    assert all(w.isfinite().all() for w in content["tensors"]["weights"].values())
    # Going on from there without the fault ends where a run without it ends.
    monkeypatch.setattr(module_file, "velocity_loss", plain)
    train_here("callbacks.checkpoint.every_n_steps=1", "ckpt_path=last")
    train_here("callbacks.checkpoint.every_n_steps=1", run="whole")
    assert differences(state(tmp_path / "run"), state(tmp_path / "whole")) == []


@pytest.mark.parametrize("mode", ["default", "fdr", "limit", "profiler"])
def test_debug_modes(train_here: Train, tmp_path: Path, mode: str) -> None:
    _, objects = train_here(f"debug={mode}")
    trainer = objects["trainer"]
    assert objects["config"]["task_name"] == "debug"
    assert trainer.global_step == (1 if mode == "fdr" else 6)
    assert (tmp_path / "run" / "checkpoints").exists() == (mode != "fdr")
    if mode == "limit":
        assert trainer.num_val_batches == [2]


@pytest.mark.long
def test_debug_overfit_learns_its_samples_by_heart(train_here: Train) -> None:
    options = ["debug=overfit", "optim.warmup_steps=10", "trainer.val_check_interval=150", "trainer.max_steps=150"]
    _, objects = train_here(*options, "trainer.fast_dev_run=true", run="short")
    assert len(objects["datamodule"].indices["train"]) == 8  # a batch
    one, _ = train_here(*options, "data.overfit_samples=1", run="one")
    everything, _ = train_here(*options, "data.overfit_samples=0", run="all")
    assert one["val/loss"] < 0.85 * everything["val/loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=16", r"data\.batch_size = 16: the checkpoint was trained with 8"),
        ("seed=3", r"data\.seed = 3: the checkpoint was trained with 0"),
        ("model.depth=5", r"another network; the checkpoint has no 'network\.blocks\.4"),
        ("data.overfit_samples=20", "the checkpoint was trained on other samples"),
    ],
)
def test_resuming_something_else_is_refused(train_here: Train, override: str, message: str) -> None:
    train_here("trainer.max_steps=2")
    with pytest.raises(UserError, match=message):
        train_here(override, "ckpt_path=last")


def test_all_conditioning_and_rectangles_train(train_here: Train) -> None:
    """Other shapes through the same code: a wide picture, patch 1 and another number of context tokens."""
    metrics, objects = train_here("data.image_size=[4,12]", "model.patch_size=1", "model.context.num_tokens=1")
    assert objects["module"].network.segments == (48, 1)
    assert math.isfinite(metrics["val/loss"])


def test_sampling_and_judging_a_checkpoint(train_here: Train, tmp_path: Path, data_dir: Path) -> None:
    import eval as eval_script
    import sample as sample_script

    metrics, _ = train_here()

    def outputs(name: str, *overrides: str) -> Any:
        (tmp_path / name).mkdir()
        return compose_config(
            f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt",
            f"paths.output_dir={tmp_path / name}",
            f"paths.log_dir={tmp_path}",
            "sampler.steps=2",
            *overrides,
            name="sample.yaml" if name.startswith("s") else "eval.yaml",
        )

    pictures = {}
    for name, batch in (("s1", 1), ("s3", 3), ("s8", 8)):
        folder = sample_script.sample(outputs(name, "classes=[3,7]", "count=4", f"batch_size={batch}"))
        files = sorted(folder.glob("*.png"))
        assert len(files) == 9  # eight pictures and their grid
        assert files[0].name == "00000_class_3.png"
        pictures[name] = [file.read_bytes() for file in files]
    assert pictures["s1"] == pictures["s3"] == pictures["s8"]
    other = sample_script.sample(outputs("s_raw", "classes=[3,7]", "count=4", "weights=raw"))
    assert [f.read_bytes() for f in sorted(other.glob("*.png"))] != pictures["s1"]

    judged = eval_script.evaluate(outputs("e", "num_samples=20"))
    assert judged["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-5)
    assert judged["eval/classifier_accuracy"] > 0.97
    assert 0 <= judged["eval/recognised"] <= 1
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["step"] == 6
    with pytest.raises(UserError, match=r"classes = 12: must be in 0 … 9, the classes of the network"):
        sample_script.sample(outputs("s_bad", "classes=[12]"))


def test_mixed_precision_trains(train_here: Train) -> None:
    exact, _ = train_here("trainer.max_steps=20", "trainer.val_check_interval=20")
    mixed, _ = train_here(
        "trainer.max_steps=20", "trainer.val_check_interval=20", "trainer.precision=bf16-mixed", run="b"
    )
    assert mixed["val/loss"] == pytest.approx(exact["val/loss"], rel=0.02)
    assert mixed["val/loss"] != exact["val/loss"]


def test_callbacks_and_loggers_switched_off(train_here: Train, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    import train
    from mvsplit.utils.run_dirs import PROJECT_ROOT

    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        cfg = compose("train.yaml", ["~callbacks", "~logger", "model=tiny", "trainer.max_steps=2",
                                     "trainer.accelerator=cpu", f"paths.output_dir={tmp_path}"])  # fmt: skip
    _, objects = train.train(cfg)
    assert objects["trainer"].global_step == 2
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".lock"}


def test_half_precision_weights_train_and_draw(train_here: Train) -> None:
    metrics, _ = train_here("trainer.precision=bf16-true")
    assert math.isfinite(metrics["val/loss"])


def test_a_changed_learning_rate_holds_after_a_resume(train_here: Train) -> None:
    train_here("trainer.max_steps=4", "optim.schedule=constant", "optim.warmup_steps=0")
    changed = ["optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=1e-5", "optim.weight_decay=0.03"]
    metrics, objects = train_here(*changed, "ckpt_path=last")
    assert metrics["train/lr"] == pytest.approx(1e-5)
    groups = objects["trainer"].optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]


def test_two_processes_cannot_train_in_one_folder(train_here: Train, tmp_path: Path) -> None:
    from mvsplit.training.session import locked

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training in this folder"):
        train_here()


def test_pictures_at_the_end_even_without_a_validation_there(train_here: Train, tmp_path: Path) -> None:
    train_here("trainer.max_steps=5")
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {"step_00000003.png", "step_00000005.png"}


def test_a_config_beside_a_checkpoint_cannot_run_code(train_here: Train, tmp_path: Path) -> None:
    import sample as sample_script

    train_here()
    file, canary = tmp_path / "run" / "config.yaml", tmp_path / "canary"
    plain = file.read_text()
    poison = '${oc.create:"{_target_: pathlib.Path.touch, self: ' + str(canary) + '}"}'
    attacks = {
        "interpolation": plain.replace("rope_theta: ", f"rope_theta: '{poison}' # "),
        "target": plain.replace("mvsplit.models.dit.DiT", "os.system"),
        "python object": "!!python/object/apply:os.system [touch " + str(canary) + "]",
        "no yaml": "{",
    }
    for attack in attacks.values():
        file.write_text(attack)
        cfg = compose_config(
            f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt", f"paths.output_dir={tmp_path}", name="sample.yaml"
        )
        with pytest.raises(UserError):
            sample_script.sample(cfg)
    assert not canary.exists()
