"""The project from Python: a run is loaded, draws, and gives its data, without a command and without a trainer."""

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from omegaconf import DictConfig
from random_weights import random_run

import mvsplit
from mvsplit import build, compose, load
from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT


@pytest.fixture
def run(config: Callable[..., DictConfig], tmp_path: Path) -> Path:
    return random_run(to_plain(config()), tmp_path)


def test_the_lines_of_the_readme(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```py\n(from mvsplit import .*?)```", (PROJECT_ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    monkeypatch.setattr("mvsplit.python.LOG_DIR", run.parents[2])
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert names["pictures"].shape == (4, 1, 8, 8)
    assert (names["batch"]["image"].shape, names["batch"]["image"].dtype) == ((8, 1, 8, 8), torch.float32)
    assert len(names["network"].blocks) == 8


def test_a_run_draws_as_the_command_does(run: Path, run_script: Callable[..., Any], tmp_path: Path) -> None:
    loaded = load(run, log_dir=run.parents[2])
    assert (loaded.step, loaded.path.parent) == (5, run / "checkpoints")
    pictures = loaded.sample(classes=[3, 7], count=2, seed=4)
    assert torch.equal(pictures, loaded.sample(classes=[3, 7], count=2, seed=4, batch_size=1))
    assert not torch.equal(pictures, loaded.sample(classes=[3, 7], count=2, seed=5))
    with pytest.raises(UserError, match="classes = 10: must be in 0 … 9, the classes of the network"):
        loaded.sample([10])
    done = run_script("sample.py", f"ckpt_path={run}", "count=1")  # also of a run's folder
    assert done.returncode == 0, done.stderr


def test_data_without_a_trainer_are_those_of_training(run: Path, train_here: Callable[..., Any]) -> None:
    data = load(run, log_dir=run.parents[2]).data()
    alone = list(islice(data.batches(), 300))  # more than an epoch
    assert [int(batch["position"][0]) for batch in alone] == list(range(0, 2400, 8))
    assert [len(batch["label"]) for batch in alone] == [8] * 300
    raw = next(iter(data.train_dataloader()))
    assert raw["index"].tolist() == alone[0]["index"].tolist()
    assert sum(len(batch["label"]) for batch in data.batches("val")) >= len(data.indices["val"])

    folder = Path(train_here("callbacks=record", "trainer.max_steps=2")[1]["config"]["paths"]["output_dir"])
    (record,) = folder.rglob("samples_rank_0.txt")
    keys = [word.partition("=")[2] for word in record.read_text().split() if "=" in word]
    index = data.indices["train"]
    assert keys == [index.key(data.storage, int(i)) for batch in alone[:2] for i in batch["index"]]


def test_data_of_a_run_from_elsewhere_are_given(run: Path, tmp_path: Path) -> None:
    foreign = load(run, log_dir=tmp_path / "other")
    with pytest.raises(UserError, match="is not a run of this log folder"):
        foreign.data()
    given = compose("data.batch_size=4", f"data.folder={run}")["data"]
    assert foreign.data(given).batch_size == 4


def test_a_config_outside_of_a_command(data_dir: Path, tmp_path: Path) -> None:
    paths = [f"paths.data_dir={data_dir}", f"paths.log_dir={tmp_path}/logs"]
    first, second = compose(*SMALL, *paths), compose(*SMALL, *paths)
    folders = [Path(config["paths"]["output_dir"]) for config in (first, second)]
    assert [folder.parent for folder in folders] == [tmp_path / "logs" / "train" / "runs"] * 2
    assert folders[0] != folders[1]
    assert len(next(build(first["data"]).batches())["label"]) == 8
    assert compose("logger=null")["logger"] is None
    with pytest.raises(UserError, match=r"^model\.depth = -3: must be greater than 0"):
        compose("model.depth=-3")


def test_importing_the_package_imports_no_pytorch() -> None:
    code = "import sys, mvsplit; print('torch' in sys.modules, 'omegaconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="no attribute 'compse'"):
        mvsplit.compse  # noqa: B018
