"""Sharded strategies on two real CPU processes train what one process trains: weights, gradients, memory.

One process plays both ranks: the gradient of each rank's micro-batches, averaged. Its forward and backward passes have
the very shapes of a rank's, so the average of two is the same to the bit.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioned import captioned_set, train_on_captions
from conftest import SUPPORT, compose_config
from sharded_worker import AT
from torch import Tensor

from mvsplit.flow.objective import drop_condition, velocity_loss
from mvsplit.stability.tables import read_table
from mvsplit.training.module import condition_of
from mvsplit.utils.config import build, to_plain

WORKER = SUPPORT / "sharded_worker.py"
STEPS = 20
SMALL = ["model=tiny", "model.depth=6", "data.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu",
         f"trainer.max_steps={STEPS}", "optim.warmup_steps=2", "residual.writer_init=standard",
         "trainer.gradient_clip_val=0.1"]  # fmt: skip
Worker = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def worker(data_dir: Path, tmp_path: Path) -> Worker:
    """`worker(mode, *overrides)`: run the worker and return each rank's record."""

    def run(mode: str, *overrides: str, weights: bool = False) -> list[dict[str, Any]]:
        command = [sys.executable, str(WORKER), str(tmp_path), mode, f"paths.data_dir={data_dir}", *overrides]
        environment = os.environ | ({"RECORD_WEIGHTS": "1"} if weights else {})
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
        files = sorted(tmp_path.glob("rank_*.pt"))
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(file, weights_only=True) for file in files]

    return run


def built(*overrides: str) -> Any:
    """The module of one plain process, its network built by the seed."""
    module = build(to_plain(compose_config("paths.output_dir=/nowhere", *overrides))["module"])
    module.configure_model()
    return module


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different, different[:5]


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each tensor's norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        distance = (actual[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert distance < tolerance, (name, float(distance))


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.network.named_parameters()}


def average(module: Any, records: list[dict[str, Any]], step: int, accumulate: int) -> dict[str, Tensor]:
    """The gradient of one step: micro-batch by micro-batch the mean over ranks, then their mean."""
    total: dict[str, Tensor] = {}
    for micro in range(step * accumulate, (step + 1) * accumulate):
        of_ranks = []
        for record in records:
            batch = record["batches"][micro]
            module.zero_grad()
            x1, t, mask = module.flow.draw(module.seed, batch["position"], batch["image"])
            condition = drop_condition(module.network, condition_of(batch), mask, batch.get("null_condition"))
            (velocity_loss(module.network, batch["image"], x1, t, condition).mean() / accumulate).backward()
            of_ranks.append({name: p.grad.clone() for name, p in module.network.named_parameters()})
        for name in of_ranks[0]:
            mean = sum(grads[name] for grads in of_ranks) / len(records)
            total[name] = total[name] + mean if name in total else mean
    return total


def train_alone(module: Any, records: list[dict[str, Any]], accumulate: int) -> None:
    """The same steps, clipped, in one process."""
    optimizer, scheduler = module.optim.build(module.network, STEPS)
    for step in range(STEPS):
        grads = average(module, records, step, accumulate)
        for name, parameter in module.network.named_parameters():
            parameter.grad = grads[name]
        torch.nn.utils.clip_grad_norm_(module.network.parameters(), 0.1)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("strategy", "every", "accumulate"),
    [
        ("deepspeed", 2, 2),
        pytest.param("fsdp", 2, 2, marks=pytest.mark.slow),
        pytest.param("deepspeed", 0, 1, marks=pytest.mark.long),
        pytest.param("ddp", 0, 1, marks=pytest.mark.long),
    ],
)
def test_two_ranks_train_what_one_process_trains(worker: Worker, strategy: str, every: int, accumulate: int) -> None:
    options = [*SMALL, f"model.checkpointing.every={every}"]
    records = worker("train", *options, f"trainer={strategy}", f"trainer.accumulate_grad_batches={accumulate}")
    assert len(records) == 2
    assert len(records[0]["batches"]) == STEPS * accumulate
    same(records[0]["final"], records[1]["final"])

    alone = built(*options)
    same(records[0]["initial"], weights(alone))  # the seed's weights, to the bit
    train_alone(alone, records, accumulate)
    close(records[0]["final"], weights(alone), 1e-5)

    alone.network.load_state_dict(records[0]["weights"])
    expected = average(alone, records, AT, accumulate)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    if strategy == "deepspeed":
        same(records[0]["gradient"], expected)  # to the bit
    else:
        close(records[0]["gradient"], expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["deepspeed", pytest.param("ddp", marks=pytest.mark.long), pytest.param("fsdp", marks=pytest.mark.long)],
)
def test_captions_of_varying_lengths_train_alike(worker: Worker, tmp_path: Path, strategy: str) -> None:
    captions = train_on_captions(captioned_set(tmp_path / "captions", classes=False), classes=False)
    options = [*SMALL, *captions, "trainer.accumulate_grad_batches=2"]
    records = worker("train", *options, f"trainer={strategy}")
    lengths = [[batch["condition"].shape[1] for batch in record["batches"]] for record in records]
    assert len({length for of_rank in lengths for length in of_rank}) > 3
    assert lengths[0] != lengths[1]  # in one step the ranks' contexts differ
    same(records[0]["final"], records[1]["final"])
    alone = built(*options)
    train_alone(alone, records, 2)
    close(records[0]["final"], weights(alone), 1e-5)
    alone.network.load_state_dict(records[0]["weights"])
    close(records[0]["gradient"], average(alone, records, AT, 2), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.long)])
