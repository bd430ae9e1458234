"""Convert weights: `python src/convert.py [ckpt_path=… | release=…] [export=true | hub=true license=…] [output=…]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Len
from hydra import compose
from omegaconf import DictConfig
from pydantic import PositiveInt, StringConstraints

from mvsplit.data.folders import RESOLVERS
from mvsplit.training.settings import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import to_checked, to_plain
from mvsplit.utils.console import show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import find_checkpoint

if TYPE_CHECKING:  # imported below, after the config is checked, so that mistakes are reported quickly
    from mvsplit.training.weight_sources import Source

RELEASED = ("data=imagenet_latents", "model=digits", "residual=mvsplit_1000l", "flow=paper")
"""The groups that describe a release, besides the sizes that its file shows."""


@dataclass
class ConvertConfig:
    """Top-level keys of `convert.yaml`."""

    task_name: str
    ckpt_path: str
    release: str | None
    num_heads: PositiveInt | None
    weights: Annotated[list[Literal["ema", "raw"]], Len(1, 2)]
    dtype: Literal["float32", "bfloat16", "float16"] | None
    export: bool
    hub: bool
    license: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.+-]{0,60}$")] | None
    metrics: str | None
    shard_gb: Annotated[float, Gt(0)]
    output: str | None
    paths: Paths


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts."""
    config = to_checked(cfg, ConvertConfig)
    if config["export"] and (config["hub"] or config["release"] is not None):
        other = "hub = True" if config["hub"] else f"release = {config['release']}"
        raise UserError(f"export = True: writes a network of this project as a release; not together with {other}")
    if config["hub"] and config["license"] is None:
        raise UserError("license = None: hub=true needs the identifier of a licence, e.g. license=mit")
    for key in ("license", "metrics"):
        if config[key] is not None and not config["hub"]:
            raise UserError(f"{key} = {config[key]}: only used with hub=true")
    if config["num_heads"] is not None and config["release"] is None:
        raise UserError(f"num_heads = {config['num_heads']}: only used with release=…")
    return config


def main(cfg: DictConfig) -> Path:
    """Write the file or folder, tensor by tensor, and return its path."""
    config = checked(cfg)
    import torch  # after the config is checked, so that mistakes are reported quickly

    from mvsplit.training import conversion

    dtype = None if config["dtype"] is None else getattr(torch, config["dtype"])
    kind = "export" if config["export"] else "hub" if config["hub"] else "file"
    name = {"export": "model.pt", "hub": "model", "file": "model.safetensors"}[kind]
    output = Path(config["output"] or Path(config["paths"]["output_dir"]) / name)
    origin, sources = sources_of(config, single=kind != "file")
    if kind == "export":
        count = conversion.export(next(iter(sources.values())), output, dtype)
    elif kind == "hub":
        metrics = None if config["metrics"] is None else Path(config["metrics"])
        count = conversion.write_hub(sources, output, dtype, config["license"], metrics, config["shard_gb"])
    else:
        count = conversion.write_file(sources, output, dtype)
    written = [output] if output.is_file() else list(output.iterdir())
    size = f"{sum(file.stat().st_size for file in written) / 2**30:.3g} GiB"
    rows = {"checkpoint": str(origin.resolve()), "tensors": str(count), "size": size, "written to": str(output)}
    show_table("converted", rows)
    return output


def sources_of(config: dict[str, Any], single: bool) -> "tuple[Path, Mapping[str, Source]]":
    """Where the weights are, and the weights by the prefix of their names.

    Args:
        config: the checked config.
        single: only the first of `weights`.
    """
    from mvsplit.training.release_layout import open_release
    from mvsplit.training.weight_sources import open_sources

    if config["release"] is not None:
        cfg = compose("train.yaml", list(RELEASED))
        cfg.paths = config["paths"]
        base, path = to_plain(cfg), Path(config["release"])
        return path, {"": open_release(path, config["num_heads"], base, base["data"]["image_size"])}
    path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
    return path, open_sources(path, config["weights"][:1] if single else config["weights"])


if __name__ == "__main__":
    entry.run(main, "convert.yaml", checked, RESOLVERS)
