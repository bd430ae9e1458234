"""The file of results of `src/bench.py gpu`: whole at every moment, and believed only if this benchmark wrote it."""

import json
from pathlib import Path
from typing import Any

from mvsplit.benchmarks.gpu.cases import Case
from mvsplit.utils.errors import UserError

LARGEST_FILE = 16 << 20
"""Bytes of a file of results."""
RESULT: dict[str, Any] = {
    "status": str, "why": str, "checks": dict, "figures": dict, "seconds": (int, float), "key": str,
}  # fmt: skip
"""What is kept of a case."""


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The cases in a file of results.

    Raises:
        UserError: if it is not such a file.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError
        cases = json.loads(path.read_text())["cases"]
        if not all(result.keys() == RESULT.keys() for result in cases.values()):
            raise ValueError
        for result in cases.values():
            if not all(isinstance(result[name], kind) for name, kind in RESULT.items()):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged, or not written by this benchmark; move it away to begin anew") from None
    return cases


class Results:
    """What is known of each case, on disk after each change."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.cases: dict[str, dict[str, Any]] = read_results(path) if path.exists() else {}

    def put(self, case: Case, result: dict[str, Any]) -> None:
        self.cases[case.path] = result
        self._write()

    def drop(self, case: Case) -> None:
        if self.cases.pop(case.path, None) is not None:
            self._write()

    def _write(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps({"machine": self.about, "cases": self.cases}, indent=1))
        partial.replace(self.path)

    def done(self, case: Case, key: str) -> dict[str, Any] | None:
        result = self.cases.get(case.path)
        return result if result is not None and result["key"] == key else None
