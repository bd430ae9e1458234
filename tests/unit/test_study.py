"""What a study trains next, and what its report concludes, from results made here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose_config

from mvsplit.benchmarks import study
from mvsplit.reports import study_cells, study_report
from mvsplit.reports.study_cells import Cell, Ending
from mvsplit.training import settings
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.entry import plain_overrides
from mvsplit.utils.errors import UserError


def config(kind: str, *overrides: str) -> dict[str, Any]:
    plain = to_plain(compose_config("paths.output_dir=/x", *overrides, name=f"study_{kind}.yaml"))
    check_config(plain, {"depth": study.DepthConfig, "residuals": study.ResidualConfig}[kind])
    return plain


def lives(loss: float) -> Ending:
    return Ending("alive", loss, 0.3, {"sample/fid": 10 * loss, "sample/seconds": 0.01}, 60.0)


def dies(cosine: float = 1.0) -> Ending:
    return Ending("collapsed", 1.5, cosine, {}, 60.0)


def cell(**by_rate: Ending) -> Cell:
    """`cell(r1=…, r4=…)`: the first seed's study_cells."""
    return Cell("tokens_16", "mvsplit", [0, 1], endings={float(name[1:]): {0: one} for name, one in by_rate.items()})


def finish(folder: Path, run: Any, loss: float, cosine: float = 0.3) -> None:
    """Write the files of a finished run of 40 steps, whose loss falls from 1.6 to `loss`."""
    (run.folder / "stability").mkdir(parents=True)
    rows = [f"{step},{1.6 + (loss - 1.6) * min(1, step / 15)},1.0,{cosine}" for step in range(40)]
    (run.folder / "stability" / "trace.csv").write_text("\n".join(["step,loss,grad_norm,token_cosine", *rows]) + "\n")
    (run.folder / "config.yaml").write_text(f"trainer: {{max_steps: 40}}\nseed: {run.seed}\n")
    metrics = {"val/loss": loss + 0.01 * run.seed, "sample/fid": 10 * loss, "sample/seconds": 0.02}
    result = {"status": "finished", "why": "", "metrics": metrics, "seconds": 36.0, "versions": {},
              "overrides": list(run.overrides)}  # fmt: skip
    (run.folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("kind", ["depth", "residuals"])
def test_every_run_of_a_study_has_a_valid_config(kind: str) -> None:
    plan = (study.depth_plan if kind == "depth" else study.residual_plan)(config(kind))
    setting, method = next(iter(plan.settings)), next(iter(plan.config["methods"]))
    pairs = [(setting, name) for name in plan.config["methods"]] + [(name, method) for name in plan.settings]
    for run in [plan.run(*pair, rate=1, seed=0) for pair in pairs]:
        plain = to_plain(compose_config("paths.output_dir=/x", *plain_overrides(list(run.overrides))))
        check_config(plain, settings.TrainConfig)
        settings.check_together(plain)
        assert plain["optim"]["lr"] == plan.config["lr"]


def test_at_least_ten_methods_are_compared_at_seven_rates() -> None:
    plain = config("residuals")
    assert len(plain["methods"]) >= 10
    assert plain["rates"] == [0.25, 0.5, 1, 2, 4, 8, 16]
    assert plain["seeds"] == [0, 1, 2]


def test_imagenet_presets_are_studied_by_the_same_command() -> None:
    plan = study.depth_plan(config("depth", "study=imagenet256"))
    assert list(plan.settings) == ["depth_1000", "depth_400", "depth_64", "depth_28"]
    overrides = list(plan.run("depth_1000", "mvsplit", 1, 0).overrides)
    plain = to_plain(compose_config("paths.output_dir=/x", *plain_overrides(overrides)))
    check_config(plain, settings.TrainConfig)
    settings.check_together(plain)
    assert (plain["model"]["depth"], plain["model"]["width"], plain["trainer"]["devices"]) == (1000, 1024, 8)


def test_equal_compute_gives_every_depth_the_same_blocks_times_steps(tmp_path: Path) -> None:
    keys = ["depths=[4,16,64,256]", "steps=128", "equal_compute=64", f"folder={tmp_path}"]  # not the own runs
    plan = study.depth_plan(config("depth", *keys))
    runs = [plan.run(f"compute_{depth}", "mvsplit", 1, 0) for depth in (4, 16, 256)]
    found = [dict(o.split("=", 1) for o in run.overrides) for run in runs]
    assert [int(f["model.depth"]) * int(f["trainer.max_steps"]) for f in found] == [64 * 128] * 3
    assert "compute_64" not in plan.settings
    # Three methods; four rates and two more seeds; three seeds.
    assert plan.cost(plan.left()) == 3 * (6 * 128 * (4 + 16 + 64 + 256) + 3 * 3 * 64 * 128)
    with pytest.raises(UserError, match=r"^steps = 100: 3 blocks cannot have the compute of equal_compute = 64"):
        study.depth_plan(config("depth", "depths=[3,256]", "steps=100", "equal_compute=64"))


def test_rates_rise_until_a_method_fails_where_a_lower_rate_lived() -> None:
    rates = [4, 1, 0.25, 16]
    assert cell().next_rate(rates) == 0.25
    assert cell(**{"r0.25": lives(0.9)}).next_rate(rates) == 1
    assert cell(**{"r0.25": lives(0.9), "r1": lives(0.7)}).next_rate(rates) == 4
    assert cell(**{"r0.25": lives(0.9), "r1": dies()}).next_rate(rates) is None
    # A low rate that learns nothing yet does not end the search; two in a row do.
    assert cell(**{"r0.25": dies(0.2)}).next_rate(rates) == 1
    assert cell(**{"r0.25": dies(), "r1": dies()}).next_rate(rates) is None
    assert cell(**{"r0.25": dies(), "r1": lives(0.8)}).next_rate(rates) == 4
    # Learning nothing at low rates is not dying.
    slow = Ending("not learning", 1.4, 0.2, {}, 60.0)
    assert cell(**{"r0.25": slow, "r1": slow}).next_rate(rates) == 4
    assert cell(**{"r0.25": slow, "r1": slow, "r4": dies(), "r16": dies()}).next_rate(rates) is None
    # A rate below a failure that was skipped by an earlier command is tried.
    assert cell(**{"r0.25": lives(0.9), "r4": dies()}).next_rate(rates) == 1


def test_the_best_rate_and_its_valley_are_of_those_that_live() -> None:
    one = cell(**{"r0.25": lives(0.80), "r1": lives(0.65), "r4": lives(0.60), "r16": dies(0.1)})
    assert one.best_rate == 4
    assert one.valley == [1, 4]  # up to 1.1 × 0.60
    assert one.first_failure is not None
    assert (one.first_failure[0], one.first_failure[1].failure) == (16, "dies otherwise (cosine 0.10)")
    assert cell(r1=dies()).best_rate is None
    assert not one.at_edge
    assert cell(r1=lives(0.8), r4=lives(0.7)).at_edge
    assert not cell(r1=dies()).at_edge
    assert dies().failure == "mean mode (cosine 1.00)"


def test_a_study_goes_from_rates_to_seeds_and_resumes_anywhere(tmp_path: Path) -> None:
    keys = ["methods={mvsplit:[residual\\=mvsplit]}", "rates=[1,4]", "seeds=[0,1,2]", f"folder={tmp_path}", "only=null"]
    plain = config("residuals", *keys[1:]) | {"methods": {"mvsplit": ["residual=mvsplit"]}, "settings": {"one": []}}
    plan = study.residual_plan(plain)
    seen = []
    assert plan.left() == {"one": 4}
    while ready := plan.ready():
        seen.append([f"{run.variant[12:]} {run.seed}" for run in ready])
        loss = 0.5 if "rate_4" in ready[0].variant else 0.8
        finish(tmp_path, ready[0], loss)
    assert seen == [["rate_1 0"], ["rate_4 0"], ["rate_4 1", "rate_4 2"], ["rate_4 2"]]
    assert plan.left().total() == 0
    assert plan.finished() == {"one": 4}
    assert study.residual_plan(plain).ready() == []


def test_equal_compute_takes_the_best_rate_of_equal_steps(tmp_path: Path) -> None:
    plain = config(
        "depth", "depths=[2,4]", "equal_compute=4", "steps=40", "rates=[1,4]", "seeds=[0]", f"folder={tmp_path}"
    )
    plan = study.depth_plan(plain | {"methods": {"mvsplit": ["residual=mvsplit"]}})
    while ready := plan.ready():
        finish(tmp_path, ready[-1], 0.5 if "rate_1/" in f"{ready[-1].folder}/" else 0.7)
    runs = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("result.json"))
    assert [run for run in runs if run.startswith("compute")] == ["compute_2/mvsplit/rate_1/seed_0"]
    assert len(runs) == 5


