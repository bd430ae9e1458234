"""Reports on made-up runs with known numbers: groups, verdicts, comparisons, files."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SRC
from PIL import Image
from stability_traces import CHARACTERS, Trace, collapse, dead, healthy, spike

import report
from mvsplit.reports.report import cell, make_report
from mvsplit.reports.run_discovery import Group, Run, differences, find_groups, read_run, thresholds_of
from mvsplit.reports.verdicts import comparisons, p_value, replay, summarise, summarise_run
from mvsplit.stability.plotting import fit_through_origin, heatmap_image, profile_image
from mvsplit.stability.tables import CHEAP, DEPTH, read_table
from mvsplit.stability.thresholds import Thresholds
from mvsplit.utils.entry import report_user_errors
from mvsplit.utils.errors import UserError

PLANNED = 120


def make_run(
    folder: Path,
    residual: str = "MVSplit",
    seed: int = 0,
    final: float = 0.5,
    collapse: int | None = None,
    steps: int = PLANNED,
    blocks: int = 12,
    **config: Any,
) -> Path:
    """A run folder as training leaves it: a loss that falls to `final`, or a collapse at a step."""
    generator = np.random.default_rng(seed)
    (folder / "stability").mkdir(parents=True)
    node = {"_target_": f"mvsplit.models.residuals.{residual}", "_partial_": True}
    if residual == "MVSplit":
        node |= {"beta_init": "auto"}
    common = {
        "seed": seed, "tags": ["dev"], "residual": node, "optim": {"lr": 4e-3, "warmup_steps": PLANNED // 4},
        "trainer": {"max_steps": PLANNED}, "paths": {"output_dir": str(folder)},
        "callbacks": {"health": {"folder": str(folder)}}, "data": {"folder": "/x/digits", "seed": seed},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(common | config))

    step = np.arange(steps)
    gone = np.zeros(steps) if collapse is None else np.clip((step - collapse + 8) / 8, 0, 1)
    course = {name: np.exp(generator.normal(0, 0.08, steps)) for name in ("step", *CHEAP)}
    loss = final + (1.7 - final) * np.exp(-step / PLANNED * 8)
    course["step"] = step
    course["loss"] = (loss * (1 - gone) + 1.57 * gone) * np.exp(generator.normal(0, 0.004, steps))
    course["rho"] *= 0.65 * 10 ** (6 * gone)
    course["token_cosine"] = np.clip(0.3 + 0.02 * generator.normal(size=steps), 0, 1) * (1 - gone) + gone * 0.9999
    course["grad_norm"] *= 1 + 20 * gone * (1 - gone)
    course["g_mean"] *= 0.02 * 156**gone
    course["g_ctr"] *= 0.03 * 0.5**gone
    course["q_grad"] *= 0.01 * 10 ** (-7 * gone)
    course["k_grad"] *= 0.008 * 10 ** (-7 * gone)
    write(folder / "stability" / "trace.csv", course)

    probed = step[:: PLANNED // 12]
    at, block = (part.ravel() for part in np.meshgrid(probed, np.arange(blocks), indexing="ij"))
    deep = gone[at] * np.clip(2 * block / blocks, 0, 1)
    table = {name: np.exp(generator.normal(0, 0.2, len(at))) for name in DEPTH}
    table["rho"] *= 0.4 * (1 + block / blocks) * 10 ** (6 * deep)
    table["token_cosine"] = 0.1 + 0.3 * block / blocks * (1 - deep) + 0.89 * deep
    table["q_grad"] *= 1e-3 * 10 ** (-7 * deep)
    for writer in ("attention", "ffn"):
        table[f"g_mean_{writer}"] *= 0.01 * 156**deep
        table[f"alignment_{writer}"] = 10 ** generator.uniform(-1.5, 0.3, len(at)) * 8**deep
        table[f"amplification_{writer}"] = 1 + table[f"alignment_{writer}"] * np.exp(generator.normal(0, 0.1, len(at)))
    write(folder / "stability" / "depth.csv", {"step": at, "block": block} | table)
    r2 = 1 - 0.5 * np.exp(-np.arange(blocks) / 2)
    for_t = {"step": np.repeat([PLANNED // 2, steps - 1], blocks), "block": np.tile(np.arange(blocks), 2)}
    write(folder / "stability" / "time_probe.csv", for_t | {"r2": np.concatenate([r2 / 2, r2])})
    return folder


def write(path: Path, table: dict[str, np.ndarray]) -> None:
    rows = zip(*table.values(), strict=True)
    lines = [",".join("" if np.isnan(value) else f"{value:.7g}" for value in row) for row in rows]
    path.write_text("\n".join([",".join(table), *lines]) + "\n")


def test_runs_are_grouped_labelled_and_judged(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        make_run(folder / f"{seed}", "PostNorm", seed, collapse=90 + seed * 4)
        make_run(folder / f"{seed + 2}", "MVSplit", seed, final=0.5 + 0.02 * seed)
        make_run(folder / f"{seed + 10}", "MVSplit", seed, final=0.8, optim={"lr": 1e-3, "warmup_steps": 30})
    summaries, step = summarise(find_groups(folder)[0])
    assert step == PLANNED - 1
    assert [s.group.label for s in summaries] == [
        "residual=PostNorm optim.lr=0.004", "residual=MVSplit optim.lr=0.004", "residual=MVSplit optim.lr=0.001"
    ]  # fmt: skip
    assert [s.group.seeds for s in summaries] == [[0, 1]] * 3
    assert [s.verdicts for s in summaries] == ["2 of 2 collapsed", "2 of 2 alive", "2 of 2 alive"]
    dead, alive = summaries[0].runs[1], summaries[1].runs[0]
    assert 86 <= (dead.event or 0) <= 94
    assert dead.loss == pytest.approx(1.57, abs=0.01)
    assert dead.token_cosine == pytest.approx(0.9999)
    assert dead.rho == pytest.approx(6.5e5, rel=0.2)
    assert dead.q_ratio == pytest.approx(1e-7, rel=0.2)
    assert dead.g_ratio == pytest.approx(0.02 * 156 / 0.015, rel=0.3)
    assert alive.event is None
    assert alive.loss == pytest.approx(0.5, abs=0.01)
    assert alive.q_ratio == pytest.approx(1, rel=0.2)


def test_labels_by_own_tags_and_arguments_only_within_a_class(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "PostNorm", tags=["lab", "baseline"])
    make_run(tmp_path / "1", "MVSplit", tags=["lab", "split"])
    assert [group.label for group in find_groups(tmp_path)[0]] == ["baseline", "split"]
    flats = [{"residual": "A", "residual.x": 1}, {"residual": "B", "residual.y": 2}, {"residual": "B", "residual.y": 3}]
    assert differences(flats) == ["residual=A", "residual=B residual.y=2", "residual=B residual.y=3"]


@pytest.mark.parametrize(
    ("verdict", "change"),
    [
        ("not learning", lambda t: t["loss"].__imul__(0) + t["loss"].__iadd__(1.6)),
        ("unsteady", lambda t: t["loss"][60:80].__imul__(2)),
        ("collapsing", lambda t: t["q_grad"][80:].__imul__(1e-6)),  # an onset; but tokens differ, so it is not dead
        ("unsteady", lambda t: t["q_grad"][60:70].__imul__(1e-6)),  # an onset, then a recovery
        ("alive", lambda t: t["token_cosine"].fill(np.nan)),
    ],
)
def test_verdicts(tmp_path: Path, verdict: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    run = read_run(make_run(tmp_path / "run"))
    change(run.trace)
    (summary,), _ = summarise([Group("run", [run])])
    assert summary.runs[0].verdict == verdict


def verdict_of(trace: Trace, **config: Any) -> tuple[str, int | None]:
    """The report's verdict on a trace, and the step of the collapse."""
    trace = {"k_grad": trace["q_grad"]} | trace
    summary = summarise_run(Run(Path(), config, trace, thresholds=thresholds_of(config)), int(trace["step"][-1]))
    return summary.verdict, summary.event