def test_compiled_and_recomputed_blocks_train_alike(worker: Worker, strategy: str) -> None:
    options = ["model.compile=true", "model.checkpointing.every=1", f"trainer={strategy}"]
    records = worker("train", *SMALL, *options)
    alone = built(*SMALL, "model.compile=false")
    train_alone(alone, records, 1)
    close(records[0]["final"], weights(alone), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, pytest.param(False, marks=pytest.mark.long)])
def test_captions_of_any_length_train_alike(worker: Worker, tmp_path: Path, compile: bool) -> None:
    """Ranks have micro-batches of different lengths, and a rank's length changes from step to step."""
    options = [*SMALL, *train_on_captions(captioned_set(tmp_path / "set")), "model.checkpointing.every=1",
               "residual.eps=1e-5"]  # fmt: skip
    records = worker("train", *options, f"model.compile={str(compile).lower()}", "trainer=deepspeed")
    lengths = [[batch["condition"].shape[1] for batch in record["batches"]] for record in records]
    assert all(len(set(of_rank)) > 1 for of_rank in lengths)
    assert any(left != right for left, right in zip(*lengths, strict=True))
    alone = built(*options, "model.compile=false")
    train_alone(alone, records, 1)
    close(records[0]["final"], weights(alone), 1e-4)


# Without memory, and with an ε that makes Adam's step nearly the gradient: what bf16 does to one shows in the other.
DEEP = ["model=tiny", "model.depth=200", "model.width=64", "model.num_heads=4", "data.batch_size=8",
        "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.gradient_clip_val=0.1",
        "residual.writer_init=standard", "optim.warmup_steps=0", "optim.schedule=constant", "optim.lr=1",
        "optim.betas=[0.0,0.0]", "optim.eps=1", "optim.weight_decay=0"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["deepspeed", *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp", "ddp_sim"))]
)
def test_a_step_in_bf16_is_that_of_a_float32_process(worker: Worker, strategy: str) -> None:
    """200 blocks on two ranks in bf16-mixed: gradient and optimiser step of one float32 process with these weights.

    The second step: in the first, the network's last layer is zero and hands no gradient on.
    """
    accumulate = 2 if strategy == "deepspeed" else 1
    options = [f"trainer={strategy}", "trainer.precision=bf16-mixed", f"trainer.accumulate_grad_batches={accumulate}"]
    records = worker("train", *DEEP, *options)
    same(records[0]["final"], records[1]["final"])
    assert all(batch["image"].dtype == torch.float32 for record in records for batch in record["batches"])

    alone, before = built(*DEEP), records[0]["weights"]
    alone.network.load_state_dict({name: weight.bfloat16().float() for name, weight in before.items()})
    expected = average(alone, records, 1, accumulate)
    found = records[0]["gradient"]
    matrices = [gradient for name, gradient in found.items() if "qkv" in name]
    assert not any(torch.equal(gradient, gradient.bfloat16().float()) for gradient in matrices)  # added up in float32
    assert distance(found, expected, "qkv") < 0.02
    assert distance(found, expected) < 0.02

    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    clipped = {name: gradient * min(1.0, 0.1 / float(total)) for name, gradient in expected.items()}
    step = {name: -gradient / (gradient.abs() + 1) for name, gradient in clipped.items()}
    assert distance({name: weight - before[name] for name, weight in records[0]["final"].items()}, step) < 0.02


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor], part: str = "") -> float:
    """Of all tensors whose name has this part, as one vector, relative to its norm."""
    chosen = [name for name in expected if part in name]
    difference, norm = (
        torch.cat([value.double().flatten() for value in values])
        for values in ([actual[n] - expected[n] for n in chosen], [expected[n] for n in chosen])
    )
    return float(difference.norm() / norm.norm())


