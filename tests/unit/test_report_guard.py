"""`report.py guard`: dialects of tables, TensorBoard folders, thresholds of a run, and mistakes."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SRC
from stability_traces import collapse, healthy, rows
from torch.utils.tensorboard import SummaryWriter

import report
from mvsplit.reports.traces import read_trace
from mvsplit.stability.tables import read_table
from mvsplit.utils.errors import UserError

NAMES = ("loss", "grad_norm", "g_mean", "g_ctr", "q_grad", "rho", "token_cosine")
TRACE = collapse(healthy(0, 460), 400)


@pytest.fixture
def replayed(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], dict[str, Any]]:
    def replay(path: Path) -> dict[str, Any]:
        report.main(["guard", str(path)])
        lines = capsys.readouterr().out.splitlines()
        result: dict[str, Any] = json.loads(lines[-1])
        assert len(lines) == len(result["events"]) + 1
        for line, event in zip(lines, result["events"], strict=False):
            assert line == f"step {event['step']}: {event['kind']}, {event['why']}"
        return result

    return replay


def write(path: Path, names: tuple[str, ...] = NAMES, mark: str = ",", order: list[int] | None = None) -> Path:
    lines = [mark.join(["step", *names])]
    for i in order or range(len(TRACE["step"])):
        lines.append(mark.join([str(int(TRACE["step"][i])), *(f"{TRACE[name][i]:.6g}" for name in names)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def kinds(result: dict[str, Any]) -> list[tuple[int, str]]:
    return [(e["step"], e["kind"]) for e in result["events"] if e["kind"] != "spike"]


def test_a_collapse_in_a_table(replayed: Any, tmp_path: Path) -> None:
    result = replayed(write(tmp_path / "trace.csv"))
    assert result["steps"] == 460
    assert [kind for _, kind in kinds(result)] == ["onset", "dead"]
    assert kinds(result)[0][0] == 400


def test_dialects_say_the_same(replayed: Any, tmp_path: Path) -> None:
    plain = replayed(write(tmp_path / "plain.csv"))
    text = (tmp_path / "plain.csv").read_text()
    (tmp_path / "bom.csv").write_text("\ufeff" + text.replace(",", " , ").replace("\n", "\r\n"), encoding="utf-8")
    (tmp_path / "semicolons.csv").write_text(text.replace(",", ";"))
    (tmp_path / "quotes.csv").write_text("\n".join(",".join(f'"{c}"' for c in x.split(",")) for x in text.split("\n")))
    (tmp_path / "blank.csv").write_text(text.replace("\n", "\n\n"))
    write(tmp_path / "order.csv", tuple(reversed(NAMES)))
    for name in ("bom", "semicolons", "quotes", "blank", "order"):
        result = replayed(tmp_path / f"{name}.csv")
        assert result == plain, name
    lines = text.splitlines()
    (tmp_path / "more.csv").write_text(
        "\n".join(f"{line},{'time' if not i else 'noon'}" for i, line in enumerate(lines))
    )
    assert replayed(tmp_path / "more.csv") == plain


def test_rows_written_again_after_a_resume_count(replayed: Any, tmp_path: Path) -> None:
    plain = replayed(write(tmp_path / "plain.csv"))
    path = write(tmp_path / "again.csv", order=[*range(300), *range(250, 460)])
    first, rest = path.read_text().split("\n250,", 1)
    path.write_text(first + "\n250,9,9,9,9,9,9,9\n" + "250," + rest)
    assert replayed(path) == plain
    mixed = list(np.random.default_rng(0).permutation(460))
    assert replayed(write(tmp_path / "mixed.csv", order=mixed)) == plain


def test_cells_that_are_empty_or_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,loss,rho\n0,1.5,\n1,nan,NaN\n2,inf,-Infinity\n3,,2e-1\n4\n")
    table = read_table(path)
    assert table["step"].tolist() == [0, 1, 2, 3, 4]
    assert table["loss"].dtype == np.float64
    assert math.isnan(table["rho"][0])
    assert table["loss"][2] == math.inf
    assert table["rho"][3] == 0.2
    assert math.isnan(table["loss"][4])
    assert len(read_trace(path)["step"]) == 5


def test_a_run_folder_and_a_tensorboard_folder(replayed: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "stability").mkdir(parents=True)
    expected = replayed(write(tmp_path / "run" / "stability" / "trace.csv"))
    assert replayed(tmp_path / "run") == expected

    writer = SummaryWriter(str(tmp_path / "tb" / "tensorboard"))
    for step, row in rows(TRACE):
        for name, value in row.items():
            prefix = {"loss": "train/", "grad_norm": "train/"}.get(name, "stability/")
            writer.add_scalar(prefix + name, value, step)
        if step % 50 == 0:
            writer.add_scalar("val/loss", 99.0, step)
            writer.add_scalar("train/lr", 1.0, step)
    writer.close()
    result = replayed(tmp_path / "tb")
    assert result["steps"] == 460
    assert kinds(result) == kinds(expected)


def test_the_thresholds_of_a_run_folder_are_those_of_its_config(replayed: Any, tmp_path: Path) -> None:
    (tmp_path / "stability").mkdir()
    write(tmp_path / "stability" / "trace.csv")
    dead = [step for step, kind in kinds(replayed(tmp_path)) if kind == "dead"]
    (tmp_path / "config.yaml").write_text("callbacks: {guard: {patience: 30}}")
    assert [step for step, kind in kinds(replayed(tmp_path)) if kind == "dead"] == [dead[0] + 15]
    (tmp_path / "config.yaml").write_text("callbacks: {guard: {patience: -1}}")
    with pytest.raises(UserError, match="detector threshold patience = -1: must be a positive number"):
        report.main(["guard", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("loss,rho\n1,2\n", "line 1: no column 'step'"),
        ("step,time\n1,2\n", "no statistics; at least one of the columns loss, grad_norm"),
        ("step,loss\n", "no rows below the header"),
        ("step,loss\n1,\n2,nan\n", "all cells of loss are empty"),
        ("step,loss\n,1\n", "no row has a step"),
        ("step,loss\n1,2\n2,twelve\n", "line 3: loss = 'twelve': must be a number or empty"),
        ("step,loss\n1,__import__('os').system('true')\n", "line 2"),
        ("step,loss\n1,2,3\n", "line 2: 3 cells, the header has 2"),
        ("step,loss,loss\n1,2,3\n", "column 'loss' occurs twice"),
        ("step,loss\n1e300,2\n", "steps must not exceed 2^53"),
    ],
)
def test_mistakes_are_reported(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        report.main(["guard", str(path)])
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_other_mistakes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("t.csv", "not a text file"),
        ("none", "no such file"),
        ("empty", "no TensorBoard event files"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(["guard", str(tmp_path / path)])
    (tmp_path / "empty" / "events.out.tfevents.1").write_bytes(b"nonsense" * 100)
    with pytest.raises(UserError, match="none of the scalars"):
        report.main(["guard", str(tmp_path / "empty")])
    for arguments in ([], ["other"], ["guard"], ["guard", "a", "b"]):
        with pytest.raises(UserError):
            report.main(arguments)


def test_the_script_ends_with_one_line_and_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SRC / "report.py"), "guard", str(tmp_path / "none.csv")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.csv'}: no such file or folder\n"
