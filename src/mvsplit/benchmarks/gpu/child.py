"""Functions that run in processes of their own: `python -m mvsplit.benchmarks.gpu.child NAME JSON OUT`.

Each takes plain arguments and returns what JSON can hold.
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import json
import platform
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

PLACES = {
    "machine": "child",
    "host_syncs": "on_device",
    "attention": "on_device",
    "spectral_norm": "on_device",
    "share": "share",
    "plan": "memory",
    "make_latents": "memory",
}
"""Function → module of this package."""


def machine(cpu: bool) -> dict[str, Any]:
    """What this machine is. cpu: leave its GPU alone."""
    about: dict[str, Any] = {"kind": "cpu", "name": "cpu", "torch": torch.__version__, "system": platform.platform()}
    if cpu or not torch.cuda.is_available():
        return about
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    gpu = {"kind": "cuda", "name": properties.name, "gib": properties.total_memory / 2**30, "capability": capability}
    return about | gpu | {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}


def main(name: str, arguments: str, out: str) -> None:
    place = PLACES[name]
    module = sys.modules[__name__] if place == "child" else import_module(f"mvsplit.benchmarks.gpu.{place}")
    function: Callable[..., dict[str, Any]] = getattr(module, name)
    Path(out).write_text(json.dumps(function(**json.loads(arguments)), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