def test_the_report_and_the_detector_agree_on_what_dies() -> None:
    """As in the ablation: Post-Norm dies late, or from the start with standard writers; others live or do not learn."""
    for seed, character in enumerate(CHARACTERS):
        trace = healthy(seed, 460, **CHARACTERS[character])
        assert verdict_of(trace)[0] == "alive", character
        assert verdict_of(spike(trace, 400))[0] == "alive", character
        collapsed = collapse(trace, 400, seed)
        assert verdict_of(collapsed) == ("collapsed", 400)
        assert next(e.step for e in replay(collapsed, Thresholds())[1] if e.kind == "onset") == 400
    assert verdict_of(dead(0)) == ("collapsed", pytest.approx(12, abs=12))
    assert verdict_of(healthy(0, 200, final=1.5)) == ("not learning", None)


def test_the_verdict_follows_the_thresholds_of_the_runs_config() -> None:
    trace = healthy(0, 460)
    trace["token_cosine"][400:], trace["loss"][400:] = 0.97, 1.15
    for node in (
        {"monitor": {"thresholds": {"cosine_dead": 0.96, "patience": 20}}},
        {"guard": {"_target_": "x", "cosine_dead": 0.96, "patience": 20, "action": "warn"}},
    ):
        assert thresholds_of({"callbacks": node}) == Thresholds(cosine_dead=0.96, patience=20)
        assert verdict_of(trace, callbacks=node) == ("collapsed", 400)
    for other in ({}, {"callbacks": None}, {"callbacks": {"guard": None, "monitor": "x"}}):
        assert thresholds_of(other) == Thresholds()
        assert verdict_of(trace, **other) == ("collapsing", 400)
    for wrong in (-1, 0, True, "1", [1], 1.5, 10**7, float("nan")):
        with pytest.raises(UserError, match=r"^detector threshold window = "):
            thresholds_of({"callbacks": {"guard": {"window": wrong}}})


