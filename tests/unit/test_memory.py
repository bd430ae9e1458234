"""The planner's arithmetic against the paper's sizes and by hand; its searches; its config."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import compose_config

import bench
from mvsplit.benchmarks import memory
from mvsplit.benchmarks.memory import GIB
from mvsplit.benchmarks.model_stats import Activations, measure_activations
from mvsplit.benchmarks.plan import largest, largest_fitting, plan, read_planned_run
from mvsplit.models.recompute import Schedule
from mvsplit.utils import config as checks
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.errors import UserError

pytestmark = pytest.mark.apart  # plans for GPUs are measured on fake ones

PAPER = ["data=imagenet_latents", "model.patch_size=1", "model/context=captions"]
CPU = ["data=digits", "model=digits", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]

IN_BACKWARD = ["optim.in_backward=true", "trainer.gradient_clip_val=null", "callbacks.monitor.probe=null"]


def composed(*overrides: str) -> dict[str, Any]:
    config = to_plain(compose_config("paths.output_dir=/nowhere", *overrides, name="bench_memory.yaml"))
    check_config(config, memory.Config)
    return config


MADE = Activations(block=20_000, trunk=1_000, around=500, working=4_000, casts=0)
"""Round numbers instead of measured ones."""


@pytest.mark.parametrize(
    ("depth", "parameters", "gib"),
    [(400, 5_454_496_896, (13.97, 6.98, 1.75)), (1000, 13_635_847_296, (34.92, 17.46, 4.37))],
)
def test_the_papers_states_on_8_16_and_64_gpus(depth: int, parameters: int, gib: tuple[float, ...]) -> None:
    """22 bytes per parameter and GPU's share: 2 in bf16, 4 of gradients, 4 + 8 of the optimiser, 4 of the average."""
    config = composed(*PAPER, f"model=layers_{depth}")
    run = read_planned_run(config)
    assert run.stats.total == parameters
    assert run.stats.block == 13 * 1024**2 + 4 * 1024
    for gpus, expected in zip((8, 16, 64), gib, strict=True):
        planned = plan(run.at(world=gpus), MADE)
        assert planned.states == pytest.approx(22 * parameters / gpus, rel=1e-6)
        assert planned.states / GIB == pytest.approx(expected, abs=0.005)
    other = 1400 - depth
    assert run.at(depth=other).stats.total == {400: 13_635_847_296, 1000: 5_454_496_896}[depth]


def test_the_table_of_other_sizes() -> None:
    """The more GPUs, the more memory is left on each; recomputing makes room for many times the batch."""
    run = read_planned_run(composed(*PAPER, "model=layers_400"))
    rows = list(memory.table_rows(run, {"gpus": [8, 64], "depths": [400, 1000]}, 72 * GIB))
    assert [row["states_gib"] for row in rows] == pytest.approx([13.97, 1.75, 34.92, 4.37], abs=0.005)
    assert [row["left_gib"] for row in rows] == pytest.approx([58.03, 70.25, 37.08, 67.63], abs=0.005)
    kept, recomputed = ([row[key] for row in rows] for key in ("batch_keeping_all", "batch"))
    assert kept[2] < kept[0] < kept[1] < 20
    assert recomputed[2] < recomputed[0] < recomputed[1]
    assert all(many > 30 * few for few, many in zip(kept, recomputed, strict=True))
    least = replace(run, model=run.model | {"checkpointing": run.model["checkpointing"] | memory.AUTO})
    for row in rows:
        at = least.at(depth=row["depth"], world=row["gpus"])
        assert plan(at.at(batch=row["batch"])).total <= 72 * GIB < plan(at.at(batch=row["batch"] + 1)).total


