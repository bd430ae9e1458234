"""Commands run by a test: their output, their processes, and whether all of them end."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

BOUND_S = 30
"""Seconds until the last process has ended: a time-out of a few, and the delay of a busy machine."""
ZERO3 = ["trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]


class Job:
    """A running command."""

    def __init__(self, command: list[str], cwd: Path, name: str = "job", **env: str) -> None:
        self.cwd, self.output = cwd, cwd / f"{name}.out"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | env
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def others(self) -> dict[int, int]:
        """Other running processes of this test with a training script: their parents by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                words = (folder / "cmdline").read_text()
            except OSError:
                continue  # has ended meanwhile
            if state not in "ZX" and "train.py" in words and f"{self.cwd}/" in words:
                found[int(folder.name)] = int(parent)
        found.pop(self.process.pid, None)
        return found

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text
            assert self.process.poll() is None, self.text
            time.sleep(0.001)  # saves are short, and some tests wait for one

    def ends(self, seconds: float = BOUND_S) -> int:
        """Its exit status, once every process of it has ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.others():
            assert time.monotonic() < deadline, f"still there: {self.others()}\n{self.text}"
            time.sleep(0.05)
        print(self.text)  # shown by pytest if the test fails
        return self.process.returncode


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]
