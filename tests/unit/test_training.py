"""Parameter groups, schedule, average, checkpoint reading: each against a plain formulation."""

import functools
import math

import pytest
import torch
from torch import nn

from mvsplit.callbacks.ema import EMA
from mvsplit.flow.objective import Flow
from mvsplit.flow.sampler import Sampler
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.residuals import MVSplit
from mvsplit.training.checkpoints import check_fits
from mvsplit.training.module import FlowModule, Mean
from mvsplit.training.optim import AdamW
from mvsplit.utils.errors import UserError


def test_weight_decay_on_matrices_only() -> None:
    network = DiT([4, 4], 1, 2, 2, 16, 2, functools.partial(ClassTokens, num_classes=3), MVSplit)
    optimizer, _ = AdamW(weight_decay=0.1).build(network, max_steps=10)
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, free = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | free == set(names.values())
    assert all(name.endswith("weight") for name in decayed)
    assert {name.rsplit(".", 1)[-1] for name in free - {"patch_proj.weight"}} == {"alpha", "beta", "bias", "table"}


def test_schedule_warms_up_then_stays_or_falls() -> None:
    constant = AdamW(warmup_steps=4, schedule="constant")
    assert [constant.factor(s, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = AdamW(warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    assert cosine.factor(4, 14) == 1.0
    assert cosine.factor(9, 14) == pytest.approx(0.55)
    assert cosine.factor(14, 14) == pytest.approx(0.1)
    assert cosine.factor(100, 14) == pytest.approx(0.1)
    assert AdamW(warmup_steps=0).factor(0, 10) == 1.0
    assert AdamW(warmup_steps=4, schedule="cosine", decay_steps=8).factor(8, 100) == pytest.approx(0.0)


def test_validation_under_bf16_true_rounds_neither_sums_nor_times() -> None:
    metric = nn.ModuleList([Mean()]).to(torch.bfloat16)[0]
    assert isinstance(metric, Mean)
    losses = torch.linspace(0.4, 0.6, 40_000)
    for batch in losses.split(64):
        metric.update(batch, torch.ones(len(batch), dtype=torch.bfloat16))
    assert float(metric.weight) == 40_000
    assert float(metric.compute()) == pytest.approx(0.5, rel=1e-5)

    module = FlowModule(lambda: nn.Identity(), Flow(), AdamW(), Sampler(), val_times=1000)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around the step
    try:
        times = module.validation_times(torch.arange(1000))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(times, (torch.arange(1000) + 0.5) / 1000)


def test_average_follows_its_formula() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(3, 2)

    class FakeTrainer:
        global_step = 0

    module, trainer, ema = Holder(), FakeTrainer(), EMA(decay=0.6)
    expected = module.network.weight.detach().clone()
    ema.on_train_start(trainer, module)  # type: ignore[arg-type]
    for step in range(1, 8):
        with torch.no_grad():
            module.network.weight.add_(torch.randn(2, 3))
        trainer.global_step = step
        for _ in range(2):  # a micro-batch without a step changes nothing
            ema.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.network.weight.detach()
    torch.testing.assert_close(ema.shadow["network.weight"], expected)
    trained = module.network.weight.detach().clone()
    ema.on_validation_start(trainer, module)  # type: ignore[arg-type]
    assert torch.equal(module.network.weight, ema.shadow["network.weight"])
    ema.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert torch.equal(module.network.weight, trained)


def test_weights_of_another_network_are_named() -> None:
    ours = {"a": (2,), "b": (3,)}
    check_fits(ours, ours)
    with pytest.raises(UserError, match="the checkpoint has no 'b'"):
        check_fits({"a": (2,)}, ours)
    with pytest.raises(UserError, match=r"'a' has shape \(5,\) there and \(2,\) here"):
        check_fits({"a": (5,), "b": (3,)}, ours)


def test_cosine_is_a_cosine() -> None:
    optim = AdamW(warmup_steps=0, schedule="cosine")
    assert [optim.factor(s, 4) for s in range(5)] == pytest.approx(
        [(1 + math.cos(math.pi * s / 4)) / 2 for s in range(5)]
    )
