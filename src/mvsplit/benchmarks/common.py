"""What benchmarks share: the keys that each of them has, and training runs in processes of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveInt

from mvsplit.utils.rng import Seed
from mvsplit.utils.runs import PROJECT_ROOT


@dataclass
class RoundsConfig:
    """Top-level keys of a benchmark whose contestants take turns."""

    task_name: str
    ckpt_path: None
    seed: Seed
    rounds: PositiveInt
    paths: Any


def train_apart(overrides: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run `src/train.py` with these overrides, and these variables beside the present ones.

    Returns:
        Its exit status and the last line that it said, on stderr if anything was.
    """
    command = [sys.executable, str(PROJECT_ROOT / "src" / "train.py"), *overrides]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
    return done.returncode, lines[-1]
