"""The structure of src/: one name per file, no long files, imports that only go down."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvsplit.utils.run_dirs import PROJECT_ROOT

SRC = PROJECT_ROOT / "src"
ROOMS = ("utils", "kernels", "models", "flow", "stability", "data", "training", "evaluation", "python", "callbacks",
         "reports", "benchmarks")  # fmt: skip
"""Lowest first; the scripts are above all of them."""
PURE = ("kernels", "models", "flow", "stability")
"""Rooms without a framework: they run in a notebook."""
FILES = sorted(SRC.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in (SRC / "mvsplit").rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_files_are_short() -> None:
    lengths = {path.relative_to(SRC).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 320} == {}


def test_imports_only_go_down() -> None:
    up = []
    for path in FILES:
        parts = path.relative_to(SRC).with_suffix("").parts
        if parts[0] != "mvsplit" or parts[1] == "__init__":  # a script, or the package's face
            continue
        assert parts[1] in ROOMS, f"{path}: add its room to ROOMS"
        for name in imports(path):
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "mvsplit" and room in ROOMS and ROOMS.index(room) > ROOMS.index(parts[1]):
                up.append(f"{'/'.join(parts)} imports {name}")
    assert up == [], "\n".join(up)


@pytest.mark.parametrize("room", PURE)
def test_formulas_import_no_framework(room: str) -> None:
    known = {name.partition(".")[0] for path in (SRC / "mvsplit" / room).rglob("*.py") for name in imports(path)}
    assert known.isdisjoint({"lightning", "hydra", "omegaconf", "deepspeed", "tensorboard", "wandb"})