def test_equal_compute_follows_when_another_rate_turns_out_best(tmp_path: Path) -> None:
    def plan(rates: str) -> study.Plan:
        keys = ["depths=[2,4]", "equal_compute=4", "steps=40", f"rates={rates}", "seeds=[0,1]", f"folder={tmp_path}"]
        return study.depth_plan(config("depth", *keys) | {"methods": {"mvsplit": ["residual=mvsplit"]}})

    def train_all(plan: study.Plan) -> None:
        while ready := plan.ready():
            finish(tmp_path, ready[0], 0.5 if "rate_4" in ready[0].variant else 0.7)

    train_all(plan("[1]"))
    assert plan("[1,4]").left() == {"depth_4": 2, "depth_2": 2, "compute_2": 2}
    train_all(plan("[1,4]"))
    assert plan("[1,4]").left().total() == 0
    (taker,) = [cell for cell in plan("[1,4]").cells() if cell.source]
    assert (taker.best_rate, len(taker.at_best())) == (4, 2)


def test_seeds_and_rates_given_twice_count_once(tmp_path: Path) -> None:
    keys = ["seeds=[0,0]", "rates=[1,1]", f"folder={tmp_path}", "only=[keel,tokens_16]"]
    plan = study.residual_plan(config("residuals", *keys))
    assert plan.left().total() == len(plan.ready()) == 1


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".x", "a b"])
def test_a_name_that_could_be_a_path_is_refused(name: str, tmp_path: Path) -> None:
    plain = config("residuals")
    with pytest.raises(UserError, match=r"^settings\..*: a name may contain letters"):
        study.residual_plan(plain | {"settings": {name: []}})
    plan = study.residual_plan(plain).describe()
    (tmp_path / "study.json").write_text(json.dumps(plan | {"methods": {name: []}}))
    with pytest.raises(UserError, match=r"study\.json: methods\..*: a name may contain letters"):
        study_report.make_report(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"seeds": []}, {"rates": ["x"]}, {"rates": [-1]}, {"sizes": {"x": [1, 2]}}, {"rate_from": {"compute_2": "?"}},
     {"settings": []}, {"kind": "other"}, {"seeds": list(range(10**5))}, {"lr": None}],
)  # fmt: skip
def test_a_damaged_plan_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    plan = study.depth_plan(config("depth", "depths=[2,4]", "equal_compute=4", "steps=40")).describe()
    (tmp_path / "study.json").write_text(json.dumps(plan | change))
    with pytest.raises(UserError, match=r"^[^\n]*study\.json: damaged \([^\n]*$"):
        study_report.make_report(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "finished", "metrics": {"val/loss": null}}', "[" * 10**5])