def test_a_healthy_run_that_is_short_is_alive(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / str(seed), seed=seed, steps=12, trainer={"max_steps": 12})
    summaries, _ = summarise(find_groups(tmp_path)[0])
    assert summaries[0].verdicts == "2 of 2 alive"
    assert comparisons(summaries) == []


def test_steps_done_again_count_once_and_the_last_run_of_a_seed(tmp_path: Path) -> None:
    for name in ("0", "1"):
        make_run(tmp_path / name, steps=PLANNED if name == "1" else 50)
    trace = tmp_path / "1" / "stability" / "trace.csv"
    lines = trace.read_text().splitlines()
    trace.write_text("\n".join([*lines[:61], *lines[41:], "7,0."]))  # a resume at step 40; a row half written
    groups, notes = find_groups(tmp_path)
    assert groups[0].runs[0].trace["step"].tolist() == list(range(PLANNED))
    assert notes == ["0: left out, another run has its config and seed"]


def test_the_p_value_is_that_of_welchs_test() -> None:
    assert p_value([0.50, 0.51, 0.52], [0.60, 0.61, 0.62]) == pytest.approx(0.000254, rel=0.01)
    assert p_value([0.50, 0.55, 0.60], [0.52, 0.57, 0.63]) == pytest.approx(0.61, abs=0.02)
    assert p_value([0.5, 0.5], [0.5, 0.5]) == 1
    assert p_value([0.5, 0.5], [0.6, 0.6]) == 0


def test_comparisons(tmp_path: Path) -> None:
    for label, finals in {"a": (0.50, 0.55, 0.60), "b": (0.52, 0.57, 0.62), "c": (0.90, 0.91, 0.92)}.items():
        for seed, final in enumerate(finals):
            make_run(tmp_path / label / str(seed), seed=seed, final=final, tags=[label], data={"batch": label})
    summaries, _ = summarise(find_groups(tmp_path)[0])
    one, two = comparisons(summaries)
    assert re.fullmatch(
        r"No significant difference in final loss between a \(0\.55\d*\) and b \(0\.57\d*, p = 0\.6\d?\)\.", one
    )
    assert re.fullmatch(r"Significantly higher final loss than a \(0\.55\d*\): c \(0\.9\d*, p = 0\.00\d*\)\.", two)
    single, _ = summarise([Group("d", summaries[2].group.runs[:1])])
    assert comparisons([summaries[0], *single]) == ["Not tested, because only one run can be compared: d."]
    make_run(tmp_path / "e" / "0", collapse=90, tags=["e"], data={"batch": "e"})
    *_, last = comparisons(summarise(find_groups(tmp_path)[0])[0])
    assert last == "Not compared: e (1 of 1 collapsed)."


def test_fit_through_the_origin() -> None:
    x = np.array([1.0, 2.0, 3.0, np.nan])
    assert fit_through_origin(x, 2 * x) == (2.0, 1.0, 3)
    slope, r2, _ = fit_through_origin(np.array([1.0, 1.0, 2.0]), np.array([1.0, 3.0, 4.0]))
    assert slope == pytest.approx(2)
    assert r2 == pytest.approx(1 - 2 / (14 / 3))