WATCHED = [
    ["trainer=deepspeed", "model.checkpointing.every=2", "trainer.accumulate_grad_batches=2"],
    ["trainer=ddp"],
    ["trainer=fsdp", "model.checkpointing.every=1"],
    ["trainer=cpu", "model.checkpointing.every=2", "trainer.accumulate_grad_batches=2"],
]


@pytest.mark.long
def test_the_mean_mode_is_measured_alike(worker: Worker, tmp_path: Path) -> None:
    # All samples' attention is looked at, or it would be other samples that each process looks at.
    watch = ["trainer.max_steps=5", "callbacks.monitor.probe.every=2", "callbacks.monitor.probe.blocks=3",
             "callbacks.monitor.probe.watched=1", "callbacks.monitor.probe.attention_samples=8"]  # fmt: skip
    files = [tmp_path / "stability" / name for name in ("trace.csv", "depth.csv")]
    worker("watch", *SMALL, *watch, "trainer=cpu")
    plain = [read_table(file) for file in files]
    assert [len(table["step"]) for table in plain] == [5, 9]  # each step; three blocks at steps 0, 2 and 4
    for options in WATCHED:
        worker("watch", *SMALL, *watch, *options)
        for table, expected in zip(map(read_table, files), plain, strict=True):
            for name, column in expected.items():
                np.testing.assert_allclose(table[name], column, rtol=2e-4, atol=1e-9, err_msg=f"{name}: {options}")
                assert np.isfinite(column).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["trainer=deepspeed", "trainer.precision=bf16-mixed"],
        pytest.param(["trainer=deepspeed", "trainer.devices=1"], marks=pytest.mark.long),
        pytest.param(["trainer=fsdp", "trainer.devices=1"], marks=pytest.mark.long),
        pytest.param(["trainer=fsdp", "trainer.precision=bf16-mixed"], marks=pytest.mark.long),
    ],
    ids=lambda options: "_".join(o.partition("=")[2] for o in options),
)
def test_initial_weights_are_the_seeds_whatever_runs(worker: Worker, options: list[str]) -> None:
    small = ["model=tiny", "trainer.accelerator=cpu", "seed=3"]
    record = worker("build", *small, *options, weights=True)[0]
    expected = weights(built(*small))
    if options == ["trainer=deepspeed", "trainer.precision=bf16-mixed"]:
        expected = {name: weight.bfloat16() for name, weight in expected.items()}  # rounded, not drawn anew
    same(record["initial"], expected)
    for name, weight in record["initial"].items():
        if name.endswith(("attention.proj.weight", "ffn.w2.weight", "alpha")):
            assert not weight.any(), name
        if name.endswith("beta"):
            assert bool((weight == weight.new_tensor(4**-0.5)).all()), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_construction_holds_a_share_and_a_few_blocks(worker: Worker, strategy: str) -> None:
    depth, width = 64, 512
    sizes = [f"model.depth={depth}", f"model.width={width}", "model.num_heads=4", "trainer.accelerator=cpu"]
    records = worker("build", *sizes, f"trainer={strategy}")
    block = 4 * (13 * width**2 + 4 * width)  # bytes
    group = 8 if strategy == "fsdp" else 1
    for record in records:
        # Half of the network; a group of blocks while it is built and sharded; 40 kB of bookkeeping per parameter.
        assert record["peak"] < depth * block / 2 + (group + 3) * block + depth * 8 * 40_000, record["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp"])
def test_matrices_decay_but_not_the_patch_projection(worker: Worker, strategy: str) -> None:
    """A rate so small that only the decay moves a weight: by 1 − 1e-6 · 1e5 in each of two steps."""
    record, _ = worker("train", f"trainer={strategy}", "trainer.devices=2", *SMALL, "optim.schedule=constant",
                       "optim.warmup_steps=0", "optim.lr=1e-6", "optim.weight_decay=1e5", "trainer.max_steps=2",
                       "trainer.val_check_interval=2")  # fmt: skip
    ratios = {
        name: float(record["final"][name].norm() / before.norm())
        for name, before in record["initial"].items()
        if before.norm() > 0.1
    }
    kept = {name for name, ratio in ratios.items() if ratio == pytest.approx(1, abs=1e-3)}
    assert all(ratio == pytest.approx(0.81, abs=1e-3) for name, ratio in ratios.items() if name not in kept)
    gains = {name for name in ratios if name.endswith("beta")}
    assert kept == {"patch_proj.weight", "context.table"} | gains
    assert "blocks.5.ffn.w2.weight" in ratios