@pytest.mark.parametrize(
    ("overrides", "states", "step"),
    [
        (["trainer=cpu"], 4 + 4 + 8 + 4, 4),
        (["trainer=cpu", "callbacks.ema=null"], 4 + 4 + 8, 4),
        (["trainer=ddp", "trainer.devices=2"], 4 + 4 + 8 + 4, 4),
        (["trainer=deepspeed", "trainer.devices=2", "trainer.precision=32-true"], (4 + 4 + 12 + 4) / 2, 8 / 2),
        (["trainer=deepspeed", "trainer.devices=2"], (2 + 4 + 12 + 4) / 2, 8 / 2),
        (["trainer=fsdp", "trainer.devices=2", "trainer.precision=32-true"], (4 + 4 + 8 + 4) / 2, 4 / 2),
        (["trainer=fsdp", "trainer.devices=2"], (4 + 4 + 8 + 4) / 2, 4 / 2),
    ],
    ids=str,
)
def test_bytes_per_parameter(overrides: list[str], states: float, step: float) -> None:
    run = read_planned_run(composed("data=digits", "model=digits", *overrides))
    planned = plan(run, MADE)
    assert planned.states == pytest.approx(states * run.stats.total, rel=1e-5)
    assert planned.step == pytest.approx(step * run.stats.total, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "states"),
    [
        (["optim.moments=bfloat16"], 4 + 4 + 4),
        (["optim.moments=8bit"], 4 + 4 + 2 + 8 / 256),
        (["trainer.precision=bf16-true"], 2 + 2 + 8),
        (["trainer.precision=bf16-true", "optim.moments=8bit", *IN_BACKWARD], 2 + 0 + 2 + 8 / 256),
        (["optim=muon"], 4 + 4 + 4),
    ],
    ids=str,
)
def test_bytes_per_parameter_of_other_optimisers(overrides: list[str], states: float) -> None:
    run = read_planned_run(composed("data=digits", "model=digits", "trainer=cpu", "callbacks.ema=null", *overrides))
    assert plan(run, MADE).states == pytest.approx(
        states * run.stats.total, rel=2e-3
    )  # Muon: what is outside the blocks


def test_a_thousand_blocks_on_one_gpu() -> None:
    groups = ["data=imagenet_latents", "model=layers_1000", "trainer=gpu"]
    run = read_planned_run(composed("experiment=imagenet256_1000l_one_gpu", *groups))
    planned = plan(run)
    assert run.stats.block * 1000 == 1000 * (13 * 1024**2 + 4 * 1024)
    assert planned.states / GIB == pytest.approx(51.2, abs=0.05)
    assert planned.gradients == planned.average == 0
    assert planned.total / GIB == pytest.approx(68.0, abs=0.5)
    assert planned.total < 0.9 * 80 * GIB
    assert planned.moment == "first gradients"  # in which the largest tensor is updated
    assert plan(replace(run, in_backward=False)).total > 80 * GIB


def test_offloaded_states_are_in_host_memory() -> None:
    run = read_planned_run(composed("data=digits", "model=digits", "trainer=deepspeed_offload", "trainer.devices=2"))
    planned = plan(run, MADE)
    assert planned.states == planned.step == 0
    assert planned.host == pytest.approx(22 * run.stats.total / 2, rel=1e-5)


def test_the_worst_moment_by_hand() -> None:
    """64 blocks on one process: every activation and the gradients of the step before, at the end of the forward."""
    run = read_planned_run(composed("data=digits", "model=digits", "trainer=cpu"))
    states = 20 * run.stats.total
    planned = plan(run, MADE)
    assert planned.total == states + max(64 * 20_000 + 500, 4 * run.stats.total)
    assert planned.moment == "optimiser step"  # these activations are small
    assert planned.activations == 64 * 20_000 + 500
    recomputed = ["model.checkpointing.every=8", "trainer.accumulate_grad_batches=2"]
    planned = plan(read_planned_run(composed("data=digits", "model=digits", "trainer=cpu", *recomputed)), MADE)
    assert planned.schedule == Schedule(64, 8)
    assert planned.activations == 8 * 1_000 + 8 * 20_000 + 500
    offloaded = ["trainer=gpu", "model.checkpointing.every=8", "model.checkpointing.offload=true"]
    planned = plan(read_planned_run(composed("data=digits", "model=digits", *offloaded)), MADE)
    assert (planned.activations, planned.host) == (8 * 20_000 + 500, 8 * 1_000)


def test_measured_activations() -> None:
    """Of one block of width 64 at 20 tokens, in float32: known by hand, and linear in the batch."""
    model = composed(*CPU, "trainer=cpu")["model"]
    one, two, ten = (measure_activations(model, n, torch.float32, False) for n in (16, 32, 160))
    assert one.trunk == 16 * 20 * 64 * 4
    assert 25 * one.trunk < one.block < 29 * one.trunk
    assert ten.block - one.block == 9 * (two.block - one.block)
    assert ten.working - one.working == pytest.approx(9 * (two.working - one.working), rel=0.01)
    half = measure_activations(model, 16, torch.bfloat16, False)
    assert half.trunk == one.trunk  # in float32
    assert measure_activations(model | {"trunk": "compute"}, 16, torch.bfloat16, False).trunk == one.trunk // 2
    assert one.block / 2 < half.block < 0.6 * one.block
    mixed = measure_activations(model, 16, torch.float32, True)
    assert mixed.casts == 2 * 13 * 64**2
    assert half.block < mixed.block < one.block + mixed.casts


