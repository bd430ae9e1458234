"""`bench.py sampling`: a line through known costs, memory that depth does not change, and a real tiny measurement."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config
from omegaconf import DictConfig
from random_weights import random_run

import bench
from mvsplit.benchmarks import sampling_by_depth, sampling_cost, sampling_quality
from mvsplit.benchmarks.model_stats import LiveBytes
from mvsplit.evaluation import trained_classifier
from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError

DEPTHS = (16, 64, 250, 500, 1000)
TINY = [
    "depths=[2,4,6]", "reference_depth=2", "width=16", "num_heads=2", "batch_size=2", "timed_blocks=4", "rounds=1",
    "num_samples=20", "draw_batch=20", "limits.linear=1e9", "~samplers.heun_5", "~samplers.euler_10",
]  # fmt: skip


def composed(*overrides: str) -> dict[str, Any]:
    cfg = compose_config("paths.output_dir=/nowhere", *overrides, name="bench_sampling.yaml")
    return bench.check("sampling", cfg)[1]


def test_a_line_is_found_and_a_curve_is_not_hidden() -> None:
    line = sampling_by_depth.fit_line({depth: 0.5 + 0.002 * depth for depth in DEPTHS})
    assert (line.constant, line.per_block) == pytest.approx((0.5, 0.002))
    cost = sampling_by_depth.cost_by_depth({depth: 0.5 + 0.002 * depth for depth in DEPTHS}, composed())
    assert cost["deviation"] == pytest.approx(0, abs=1e-9)
    assert cost["depths"]["1000"]["ratio"] == pytest.approx(2.5 / 0.628)
    assert cost["depths"]["64"]["sample_s"] == pytest.approx(0.628 * 25 / 16)
    assert cost["depths"]["64"]["block_ms"] == pytest.approx(628 / 64)

    curved = {depth: 0.001 * depth**1.1 for depth in DEPTHS}
    assert sampling_by_depth.fit_line(curved).constant == 0  # a negative one would fit better
    assert sampling_by_depth.cost_by_depth(curved, composed())["deviation"] > 0.1


def test_limits_of_sampling_are_checked() -> None:
    def memory(deepest: float) -> dict[str, dict[str, float]]:
        return {"64": {"guided_kib": 10.0, "unguided_kib": 5.0}, "1000": {"guided_kib": deepest, "unguided_kib": 5.0}}

    cost = {"guided": {"deviation": 0.09}, "unguided": {"deviation": 0.02}}
    limits = {"linear": 0.1, "memory": 0.05}
    found = sampling_cost.check_limits({"cost": cost, "memory": memory(10.4)}, limits)
    assert found == {"linear": True, "memory": True}
    cost["unguided"]["deviation"] = 0.11
    found = sampling_cost.check_limits({"cost": cost, "memory": memory(10.6)}, limits)
    assert found == {"linear": False, "memory": False}


def test_views_of_existing_tensors_take_no_memory() -> None:
    x, weight = torch.zeros(4, 8), torch.zeros(6, 8)
    with torch.no_grad(), LiveBytes((x, weight)) as live:
        out = torch.nn.functional.linear(x, weight)
    assert (live.peak, out.nbytes) == (96, 96)
    with torch.no_grad(), LiveBytes((x, weight)) as live:
        out = (x + 1) * 2
    assert (live.peak, live.now) == (256, 128)


def test_activations_do_not_grow_with_depth_and_weights_do() -> None:
    networks = sampling_by_depth.fresh_networks(composed(*TINY), torch.device("cpu"))
    rows = sampling_by_depth.memory_by_depth(networks, composed(*TINY))
    assert list(rows) == ["2", "4", "6"]
    for way in ("guided_kib", "unguided_kib"):
        assert rows["2"][way] == rows["4"][way] == rows["6"][way] > 0
    assert 1.8 < rows["4"]["guided_kib"] / rows["4"]["unguided_kib"] < 2.2
    block = sum(weight.nbytes for weight in networks[0].network.blocks[0].parameters())
    assert (rows["4"]["weights_mib"] - rows["2"]["weights_mib"]) * 2**20 == pytest.approx(2 * block)


def test_the_first_blocks_sample_like_a_network_of_that_depth() -> None:
    shallow, _, deep = sampling_by_depth.fresh_networks(composed(*TINY), torch.device("cpu"))
    expected = shallow.sample(2.0, 2)
    assert not torch.equal(deep.sample(2.0, 2), expected)
    deep.network.blocks = deep.network.blocks[:2]
    assert torch.equal(deep.sample(2.0, 2), expected)


def test_the_statement_names_what_is_saved() -> None:
    def point(sampler: str, sample_s: float, fid: float) -> dict[str, Any]:
        return {"run": "a", "depth": 64, "sampler": sampler, "sample_s": sample_s, "fid": fid, "recognised": 0.99}

    points = [
        point("euler_25", 1.0, 2.0), point("euler_5", 0.2, 2.3), point("multistep_8", 0.32, 1.9),
        point("no_guidance_25", 0.1, 1.0),
    ]  # fmt: skip
    lines = sampling_quality.in_words({"points": points}, (1000, 15.6, 64), composed())
    assert lines[0] == "of 64 trained blocks, with euler_25: FID 2, recognised 0.990"
    assert lines[2] == "multistep_8 takes 0.32 of the time: FID 1.9, recognised 0.990"
    assert lines[-1] == (  # euler_5 has a higher FID, no_guidance_25 no guidance
        "the cheapest with the same guidance and an FID up to 1.1 times that of euler_25 is multistep_8: with it 1000"
        " blocks take 5.0 times as long as 64 with euler_25"
    )
    assert sampling_quality.in_words(None, (1000, 15.6, 64), composed()) == []


@pytest.fixture
def run(config: Callable[..., DictConfig], tmp_path: Path) -> Path:
    return random_run(to_plain(config()), tmp_path)


@pytest.mark.slow
def test_all_is_measured_written_and_drawn(
    run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(trained_classifier, "STEPS", 20)  # a poor one does
    config = composed(*TINY, f"paths.data_dir={data_dir}", f"paths.log_dir={tmp_path}/logs")
    result = sampling_cost.measure(config, tmp_path)
    assert json.loads((tmp_path / "bench_sampling.json").read_text()) == result
    assert result["holds"] == {"linear": True, "memory": True}
    for way in ("guided", "unguided"):
        rows = result["cost"][way]["depths"]
        assert list(rows) == ["2", "4", "6"]
        assert rows["2"]["ratio"] == 1
        assert all(math.isfinite(value) for row in rows.values() for value in row.values())
        assert all(row["sample_s"] > 0 for row in rows.values())
    points = {point["sampler"]: point for point in result["quality"]["points"]}
    calls = {name: point["calls"] for name, point in points.items()}
    assert calls == {
        "euler_25": 50, "euler_5": 10, "multistep_8": 16, "multistep_4": 8, "interval_25": 41, "no_guidance_25": 25,
    }  # fmt: skip
    for point in points.values():
        assert {"fid", "is", "recognised", "precision", "recall"} <= point.keys()
        assert (point["depth"], point["width"], point["step"]) == (4, 32, 5)
    assert points["euler_5"]["sample_s"] < points["euler_25"]["sample_s"]
    assert result["statement"][0].startswith("6 blocks take ")
    assert (tmp_path / "quality_by_cost.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "ms per block" in printed
    assert "multistep_8" in printed


def test_without_a_run_only_the_cost_is_measured(tmp_path: Path) -> None:
    result = sampling_cost.measure(composed(*TINY, f"paths.log_dir={tmp_path}/logs"), tmp_path)
    assert result["quality"] is None
    assert len(result["statement"]) == 2
    assert not (tmp_path / "quality_by_cost.png").exists()


def test_runs_that_are_missing_are_reported_with_their_key(tmp_path: Path) -> None:
    config = composed(*TINY, f"runs=[{tmp_path}/none]")
    with pytest.raises(UserError, match=r"^runs = .*none"):
        sampling_cost.measure(config, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("reference_depth=7", "reference_depth = 7: must be one of depths = [16, 64, 250, 500, 1000]"),
        ("depths=[16,64,64]", "depths = [16, 64, 64]: must differ from each other"),
        ("depths=[16,64]", "depths = [16, 64]: "),
        ("equal_fid=0.5", "equal_fid = 0.5: must be greater than or equal to 1"),
        ("cfg_scale=1", "cfg_scale = 1: must differ from 1"),
        ("width=30", "width = 30: must be divisible by num_heads = 4"),
        ("samplers.euler_5.solver=rk4", "samplers.euler_5.solver = 'rk4': must be 'euler', 'heun' or 'multistep'"),
        ("+samplers.euler_5.stpes=3", "samplers.euler_5.stpes = 3: unknown key; did you mean steps?"),
        ("samplers.interval_25.cfg_interval=[0.8,0.2]", "samplers.interval_25.cfg_interval = [0.8, 0.2]: low must not"),
        ("num_samples=1", "num_samples = 1: must be greater than or equal to 2"),
    ],
)
def test_wrong_keys_of_sampling_are_reported(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        composed(wrong)
    assert str(caught.value).startswith(message)
