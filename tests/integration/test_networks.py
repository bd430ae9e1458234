"""Networks that are no DiT train with the callbacks as they are; what they do not offer is not measured."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
from comparison import differences
from conftest import SMALL, SUPPORT
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvsplit.callbacks.monitor import StepMonitor
from mvsplit.callbacks.stability_probe import StepRow
from mvsplit.stability.tables import CHEAP, read_table
from mvsplit.training import saved_config
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils import config as checks
from mvsplit.utils.errors import UserError

SCRIPT = SUPPORT / "other_train.py"


def node(kind: str, **more: Any) -> dict[str, Any]:
    """The config `model` of a class of `networks.py`."""
    sizes = {key: f"${{data.{key}}}" for key in ("image_size", "channels", "num_classes")}
    return {"_target_": f"networks.{kind}", "_partial_": True} | sizes | more


@pytest.fixture
def train_other(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[Any, list[str]]]:
    """`train_other(model, *overrides)`: train this model here; the objects and what was said of callbacks."""
    import train

    monkeypatch.setattr(checks, "PACKAGES", (*checks.PACKAGES, "networks."))
    monkeypatch.setitem(saved_config.BUILT, "model", ("mvsplit.models.", "networks."))
    caplog.set_level(logging.INFO, logger="mvsplit")

    def go(model: dict[str, Any], *overrides: str, run: str = "run") -> tuple[Any, list[str]]:
        caplog.clear()
        cfg = config(*overrides, run=run)
        cfg.model = OmegaConf.create(model)
        objects = train.train(cfg)[1]
        return objects, [r.getMessage() for r in caplog.records if r.getMessage().startswith("callbacks.")]

    return go


@pytest.mark.slow
def test_a_network_that_offers_nothing_trains_with_the_default_callbacks(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pixels.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node("Pixels"))))
    places = [f"hydra.searchpath=[file://{tmp_path}]", f"paths.data_dir={data_dir}", f"paths.log_dir={tmp_path}/logs"]
    command = [sys.executable, str(SCRIPT), *SMALL, *places, "model=pixels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if "callbacks." in line] == [
        "callbacks.monitor: Pixels has no blocks: only loss and gradient norm are measured",
        "callbacks.time_probe: off, Pixels has no blocks",
    ]
    (run,) = (tmp_path / "logs" / "train" / "runs").iterdir()
    trace = read_table(run / "stability" / "trace.csv")
    assert trace["step"].tolist() == list(range(6))
    for name in CHEAP:
        assert np.isfinite(trace[name]).tolist() == [name in ("loss", "grad_norm")] * 6, name
    curve = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.value for event in curve] == pytest.approx(trace["loss"].tolist(), rel=1e-5)
    assert len(read_table(run / "stability" / "depth.csv")["step"]) == 0
    assert not (run / "stability" / "time_probe.csv").exists()


def test_what_a_network_offers_is_measured(train_other: Any, tmp_path: Path) -> None:
    _, lines = train_other(node("Tokens"), "callbacks.monitor.probe.every=2")
    assert lines == [
        "callbacks.monitor: not measured in Tokens: mu_eff, retention, row_diversity, var_gain, tr_ratio, q_grad,"
        " k_grad"
    ]
    folder = tmp_path / "run" / "stability"
    trace, depth, times = (read_table(folder / f"{name}.csv") for name in ("trace", "depth", "time_probe"))
    for name in CHEAP:
        assert np.isfinite(trace[name]).tolist() == [name not in ("q_grad", "k_grad")] * 6, name
    assert depth["step"].tolist() == [0, 0, 0, 2, 2, 2, 4, 4, 4, 5, 5, 5]
    measured = {name for name in depth if np.isfinite(depth[name]).all()}
    own = {f"{name}_ffn" for name in ("g_mean", "g_ctr", "amplification", "alignment")}
    assert measured == {"step", "block", "rho", "token_cosine", *own}
    assert np.isfinite(times["r2"]).all()
    assert times["block"].tolist() == [0, 1, 2] * 2
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    drawn = {tag.removeprefix("stability/") for tag in events.Tags()["images"] if tag.startswith("stability/")}
    assert drawn == {f"{name}_{kind}" for name in ("rho", "token_cosine", "g_ratio") for kind in ("map", "profile")}


def test_without_the_probe_the_guard_judges_loss_and_gradient_norm(
    train_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mvsplit")
    begin = StepMonitor._begin

    def collapse(self: StepMonitor, trainer: Any, module: Any) -> StepRow:
        row = begin(self, trainer, module)
        assert set(row.values) == {"loss", "grad_norm"}
        assert 0 < row.loss < 3
        row.loss, row.grad_norm = 1.6, 1.0
        if row.step < 40:
            row.loss, row.grad_norm = 1.6 * 0.97**row.step, 1.0 + 0.01 * (row.step % 3)
        return row

    monkeypatch.setattr(StepMonitor, "_begin", collapse)
    quick = ["trainer.max_steps=70", "trainer.val_check_interval=70", "test=false", "callbacks.sample_grid=null"]
    with pytest.raises(UserError, match=r"the network is (collapsing|dead) at step \d+ \(loss 1\.6"):
        train_here(
            *quick,
            "callbacks.monitor.probe=null",
            "callbacks.monitor.guard.action=stop",
            "callbacks.checkpoint.keep_every_n_steps=null",
        )
    log = (tmp_path / "run" / "stability" / "guard.jsonl").read_text().splitlines()
    assert len(log) == 1
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("callbacks.")]
    assert lines == ["callbacks.monitor.probe is off: the guard sees only loss and gradient norm"]
    trace = read_table(tmp_path / "run" / "stability" / "trace.csv")
    assert np.isfinite(trace["loss"]).all()
    assert np.isnan(trace["rho"]).all()
    assert not (tmp_path / "run" / "stability" / "depth.csv").exists()


@pytest.mark.long
def test_a_weight_with_two_names_is_resumed_and_read(train_other: Any, tmp_path: Path) -> None:
    objects, _ = train_other(node("Maps"), "callbacks.ema=null", "callbacks.sample_grid=null")
    trained = objects["module"].network.state_dict()
    saved = SavedRun(tmp_path / "run" / "checkpoints" / "last.ckpt", "raw")
    assert differences(dict(saved.network.state_dict()), dict(trained)) == []
    go_on = ["callbacks.ema=null", "callbacks.sample_grid=null", "ckpt_path=last", "trainer.max_steps=8"]
    objects, _ = train_other(node("Maps"), *go_on)
    assert objects["trainer"].global_step == 8
    network = objects["module"].network
    assert network.twin.weight is network.blocks[0].weight


class Mute(networks.Pixels):
    """Without what is needed to drop a condition."""

    drop = property()  # type: ignore[assignment]


class Flat(networks.Pixels):
    """Returns pixels in a row."""

    def forward(self, *args: Any) -> Any:
        return super().forward(*args).flatten(1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Mute, r"^model: Mute has no drop; see class Network in src/mvsplit/flow/objective\.py$"),
        (Flat, r"^model: returned shape \(\d+, 64\), expected its input's, \(\d+, 1, 8, 8\)$"),
    ],
)
def test_what_is_no_network_is_refused(
    train_other: Any, monkeypatch: pytest.MonkeyPatch, kind: Any, message: str
) -> None:
    monkeypatch.setattr(networks, kind.__name__, kind, raising=False)
    monkeypatch.setattr(kind, "__module__", "networks")
    with pytest.raises(UserError, match=message):
        train_other(node(kind.__name__))
