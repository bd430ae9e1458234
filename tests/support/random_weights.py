"""Runs that nobody trained: folders with a config and a checkpoint of random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mvsplit.training.checkpoint_format import Slice
from mvsplit.training.checkpoint_writer import CheckpointWriter
from mvsplit.training.checkpoints import NETWORK
from mvsplit.training.saved_run import parameters_on_meta
from mvsplit.utils.config import build


def save(
    config: dict[str, Any],
    run: Path,
    scale: dict[str, float],
    draw: Callable[..., Tensor] = torch.randn,
    data: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of drawn weights, in each kind times its scale; `data` is what the data module recorded."""
    torch.manual_seed(3)
    with parameters_on_meta():
        network = build(config["model"])()
    tensors: dict[str, dict[str, Slice]] = {}
    for kind, factor in scale.items():
        values = {name: factor * draw(value.shape) for name, value in network.state_dict().items()}
        tensors[kind] = {NETWORK + name: Slice.whole(value) for name, value in values.items()}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = run / "checkpoints" / "last-00000005.ckpt"
    path.parent.mkdir()
    state = {"global_step": 5} | ({"TheDataModule": data} if data else {})
    CheckpointWriter(path, state, tensors).run()
    return path


def random_run(config: dict[str, Any], tmp_path: Path, data: dict[str, Any] | None = None) -> Path:
    """Folder of a run of random weights, in the log folder; `data` as above."""
    folder = tmp_path / "logs" / "train" / "runs" / "a"
    folder.mkdir(parents=True)
    save(config, folder, {"weights": 0.1, "ema": 0.2}, data=data)
    return folder