@pytest.mark.parametrize("log", [False, True])
def test_images_for_tensorboard(log: bool) -> None:
    steps, blocks = np.arange(0, 100, 10.0), np.arange(20.0)
    values = np.full((10, 20), 1.0)
    values[:, 10:] = 100.0
    values[5:] = np.nan
    image = heatmap_image(values, steps, blocks, "ρ", log)
    assert image.shape == (3, 340, 500)
    assert image.dtype == np.uint8
    low, high, grey = image[:, 250, 100], image[:, 80, 100], image[:, 150, 350]
    assert len({tuple(low), tuple(high), tuple(grey)}) == 3
    assert grey.tolist() == [0xBD] * 3
    assert profile_image(values, steps, blocks, "ρ", log).shape == (3, 340, 500)
    assert heatmap_image(values * np.nan, steps, blocks, "ρ", log).shape == (3, 340, 500)


def test_cells() -> None:
    assert cell([0.5, 0.52, float("nan")]) == "0.510 ± 0.014 (0.500…0.520)"
    assert cell([1.0, 100.0], geometric=True) == "10 (1…100)"
    assert cell([float("nan")]) == "–"


def test_report_end_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        make_run(folder / f"{seed}", "PostNorm", seed, collapse=90)
        make_run(folder / f"{seed + 2}", "MVSplit", seed, steps=PLANNED if seed == 0 else 40)
    for name in ("depth", "time_probe"):
        (folder / "2" / "stability" / f"{name}.csv").unlink()
    (folder / "4" / ".hydra").mkdir(parents=True)
    command = [sys.executable, str(SRC / "report.py"), str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    text = (folder / "report" / "report.md").read_text()
    assert "| residual=PostNorm | 0, 1 | 2 of 2 collapsed | 83 |" in text
    assert "| residual=MVSplit | 0, 1 | 1 of 2 alive, 1 of 2 stopped | – | 0.50" in text
    assert "- 3: 40 of 120 steps, interrupted or still running" in text
    assert "- 2: no depth.csv" in text
    assert "- 4: left out, it has no stability/trace.csv" in text
    assert "2 of 2 collapsed" in done.stdout
    assert str(folder / "report" / "report.md") in done.stdout
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert len(pictures) == 8
    for name in pictures:
        with Image.open(folder / "report" / name) as picture:
            assert min(picture.size) > 250
            assert max(picture.size) < 2500


def test_an_ablations_variants_are_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvsplit.reports.report.draw_all", lambda *_: [])
    plan = [
        {"name": "gain_1", "question": "Which gain?", "overrides": ["residual.beta_init=1"]},
        {"name": "base", "question": "What is compared with?", "overrides": []},
        {"name": "gain_2", "question": "Which gain?", "overrides": ["residual.beta_init=2"]},
        {"name": "later", "question": "Which gain?", "overrides": ["residual.beta_init=3"]},
    ]
    (tmp_path / "ablation.json").write_text(json.dumps({"variants": plan}))
    for name in ("base", "gain_1", "gain_2"):
        make_run(tmp_path / name / "seed_0")
    made = make_report(tmp_path, tmp_path / "out")
    assert [title for title, _, _ in made.tables] == ["Which gain?", "What is compared with?"]
    _, header, rows = made.tables[0]
    assert header[-1] == "overrides"
    assert [(row[0], row[-1]) for row in rows] == [
        ("base", ""), ("gain_1", "residual.beta_init=1"), ("gain_2", "residual.beta_init=2")
    ]  # fmt: skip
    assert "later: planned in ablation.json, no run yet" in made.notes
    (tmp_path / "ablation.json").write_text("{}")
    with pytest.raises(UserError, match="not a list of variants"):
        make_report(tmp_path)


def test_mistakes_are_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = [str(tmp_path / "none")]
    for argv, line in (none, "no such folder"), ([str(tmp_path)], "no run with a stability/trace.csv"), ([], "FOLDER"):
        with pytest.raises(SystemExit, match="2"), report_user_errors():
            report.main(argv)
        assert line in (line_shown := capsys.readouterr().err)
        assert line_shown.count("\n") == 1
    (tmp_path / "table.csv").write_text("step,loss\n0,1\n1,x\n")
    with pytest.raises(UserError, match=r"table\.csv, line 3"):
        read_table(tmp_path / "table.csv")


def test_a_setting_may_be_zero_or_absent() -> None:
    run = Run(Path(), {"optim": {"warmup_steps": 0}, "seed": None}, {})
    assert (run.setting("optim.warmup_steps", 5), run.setting("seed", 1), run.setting("a.b", 2)) == (0, 1, 2)