def test_the_search_finds_the_largest() -> None:
    for limit in (0, 1, 2, 3, 7, 8, 9, 1000, 5000):
        assert largest(lambda n, limit=limit: n <= limit) == limit
    assert largest(lambda n: True, limit=300) == 300
    run = read_planned_run(composed("data=digits", "model=digits", "trainer=cpu"))
    assert largest_fitting("depth", run, plan(run).total + 10) == 64
    run = run.at(batch=4096)
    assert largest_fitting("batch", run, plan(run).total) == 4096


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=auto"], r"trainer\.devices = auto: the planner requires a number"),
        (["trainer.strategy=fsdp"], r"trainer\.strategy = fsdp: must be one of ZeRO3, FSDP2"),
        (["trainer.precision=64-true"], r"trainer\.precision = 64-true: must be one of 32-true"),
    ],
)
def test_what_cannot_be_planned_is_reported(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_planned_run(composed("data=digits", "model=digits", "trainer=cpu", *overrides))


def test_a_network_of_another_kind_is_planned_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PACKAGES", (*checks.PACKAGES, "networks."))
    config = composed(*CPU, "trainer=cpu")
    sizes = {"_partial_": True, "image_size": [8, 8], "channels": 1, "num_classes": 10}
    config["model"] = {"_target_": "networks.Pixels"} | sizes
    with pytest.raises(UserError, match=r"^model = networks\.Pixels: cannot be planned; .* requires .*`depth`"):
        read_planned_run(config)
    config["model"] = {"_target_": "networks.Tokens", "depth": 5, "width": 8} | sizes
    run = read_planned_run(config)
    assert run.stats.block == 4 * 8 * 8 + 4 * 8 + 2 * 8 * 16 + 16 + 8 + 1
    assert run.stats.writers == 8 * 16 + 8
    planned = plan(run)
    assert planned.parameters == 4 * run.stats.total
    assert plan(run.at(depth=10)).activations > 1.5 * planned.activations > 0


@pytest.mark.parametrize("wrong", ["device_gib=0", "usable=1.5", "table.gpus=[]", "measure=often"])
def test_its_config_is_checked(wrong: str) -> None:
    with pytest.raises(UserError, match=wrong.partition("=")[0].replace(".", r"\.")):
        composed(wrong)


def test_an_experiment_keeps_its_own_groups() -> None:
    groups = ["data=imagenet_latents", "model=layers_400", "trainer=deepspeed"]
    command = ["bench.py", "experiment=imagenet256_400l", "device_gib=40"]
    assert bench.experiments_groups(command) == groups
    assert bench.experiments_groups([*command, "model=layers_1000"]) == [groups[0], groups[2]]
    assert bench.experiments_groups(["bench.py", "experiment=mms_lab"])[:2] == ["data=digits", "model=digits"]
    for unknown in (["experiment=nothing"], ["experiment=mms_lab,vit_lab"], ["model=digits"]):
        assert bench.experiments_groups(["bench.py", *unknown]) == []


@pytest.mark.parametrize(
    ("experiment", "samples", "context", "gib"),
    [("400l", 64, 256, 35.4), ("400l_classes", 64, 4, 25.2), ("1000l", 64, 256, 49.9), ("1000l_classes", 64, 4, 34.5)],
)
def test_the_papers_experiments_fit_as_their_files_say(experiment: str, samples: int, context: int, gib: float) -> None:
    command = [f"experiment=imagenet256_{experiment}"]
    run = read_planned_run(composed(*command, *bench.experiments_groups(command)))
    assert (run.batch, run.model["context"]["num_tokens"]) == (samples, context)
    assert plan(run).total / GIB == pytest.approx(gib, abs=0.1)


def test_the_measured_run_is_the_planned_one() -> None:
    class Hydra:
        runtime = type("Runtime", (), {"choices": {"data": "digits", "model": "tiny", "trainer": "cpu"}})
        overrides = type("Overrides", (), {"task": ["model=tiny", "device_gib=3", "table.gpus=[2]", "model.depth=5"]})

    own = {"device_gib", "usable", "measure", "table", "logger"}
    assert bench.train_overrides(Hydra, own) == ["data=digits", "trainer=cpu", "model=tiny", "model.depth=5"]
