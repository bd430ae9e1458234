"""Write a set anew, as pictures of one size or as latents: `python src/encode.py data=… output=… [kind=latents]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import multiprocessing.forkserver
import sys

if __name__ == "__main__" and any(arg.startswith("num_processes=") for arg in sys.argv):
    # The server that forks our processes imports what they need while we import the same.
    multiprocessing.set_forkserver_preload(["mvsplit.data.encode", "mvsplit.utils.entry"])
    multiprocessing.forkserver.ensure_running()

# isort: split

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mvsplit.data.encode import Settings, encode_sets
from mvsplit.training.run import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import build, check_config, to_plain
from mvsplit.utils.console import show_table
from mvsplit.utils.rng import Seed


@dataclass
class EncodeConfig(Settings):
    """Top-level keys of `encode.yaml`."""

    task_name: str
    seed: Seed
    data: dict[str, Any]
    autoencoder: dict[str, Any]
    paths: Paths


def encode(cfg: DictConfig) -> Path:
    """Write the shards that are missing, then index and manifest, into the folder `output`, which is returned."""
    config = to_plain(cfg)
    check_config(config, EncodeConfig)
    settings = Settings(**{field.name: config[field.name] for field in fields(Settings)})
    manifests = encode_sets(build(config["data"]), config["autoencoder"], settings)
    rows = {"folder": settings.output}
    for split, manifest in manifests.items():
        left_out = "".join(f", {n} left out: {kind}" for kind, n in manifest["left_out"].items())
        shape = " × ".join(map(str, manifest["shape"]))
        size = sum(shard["size"] for shard in manifest["shards"]) / 2**30
        shards = f"{len(manifest['shards'])} shards, {size:.3g} GiB"
        rows[split] = f"{manifest['samples']} samples of {shape} in {shards}{left_out}"
    show_table(f"{settings.kind} written", rows)
    return Path(settings.output)


if __name__ == "__main__":
    entry.run(encode, "encode.yaml")
