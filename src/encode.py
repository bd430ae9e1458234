"""Re-encode a set, as images, latents or with captions: `python src/encode.py data=… output=… [kind=latents|text]`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import multiprocessing.forkserver
import sys

if __name__ == "__main__" and any(arg.startswith("num_processes=") for arg in sys.argv):
    # The server that forks the workers imports what they need while this process imports the same.
    multiprocessing.set_forkserver_preload(["mvsplit.data.encode", "mvsplit.utils.entry"])
    multiprocessing.forkserver.ensure_running()

# isort: split

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mvsplit.data.encode_settings import Settings
from mvsplit.data.folders import RESOLVERS
from mvsplit.training.settings import Paths
from mvsplit.utils import entry
from mvsplit.utils.config import Seed, build, to_checked
from mvsplit.utils.console import show_table
from mvsplit.utils.errors import UserError


@dataclass
class EncodeConfig(Settings):
    """Top-level keys of `encode.yaml`."""

    task_name: str
    seed: Seed
    data: dict[str, Any]
    autoencoder: dict[str, Any]
    text_encoder: dict[str, Any]
    paths: Paths


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts."""
    config = to_checked(cfg, EncodeConfig)
    if config["captions"] is not None and config["kind"] != "text":
        raise UserError(f"captions = {config['captions']}: a table is only written with kind=text")
    return config


def encode(cfg: DictConfig) -> Path:
    """Write the shards that are missing, then index and manifest, into the folder `output`, and return it."""
    config = checked(cfg)
    from mvsplit.data.encode import encode_sets, encode_table  # here: a mistake in the config is reported at once

    settings = Settings(**{field.name: config[field.name] for field in fields(Settings)})
    encoder = config["text_encoder" if settings.kind == "text" else "autoencoder"]
    if settings.captions is not None:
        shape = " × ".join(map(str, encode_table(encoder, settings)))
        show_table("text written", {"file": settings.output, "table": f"{shape}, the empty caption last"})
        return Path(settings.output)
    manifests = encode_sets(build(config["data"]), encoder, settings)
    rows = {"folder": settings.output}
    for split, manifest in manifests.items():
        left_out = "".join(f", {n} left out: {kind}" for kind, n in manifest["left_out"].items())
        shape = " × ".join(map(str, manifest.get("shape", ["any size"])))
        text = manifest.get("text")
        shape += f" with {text['tokens']} × {text['width']} states of captions" if text else ""
        size = sum(shard["size"] for shard in manifest["shards"]) / 2**30
        shards = f"{len(manifest['shards'])} shards, {size:.3g} GiB"
        rows[split] = f"{manifest['samples']} samples of {shape} in {shards}{left_out}"
    show_table(f"{settings.kind} written", rows)
    return Path(settings.output)


if __name__ == "__main__":
    entry.run(encode, "encode.yaml", checked, RESOLVERS)
