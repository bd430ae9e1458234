"""The worked example of another task: a classifier learns, is measured, resumes and shards like diffusion."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from comparison import differences, state
from conftest import SRC, compose_config

import eval as evaluation
import sample
import train
from mvsplit.reports.report import make_report
from mvsplit.stability.tables import CHEAP, DEPTH, read_table
from mvsplit.utils.errors import UserError

SMALL = ["experiment=vit_lab", "model.depth=4", "model.compile=false", "trainer.accelerator=cpu", "logger=csv"]
SHORT = [*SMALL, "model.width=16", "data.batch_size=8", "trainer.max_steps=6", "trainer.val_check_interval=3",
         "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_steps=3"]  # fmt: skip
Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]


@pytest.fixture
def classify(data_dir: Path, tmp_path: Path) -> Train:
    """`classify(run, *overrides)`: train here, in the folder of that name."""

    def go(run: str, *overrides: str) -> tuple[dict[str, float], dict[str, Any]]:
        (tmp_path / run).mkdir(exist_ok=True)
        paths = [f"paths.data_dir={data_dir}", f"paths.log_dir={tmp_path}", f"paths.output_dir={tmp_path / run}"]
        return train.train(compose_config(*paths, *overrides))

    return go


def test_a_small_classifier_learns_and_is_measured(classify: Train, tmp_path: Path) -> None:
    steps = ["trainer.max_steps=100", "trainer.val_check_interval=100", "optim.warmup_steps=10", "optim.lr=1e-2"]
    metrics, _ = classify("run", *SMALL, *steps, "test=false")
    assert metrics["val/accuracy"] > 0.5
    folder = tmp_path / "run" / "stability"
    trace, depth = read_table(folder / "trace.csv"), read_table(folder / "depth.csv")
    assert trace["loss"][0] == pytest.approx(math.log(10), rel=1e-5)
    for name in CHEAP:
        assert np.isfinite(trace[name]).all(), name
    assert depth["step"].tolist() == sorted([*range(0, 100, 25), 99] * 4)
    for name in DEPTH:
        assert np.isfinite(depth[name]).all(), name
    assert not (folder / "time_probe.csv").exists()

    (row,) = make_report(tmp_path / "run").tables[0][2]
    assert row[2] == "1 of 1 alive"
    for script, main in (("sample", sample.sample), ("eval", evaluation.evaluate)):
        (tmp_path / script).mkdir()
        places = [f"paths.output_dir={tmp_path / script}", f"paths.log_dir={tmp_path}"]
        cfg = compose_config(f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt", *places, name=f"{script}.yaml")
        with pytest.raises(UserError, match=r"^ckpt_path = [^\n]*: not trained with module=flow[^\n]*$"):
            main(cfg)


def test_a_resumed_classifier_is_the_uninterrupted_one_to_the_bit(classify: Train, tmp_path: Path) -> None:
    whole, _ = classify("whole", *SHORT)
    classify("parts", *SHORT, "trainer.max_steps=3", "test=false")
    parts, _ = classify("parts", *SHORT, "ckpt_path=last")
    assert differences(state(tmp_path / "whole"), state(tmp_path / "parts")) == []
    assert parts["test/loss"] == whole["test/loss"]
    assert parts["test/accuracy"] == whole["test/accuracy"]


@pytest.mark.long
def test_two_processes_of_zero_3_train_the_same_classifier(classify: Train, data_dir: Path, tmp_path: Path) -> None:
    options = [*SHORT, "trainer.precision=32-true", "test=false"]
    classify("alone", *options)
    (tmp_path / "sharded").mkdir()
    places = [f"paths.data_dir={data_dir}", f"paths.log_dir={tmp_path}", f"paths.output_dir={tmp_path / 'sharded'}"]
    call = [sys.executable, str(SRC / "train.py"), *options, "trainer=deepspeed", *places]
    done = warm.run(call, tmp_path, 240)
    assert done.returncode == 0, done.stderr
    alone, sharded = (read_table(tmp_path / run / "stability" / "trace.csv") for run in ("alone", "sharded"))
    for name in ("loss", "grad_norm", "token_cosine"):
        assert sharded[name].tolist() == pytest.approx(alone[name].tolist(), rel=1e-4), name