def test_a_damaged_result_is_one_line(text: str, tmp_path: Path) -> None:
    plan = study.residual_plan(config("residuals", f"folder={tmp_path}", "only=[keel,tokens_16]"))
    run = plan.ready()[0]
    finish(tmp_path, run, 0.5)
    (run.folder / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*result\.json: [^\n]*; delete [^\n]* and repeat the command$"):
        study.unfinished(plan.possible())


def test_a_study_without_the_monitor_is_refused(tmp_path: Path) -> None:
    plan = study.residual_plan(config("residuals", f"folder={tmp_path}", "only=[keel,tokens_16]"))
    with pytest.raises(UserError, match=r"^callbacks\.monitor = null: must be on"):
        study.run_study(plan, lambda *_: {"callbacks": {"monitor": None}}, lambda _: {})


def test_only_selects_settings_methods_or_both() -> None:
    plan = study.residual_plan(config("residuals", "only=[tokens_64,m*split,keel]"))
    chosen = {(run.variant.split("/")[0], run.variant.split("/")[1]) for run in plan.examples()}
    assert chosen == {("tokens_64", "mvsplit"), ("tokens_64", "keel")}
    plan = study.residual_plan(config("residuals", "only=[keel]"))
    assert {run.variant.split("/")[0] for run in plan.examples()} == set(plan.settings)
    with pytest.raises(UserError, match=r"^only = kel: no such setting or method; allowed: tokens_16, "):
        study.residual_plan(config("residuals", "only=[kel]"))


def test_a_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    plain = config("residuals", "rates=[1]", "seeds=[0]", f"folder={tmp_path}", "only=[keel,tokens_16]")
    plan = study.residual_plan(plain)
    (run,) = plan.ready()
    finish(tmp_path, run, 0.5)
    other = study.residual_plan(plain | {"overrides": [*plain["overrides"], "model.width=64"]})
    # A command for other methods would put its results into the same table.
    for only in (["keel", "tokens_16"], ["mvsplit", "tokens_64"]):
        other.config["only"] = only
        with pytest.raises(UserError, match=r"has the result of other settings \(now model.width=64"):
            study.unfinished(other.possible())


def test_the_trend_over_depth_says_where_quality_stops_rising() -> None:
    falling = {4: [0.80, 0.81, 0.82], 16: [0.60, 0.61, 0.62], 64: [0.601, 0.611, 0.62]}
    text = study_report.trend(falling, -1)
    assert text.startswith("does not improve with every increase in depth: 4 → 16 blocks better (p = ")
    assert "16 → 64 blocks no significant change" in text
    assert study_report.trend({4: [0.8, 0.81], 16: [0.6, 0.61]}, -1).startswith("improves with every increase in depth")
    assert "4 → 16 blocks worse" in study_report.trend({4: [0.6, 0.61], 16: [0.8, 0.81]}, -1)


def test_methods_are_compared_by_welchs_test() -> None:
    def of(method: str, *losses: float) -> Cell:
        return Cell("one", method, range(3), endings={1.0: {seed: lives(loss) for seed, loss in enumerate(losses)}})

    cells = [of("a", 0.60, 0.61, 0.62), of("b", 0.605, 0.612, 0.63), of("c", 0.70, 0.71, 0.72)]
    text = study_report.comparison(cells)
    assert text.startswith("Lowest mean loss: a (0.610).")
    assert "Not distinguishable from it with these seeds: b (0.616, p = 0.58)" in text
    assert "Significantly higher (p < 0.05, 2 tests): c (0.710, p = 0.00026)" in text


def test_a_report_on_methods_that_die_at_every_rate(tmp_path: Path) -> None:
    study_cells.read_ending.cache_clear()
    keys = ["depths=[2,4]", "equal_compute=null", "steps=40", "rates=[1,4]", "seeds=[0,1]", f"folder={tmp_path}"]
    plan = study.depth_plan(config("depth", *keys) | {"methods": {"mvsplit": ["residual=mvsplit"]}})
    (tmp_path / "study.json").write_text(json.dumps(plan.describe()))
    while ready := plan.ready():
        run = ready[0]
        finish(tmp_path, run, 1.5, cosine=1.0)
        result = json.loads((run.folder / "result.json").read_text())
        (run.folder / "result.json").write_text(json.dumps(result | {"status": "stopped", "metrics": {}}))
        if "rate_1/" in f"{run.folder}/":  # before its first row
            (run.folder / "stability" / "trace.csv").unlink()
            (run.folder / "stability" / "nonfinite_step_0_rank_0.json").write_text("{}")
    text = study_report.make_report(tmp_path).read_text()
    assert "| mvsplit | 4 | 40 | none lives | 1 of 1 | – |" in text
    assert "equal compute" not in text
    assert [ending.failure for ending in plan.cells()[0].sweep().values()] == ["not finite", "mean mode (cosine 1.00)"]


@pytest.mark.parametrize("kind", ["depth", "residuals"])
def test_a_report_is_made_of_what_is_finished(kind: str, tmp_path: Path) -> None:
    study_cells.read_ending.cache_clear()
    small = {"methods": {name: [f"residual={name}"] for name in ("mvsplit", "keel")}}
    if kind == "depth":
        keys = ["depths=[2,4]", "equal_compute=4", "steps=40", "rates=[1,4]", "seeds=[0,1]", f"folder={tmp_path}"]
        plan = study.depth_plan(config(kind, *keys) | small)
    else:
        small |= {"settings": {"tokens_16": []}}
        plan = study.residual_plan(config(kind, "rates=[1,4]", "seeds=[0,1]", f"folder={tmp_path}") | small)
    with pytest.raises(UserError, match=r"no study\.json"):
        study_report.make_report(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(plan.describe()))
    with pytest.raises(UserError, match="no finished run yet"):
        study_report.make_report(tmp_path)
    finish(tmp_path, plan.ready()[0], 0.8)
    study_report.make_report(tmp_path)  # of a single run
    while ready := plan.ready():
        finish(tmp_path, ready[0], 0.6 if "keel" in ready[0].variant else 0.7)
    text = study_report.make_report(tmp_path).read_text()
    pictures = {"depth": ["depth.png", "compute.png", "cost.png"], "residuals": ["rates.png"]}[kind]
    for name in pictures:
        assert (tmp_path / "report" / name).stat().st_size > 5000
        assert f"]({name})" in text
    if kind == "residuals":
        assert "| keel | × 1 | 0.605 ± 0.007 (0.600…0.610) | 0 of 2 | × 1, 4 | no rate tried |" in text
    else:
        assert "| mvsplit | 2 | 80 | × 1 | 0 of 2 | 0.705 ± 0.0071 | 7 ± 0 |" in text
        assert (
            "keel, loss: does not improve with every increase in depth: 2 → 4 blocks no significant change (p = 1)."
            in text
        )
    assert np.isfinite(study_cells.read_cells(tmp_path, plan.describe())[0].losses).all()
