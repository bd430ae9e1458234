"""Activation checkpointing: equal gradients to the bit, as few blocks as the budget allows, the announced peak."""

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.layers import SwiGLU
from mvsplit.models.recompute import Checkpointing, Schedule, choose, chunk_size, saved_bytes
from mvsplit.models.residuals import LayerScale, MVSplit, PreNorm

GIB = 2**30


def network(residual: Any = MVSplit, depth: int = 9, width: int = 16, **checkpointing: Any) -> DiT:
    torch.manual_seed(0)
    context = functools.partial(ClassTokens, num_classes=5)
    made = DiT([4, 6], 2, 2, depth, width, 2, context, residual, checkpointing=Checkpointing(**checkpointing))
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)  # zeros would hide differences
    return made


def gradients(made: DiT, batch: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    z, t, classes = torch.randn(batch, 2, 4, 6), torch.rand(batch), torch.arange(batch)
    made.zero_grad()
    made(z, t, classes).square().sum().backward()
    return [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]


def runs_per_block(made: DiT) -> list[int]:
    counts = [0] * len(made.blocks)

    def count(number: int, *_: Any) -> None:
        counts[number] += 1

    handles = [block.register_forward_pre_hook(functools.partial(count, i)) for i, block in enumerate(made.blocks)]
    gradients(made)
    for handle in handles:
        handle.remove()
    return counts


WAYS: list[dict[str, Any]] = [
    {"every": 1}, {"every": 2}, {"every": 4}, {"every": 100}, {"every": 1, "fraction": 0.75},
    {"every": 2, "fraction": 0.1}, {"every": "auto"}, {"every": "auto", "budget_gib": 1e-3},
    {"every": "auto", "budget_gib": 2e-4}, {"every": 2, "offload": True}, {"every": "auto", "offload": True},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("residual", [MVSplit, PreNorm, LayerScale])
def test_gradients_are_the_same_to_the_bit(residual: type, way: dict[str, Any]) -> None:
    expected = gradients(network(residual))
    made = network(residual, **way)
    for _ in range(2):  # `auto` measures in the first
        for ours, theirs in zip(gradients(made), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_recomputation_drops_what_the_forward_pass_dropped(
    monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    plain = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: F.dropout(plain(self, x), 0.3))
    expected, made = gradients(network()), network(**way)
    for _ in range(2):
        for ours, theirs in zip(gradients(made), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(gradients(network(), batch=2)[0], expected[0])


def test_gradients_reach_blocks_above_frozen_layers() -> None:
    made = network(every=2)
    for part in (made.patch_proj, made.context):
        part.requires_grad_(False)
    assert len(gradients(made)) == len(list(made.parameters())) - 3
    with torch.no_grad():
        assert not made(torch.zeros(1, 2, 4, 6), torch.zeros(1), torch.zeros(1, dtype=torch.long)).requires_grad


@pytest.mark.parametrize(
    ("way", "twice"),
    [
        ({}, 0),
        ({"every": 1}, 9),
        ({"every": 4}, 9),
        ({"every": 1, "fraction": 0.75}, 7),
        ({"every": 2, "fraction": 0.1}, 1),
        ({"every": "auto", "budget_gib": 1.0}, 0),
    ],
    ids=str,
)
def test_only_the_first_blocks_run_again(way: dict[str, Any], twice: int) -> None:
    assert runs_per_block(network(**way)) == [2] * twice + [1] * (9 - twice)


def test_the_automatic_schedule() -> None:
    a, c = 20, 1
    assert choose(1000, a, c, None) == Schedule(993, 7)  # k = √(1000/20)
    assert choose(400, a, c, None).every in (4, 5)
    assert choose(1000, a, c, 1000 * a) == Schedule(0, 1)
    assert choose(1000, a, c, 281) == choose(1000, a, c, None)  # 282 is the least
    for budget in (282, 300, 1000, 5000, 15000):
        chosen = choose(1000, a, c, budget)
        assert chosen.peak_bytes(1000, a, c) <= budget
        fewer = [Schedule(chosen.recomputed - 1, k) for k in range(1, chosen.recomputed)]
        assert all(schedule.peak_bytes(1000, a, c) > budget for schedule in fewer)
    assert choose(1000, a, 0, None) == Schedule(999, 1)  # inputs in host memory
    assert choose(1, a, c, 5) == Schedule(0, 1)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages made inside it that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.now += storage.nbytes()
                self.known[storage._cdata] = weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


BATCH = 96
"""Large enough for activations to outweigh the gradients of the weights, which the formula leaves out."""


def peak_of_a_step(made: DiT) -> int:
    gradients(made)
    z, classes = torch.randn(BATCH, 2, 4, 6), torch.zeros(BATCH, dtype=torch.long)
    made.zero_grad()
    made(z, torch.zeros(BATCH), classes).sum().backward()  # `auto` measures
    with Live() as live:
        made(z, torch.zeros(BATCH), classes).sum().backward()
    return live.peak


def test_peaks_are_as_computed() -> None:
    """Everything alive during a step, against the formula from one block's measured bytes."""
    x = torch.randn(BATCH, 10, 32, requires_grad=True)
    made = network(width=32, depth=24)
    tables = made.rope_tables(made.rows, made.columns, num_context=4)
    _, a = saved_bytes(lambda: made.blocks[0](x, *tables, made.segments), made.blocks[0], tables)
    c = x.nbytes
    assert 20 * c < a < 30 * c
    for schedule in (
        Schedule(0, 0),
        Schedule(24, 1),
        Schedule(24, 2),
        Schedule(24, 6),
        Schedule(12, 1),
        Schedule(18, 6),
    ):
        fraction = schedule.recomputed / 24
        way = {"every": schedule.every, "fraction": fraction} if fraction else {}
        peak = peak_of_a_step(network(width=32, depth=24, **way))
        computed = schedule.peak_bytes(24, a, c)
        assert computed < peak < computed + 1.2 * a, schedule  # the rest: gradients on their way
    for budget in (10 * a, 5 * a, 4 * a):
        made = network(width=32, depth=24, every="auto", budget_gib=budget / GIB)
        assert budget - 2 * a < peak_of_a_step(made) < budget + 1.2 * a


def test_parameters_and_shared_tensors_are_not_counted() -> None:
    layer, x, shared = nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True), torch.randn(4)
    result, kept = saved_bytes(lambda: layer(x) * shared, layer, (shared,))
    assert kept == x.nbytes  # the product saves `shared` alone, which is not counted
    assert result.shape == (3, 4)
    _, kept = saved_bytes(lambda: layer(x) * shared, nn.Identity())
    assert kept == x.nbytes + layer.weight.nbytes + shared.nbytes


def test_only_kept_inputs_are_offloaded() -> None:
    z, classes = torch.randn(3, 2, 4, 6), torch.zeros(3, dtype=torch.long)
    here, there = network(every=3), network(every=3, offload=True)
    (_, kept), (_, left) = (saved_bytes(lambda m=m: m(z, torch.zeros(3), classes), m) for m in (here, there))
    trunk = 3 * 10 * 16 * 4
    assert kept - left == 3 * trunk  # the inputs of three groups are offloaded


def test_buffers_in_host_memory_are_reused_and_waste_little() -> None:
    for size in (512, 1024, 68_157_440, 3 << 20, 1 << 30):
        chunk = chunk_size(size)
        assert chunk & (chunk - 1) == 0
        assert 0.9 <= chunk // size * size / chunk <= 1
        assert chunk <= 16 * size
    made = network(every=3, offload=True)
    host = made.checkpointing._host
    expected = gradients(network(every=3))
    for _ in range(3):  # later steps reuse the buffers of the first, with other values in them
        found = gradients(made)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert {size: len(free) for size, free in host._free.items()} == {(2048, False): 3}  # one for each group
    kept = [host.pack(torch.full((480,), float(i))) for i in range(3)]
    assert len({t.host.data_ptr() for t in kept}) == 3
    assert [host.unpack(t)[0].item() for t in kept] == [0, 1, 2]
    number = len(host._free[2048, False])
    del kept
    assert len(host._free[2048, False]) == number + 3


def test_a_budget_that_is_too_small_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = network(every="auto", budget_gib=1e-6)
    for _ in range(2):
        gradients(made)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2  # by the first step only
    assert "of 9 blocks are recomputed, in groups of" in logged[0]
    assert "model.checkpointing.budget_gib = 1e-06: the schedule with the lowest peak needs" in logged[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget_gib": 2.0}, r"model\.checkpointing\.budget_gib = 2\.0: only allowed with every=auto"),
        ({"fraction": 0.5}, r"model\.checkpointing\.fraction = 0\.5: only allowed with every=1, 2, …, but every = 0"),
        ({"fraction": 0.5, "every": "auto"}, r"but every = auto"),
        ({"offload": True}, r"model\.checkpointing\.offload = True: nothing to offload, since every = 0"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointing(**settings)
