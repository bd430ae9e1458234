"""SiT in real, small runs: measured, guarded, sharded, sampled from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ZERO3
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvsplit.stability.tables import CHEAP, DEPTH, read_table
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.errors import AgreedError

SIT = ["model=sit_digits", "model.depth=3", "model.width=32", "model.num_heads=2"]
QUIET = ["test=false", "callbacks.sample_grid=null", "callbacks.time_probe=null", "callbacks.ema=null", "~logger",
         "callbacks.checkpoint.keep_every_n_steps=null", "trainer.limit_val_batches=0"]  # fmt: skip
FAST = ["optim.warmup_steps=0", "optim.schedule=constant"]
OTHERS = {"rho_image", "rho_context", "alpha_mean", "alpha_max", "beta_mean", "beta_max"}
"""Columns of what SiT does not have: context tokens, and gains of a residual."""


def test_all_of_it_is_measured_and_drawn(train_here: Callable[..., Any], tmp_path: Path) -> None:
    objects = train_here(*SIT, *FAST, "callbacks.monitor.probe.every=2")[1]
    assert objects["module"].network.blocks[0].merge1 is not objects["module"].network.blocks[0].merge2
    folder = tmp_path / "run" / "stability"
    trace, depth, times = (read_table(folder / f"{name}.csv") for name in ("trace", "depth", "time_probe"))
    assert trace["step"].tolist() == list(range(6))
    assert depth["step"].tolist() == [0, 0, 0, 2, 2, 2, 4, 4, 4, 5, 5, 5]
    for name in CHEAP:
        assert np.isfinite(trace[name]).all(), name
    for name in DEPTH:
        assert np.isfinite(depth[name]).tolist() == [name not in OTHERS] * 12, name
    # Zero final layer and gains: the first gradient reaches no block, the second only the gains, the third everything.
    for name in ("g_mean", "g_ctr", "q_grad", "k_grad"):
        assert [value > 0 for value in trace[name]] == [False, False, True, True, True, True], name
    assert np.isfinite(times["r2"]).all()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    drawn = {tag.removeprefix("stability/") for tag in events.Tags()["images"] if tag.startswith("stability/")}
    maps = ("rho", "token_cosine", "g_ratio", "q_grad")
    assert drawn == {f"{name}_{kind}" for name in maps for kind in ("map", "profile")}
    curves = set(events.Tags()["scalars"])
    assert curves >= {f"stability/{name}" for name in CHEAP[2:]}
    assert {f"stability/{name}_depth_0.50-0.75" for name in maps} <= curves
    assert not (folder / "guard.jsonl").exists()  # a healthy start alarms no one


def test_the_guard_stops_a_collapse(train_here: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(AgreedError, match=r"the network is collapsing at step \d+ \(token_cosine 0\.9"):
        train_here(*SIT, *FAST, *QUIET, "optim.lr=0.05", "trainer.max_steps=40", "callbacks.monitor.guard.action=stop")
    (event,) = map(json.loads, (tmp_path / "run" / "stability" / "guard.jsonl").read_text().splitlines())
    assert (event["kind"], event["action"]) == ("onset", "stop")
    assert 1 < event["step"] < 40
    trace = read_table(tmp_path / "run" / "stability" / "trace.csv")
    assert trace["step"][-1] == event["step"]
    assert trace["token_cosine"][-1] > 0.95 > trace["token_cosine"][:-1].min()


def test_a_step_that_is_not_finite_is_not_taken(train_here: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(AgreedError, match=r"the loss or its gradient is not finite at step 1 .* step was not taken"):
        train_here(*SIT, *FAST, *QUIET, "optim.lr=1e20", "callbacks.checkpoint.every_n_steps=1")
    report = json.loads((tmp_path / "run" / "stability" / "nonfinite_step_1_rank_0.json").read_text())
    assert report["step"] == 1
    assert {"network.blocks.modulation.weight", "network.final.proj.weight"} <= report["gradient_norms"].keys()
    assert not all(math.isfinite(float(norm)) for norm in report["gradient_norms"].values())
    saved = SavedRun(tmp_path / "run" / "checkpoints" / "last.ckpt", "raw")
    assert saved.step == 1  # the last good one
    assert all(bool(torch.isfinite(value).all()) for value in saved.network.state_dict().values())


@pytest.mark.slow
def test_zero3_trains_what_one_process_trains_and_its_checkpoint_is_sampled(
    train_here: Callable[..., Any], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    # All samples' attention is measured: two processes would choose others than one does.
    steps = [*SIT, *FAST, "callbacks.monitor.probe.every=2", "callbacks.monitor.probe.attention_samples=8",
             "model.checkpointing.every=2"]  # fmt: skip
    done = run_script("train.py", *steps, *ZERO3)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "logs" / "train" / "runs").iterdir()
    alone = train_here(*steps)[1]["module"].network
    for name in ("trace", "depth"):
        expected = read_table(tmp_path / "run" / "stability" / f"{name}.csv")
        for column, found in read_table(folder / "stability" / f"{name}.csv").items():
            np.testing.assert_allclose(found, expected[column], rtol=1e-4, atol=1e-8, err_msg=f"{name}: {column}")
    trained = SavedRun(folder / "checkpoints" / "last.ckpt", "raw").network
    for name, parameter in trained.named_parameters():
        pair = [parameter, alone.get_parameter(name)]
        if name.endswith("qkv.bias"):  # softmax cancels the keys' bias: its gradient is rounding, which Adam scales up
            pair = [torch.cat([whole.chunk(3)[0], whole.chunk(3)[2]]) for whole in pair]
        assert (pair[0] - pair[1]).norm() < 1e-4 * pair[1].norm(), name

    done = run_script("sample.py", f"ckpt_path={folder}", "classes=[3,7]", "count=2", "sampler.steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "logs" / "sample").rglob("*.png"))) == 5  # four and their grid
