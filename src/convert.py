"""Convert a checkpoint to one file of weights: `python src/convert.py [ckpt_path=…] [dtype=bfloat16]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len
from omegaconf import DictConfig

from mvsplit.data.folders import RESOLVERS
from mvsplit.training.settings import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import to_checked
from mvsplit.utils.console import show_table
from mvsplit.utils.run_dirs import find_checkpoint


@dataclass
class ConvertConfig:
    """Top-level keys of `convert.yaml`."""

    task_name: str
    ckpt_path: str
    weights: Annotated[list[Literal["ema", "raw"]], Len(1, 2)]
    dtype: Literal["float32", "bfloat16", "float16"]
    output: str | None
    paths: Paths


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts."""
    return to_checked(cfg, ConvertConfig)


def main(cfg: DictConfig) -> Path:
    """Write the safetensors file, tensor by tensor, and return its path."""
    config = checked(cfg)
    import torch  # after the config is checked, so that mistakes are reported quickly

    from mvsplit.training.checkpoints import convert

    path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
    output = Path(config["output"] or Path(config["paths"]["output_dir"]) / "model.safetensors")
    count = convert(path, output, config["weights"], getattr(torch, config["dtype"]))
    size = f"{output.stat().st_size / 2**30:.3g} GiB"
    rows = {"checkpoint": str(path.resolve()), "tensors": str(count), "size": size, "written to": str(output)}
    show_table("converted", rows)
    return output


if __name__ == "__main__":
    entry.run(main, "convert.yaml", checked, RESOLVERS)
