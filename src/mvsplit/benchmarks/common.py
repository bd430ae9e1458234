"""Shared by the benchmarks: their common keys, training runs in separate processes, and writing results."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt

from mvsplit.models.compiled import missing_for_compiling
from mvsplit.utils.allowed import FILE, owners_list
from mvsplit.utils.config import Seed
from mvsplit.utils.console import info
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file
from mvsplit.utils.run_dirs import PROJECT_ROOT


@dataclass
class RoundsConfig:
    """Top-level keys of a benchmark whose candidates are measured in turns."""

    task_name: str
    ckpt_path: None
    seed: Seed
    rounds: PositiveInt
    paths: Any


def train_in_process(overrides: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run `src/train.py` with these overrides and additional environment variables.

    Returns:
        Its exit status, and the last line of its stderr, or of its stdout if stderr is empty.
    """
    command = [sys.executable, str(PROJECT_ROOT / "src" / "train.py"), *overrides]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
    return done.returncode, lines[-1]


def override(key: str, value: object) -> str:
    """A Hydra override whose value, usually a path, may contain any of `, = ' [`."""
    quoted = re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + match[2].replace("'", r"\'"), str(value))
    return f"{key}='{quoted}'"


def check_device(name: str) -> None:
    """Raise `UserError` if the key `device` asks for a GPU that is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda: this machine has no usable GPU; use auto or cpu")


def check_machine(config: dict[str, Any], compile: bool = True) -> None:
    """Check the keys `device` and `against`, and that blocks can be compiled.

    Raises:
        UserError: for a missing GPU or compiler, or a function that is not allowed.
    """
    check_device(config["device"])
    if compile and (missing := missing_for_compiling()):
        raise UserError(f"this machine cannot compile blocks: {missing.partition(';')[0]}")
    if config["against"]:
        other_merge(config["against"])


def other_merge(name: str) -> Callable[..., Any]:
    """The function `package.module:function`, if this checkout's owner allows it.

    Raises:
        UserError: if it is not in the allow-list, or does not exist.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"against = {name}: must be package.module:function")
    if f"{module}.{function}" not in owners_list().targets:
        raise UserError(f"against = {name}: must be in {FILE.relative_to(PROJECT_ROOT)}, as {module}.{function}")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"against = {name}: not found ({error})") from error
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def save_figures(result: dict[str, Any], path: Path) -> None:
    """Write a benchmark's figures and print the path."""
    write_json(path, result)
    info(f"figures          {path}")
