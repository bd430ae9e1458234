"""Turn a checkpoint into one file of weights: `python src/convert.py [ckpt_path=…] [dtype=bfloat16]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Len
from omegaconf import DictConfig

from mvsplit.training.checkpoints import convert
from mvsplit.training.run import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.console import show_table
from mvsplit.utils.runs import find_checkpoint


@dataclass
class ConvertConfig:
    """Top-level keys of `convert.yaml`."""

    task_name: str
    ckpt_path: str
    weights: Annotated[list[Literal["ema", "raw"]], Len(1, 2)]
    dtype: Literal["float32", "bfloat16", "float16"]
    output: str | None
    paths: Paths


def main(cfg: DictConfig) -> Path:
    """Write the safetensors file, which is returned; tensors pass one by one, whatever the size of the network."""
    config = to_plain(cfg)
    check_config(config, ConvertConfig)
    path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
    output = Path(config["output"] or Path(config["paths"]["output_dir"]) / "model.safetensors")
    count = convert(path, output, config["weights"], getattr(torch, config["dtype"]))
    size = f"{output.stat().st_size / 2**30:.3g} GiB"
    rows = {"checkpoint": str(path.resolve()), "tensors": str(count), "size": size, "written to": str(output)}
    show_table("converted", rows)
    return output


if __name__ == "__main__":
    entry.run(main, "convert.yaml")
