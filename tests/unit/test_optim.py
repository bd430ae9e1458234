"""Muon, moments in fewer bits, steps in the backward pass: against torchao, an SVD, and the same without them."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import compose_config
from torch import Tensor, nn

from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.residuals import MVSplit
from mvsplit.training import gradients, low_bit, settings
from mvsplit.training.checkpoint_format import LocalTensors
from mvsplit.training.in_backward import StepsInBackward
from mvsplit.training.local_state import load_optimizer, load_weights, local_optimizer, local_weights
from mvsplit.training.low_bit import LowBitAdamW, round_stochastically
from mvsplit.training.muon import PackedMuon, Together
from mvsplit.training.optim import AdamW, Muon
from mvsplit.training.snapshots import Snapshot
from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError

MAKERS: dict[str, Callable[[], AdamW]] = {
    "float32": lambda: AdamW(lr=1e-2, warmup_steps=2),
    "bfloat16": lambda: AdamW(lr=1e-2, warmup_steps=2, moments="bfloat16"),
    "8bit": lambda: AdamW(lr=1e-2, warmup_steps=2, moments="8bit"),
    "muon": lambda: Muon(lr=1e-2, warmup_steps=2),
}
MATRICES = ["attention.proj.weight", "attention.qkv.weight", "ffn.w13.weight", "ffn.w2.weight"]


def dit(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return DiT([4, 4], 1, 2, 2, width, 2, functools.partial(ClassTokens, num_classes=3), MVSplit)


def loss(network: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(4, 1, 4, 4, generator=generator)
    return (network(z, torch.zeros(4), torch.arange(4) % 3) - 1).square().mean()


def train(network: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(network, step).backward()
        optimizer.step()
        scheduler.step()


def random_steps(weight: Tensor, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(weight.shape, generator=generator) * 10.0 ** -(step % 3) for step in range(steps)]


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_everything_else() -> None:
    network = dit()
    optimizer, _ = Muon(weight_decay=0.1).build(network, 10)
    assert isinstance(optimizer, Together)
    names = {id(p): name for name, p in network.named_parameters()}
    muon, adamw = ([[names[id(p)] for p in group["params"]] for group in part.param_groups] for part in optimizer.parts)
    assert sorted(name for of in muon for name in of) == sorted(
        f"blocks.{i}.{name}" for i in range(2) for name in MATRICES
    )
    parts = {name: group["parts"] for group, of in zip(optimizer.param_groups, muon, strict=False) for name in of}
    assert {name.split(".")[-2]: number for name, number in parts.items()} == {"qkv": 3, "w13": 2, "proj": 1, "w2": 1}
    assert sorted(name for of in muon + adamw for name in of) == sorted(names.values())
    assert adamw[0] == ["final_proj.weight"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.1, 0.0]


@pytest.mark.parametrize("kind", MAKERS)
def test_the_patch_projection_does_not_decay(kind: str) -> None:
    """It is a convolution in the reference code, whose weight decay is of two-dimensional weights only."""
    network = dit()
    optimizer, _ = dataclasses.replace(MAKERS[kind](), weight_decay=0.1).build(network, 10)
    names = {id(p): name for name, p in network.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    matrices = {f"blocks.{i}.{name}" for i in range(2) for name in MATRICES} | {"final_proj.weight"}
    assert {name for name, value in decay.items() if value} == matrices
    assert network.get_parameter("patch_proj.weight").ndim == 2


@pytest.mark.parametrize("parts", [1, 3])
def test_muons_step_is_orthogonal_as_an_svd_has_it(parts: int) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(parts * 48, 64))
    scales = torch.arange(1.0, parts + 1).repeat_interleave(48)[:, None] ** 4  # one part's gradient is far larger
    gradient = torch.randn(weight.shape) * scales
    weight.grad = gradient.clone()
    options: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 5}
    PackedMuon([{"params": [weight], "parts": parts}], **options).step()
    for step, of in zip(weight.detach().chunk(parts), gradient.chunk(parts), strict=True):
        orthogonal = -step / (0.5 * 0.2 * 64**0.5)
        u, _, v = torch.linalg.svd(of, full_matrices=False)
        values = torch.linalg.svdvals(orthogonal)
        assert 0.6 < values.min() <= values.max() < 1.3
        assert float((orthogonal * (u @ v)).sum()) / 48 == pytest.approx(
            float(values.mean()), rel=0.01
        )  # the same directions
        assert float(step.square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=0.25)  # about AdamW's


def test_codes_of_8_bits_are_torchaos_to_the_bit() -> None:
    from torchao.optim import AdamW8bit

    torch.manual_seed(0)
    ours, theirs = (nn.ParameterList([torch.randn(64, 64), torch.randn(100)]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = LowBitAdamW([{"params": list(ours), "weight_decay": 0.1}], 1e-2, (0.9, 0.95), 1e-8, "8bit")
    reference = AdamW8bit(list(theirs), 1e-2, (0.9, 0.95), 1e-8, 0.1)
    with torch.compiler.set_stance("force_eager"):
        for gradients_ in zip(*(random_steps(p, 5) for p in ours), strict=True):
            for mine, other, gradient in zip(ours, theirs, gradients_, strict=True):
                mine.grad, other.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    state, expected = optimizer.state[ours[0]], reference.state[theirs[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], expected[name].codes)
        assert torch.equal(state[f"{name}_scale"], expected[name].scale)
    assert optimizer.state[ours[1]]["exp_avg"].dtype == torch.float32  # small


def test_float32_moments_of_float32_weights_are_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    optimizer = LowBitAdamW([{"params": [ours], "weight_decay": 0.1}], 1e-2, (0.9, 0.95), 1e-8, "float32")
    reference = torch.optim.AdamW([theirs], 1e-2, (0.9, 0.95), 1e-8, 0.1)
    for gradient in random_steps(ours, 20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_bfloat16_weights_move_by_the_right_amount_on_average(moments: low_bit.Moments) -> None:
    """At a rate of 1e-4 a weight of 0.5 is 20 steps from the next in bfloat16; rounded to the nearest, none moves."""
    weight = nn.Parameter(torch.full((64, 256), 0.5, dtype=torch.bfloat16))
    nearest = nn.Parameter(weight.detach().clone())
    optimizer = LowBitAdamW([{"params": [weight]}], 1e-4, (0.9, 0.999), 1e-8, moments)
    plain = torch.optim.AdamW([nearest], 1e-4, weight_decay=0.0)
    for _ in range(50):
        weight.grad, nearest.grad = torch.ones_like(weight), torch.ones_like(nearest)
        optimizer.step()
        plain.step()
    assert torch.equal(nearest, torch.full_like(nearest, 0.5))
    assert float(0.5 - weight.detach().double().mean()) == pytest.approx(50 * 1e-4, rel=0.03)


def test_bfloat16_moments_fall_again() -> None:
    """The second moment falls by 0.1 % a step: rounded to the nearest it would stay."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = LowBitAdamW([{"params": [weight]}], 1e-4, (0.9, 0.999), 1e-8, "bfloat16")
    for step in range(300):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    assert float(second.double().mean()) == pytest.approx(1e-3 * 0.999**299, rel=0.01)


def test_rounding_keeps_the_mean_and_what_is_no_number() -> None:
    values = torch.tensor([1.0, 1.001, -3.3e-5, 1e30, -7.77e-20]).repeat_interleave(20_000)
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    rounded = round_stochastically(values, noise).double().view(5, -1)
    assert rounded.mean(1).tolist() == pytest.approx(values.view(5, -1)[:, 0].tolist(), rel=1e-4)
    assert rounded.unique().numel() == 8  # both neighbours of each; 1 is its own, and one of 1.001's
    nan = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    special = torch.cat([torch.tensor([float("inf"), -float("inf")]), nan])
    kept = round_stochastically(special, torch.full((4,), (1 << 16) - 1, dtype=torch.int32))
    assert torch.equal(kept.isnan(), special.isnan())
    assert torch.equal(kept[:2].float(), special[:2])


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_continues_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """Through the slices that checkpoints and snapshots hold: tensors without a class of their own."""
    if kind == "muon" and dtype == torch.bfloat16:
        return  # refused
    whole, part = dit(64).to(dtype), dit(64).to(dtype)
    train(whole, *MAKERS[kind]().build(whole, 10), range(6))
    optimizer, scheduler = MAKERS[kind]().build(part, 10)
    train(part, optimizer, scheduler, range(3))
    settings_, slices = local_optimizer(part, optimizer)
    settings_, tensors, weights = copy.deepcopy(settings_), LocalTensors(slices), LocalTensors(local_weights(part))
    assert all(type(tensors.whole(name)) is Tensor for name in tensors)
    coded = [name for name in tensors if tensors.dtypes[name] == torch.uint8]
    assert len(coded) == (2 * 2 * 4 if kind == "8bit" else 0)  # both moments of each matrix in the blocks

    resumed = dit(64).to(dtype)
    optimizer, following = MAKERS[kind]().build(resumed, 10)
    following.load_state_dict(scheduler.state_dict())
    load_weights(resumed, weights)
    load_optimizer(resumed, optimizer, settings_, tensors)
    train(resumed, optimizer, following, range(3, 6))
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("kind", MAKERS)
def test_a_rollback_restores_the_state_to_the_bit(kind: str) -> None:
    network = dit(64)
    optimizer, scheduler = MAKERS[kind]().build(network, 10)
    for first in (0, 2):  # before the first step there is no state
        train(network, optimizer, scheduler, range(first))
        before = {name: part.values.clone() for name, part in local_optimizer(network, optimizer)[1].items()}
        weights = [p.detach().clone() for p in network.parameters()]
        snapshot = Snapshot(first, network, optimizer, {})  # type: ignore[arg-type]
        train(network, optimizer, scheduler, range(2))
        snapshot.restore(network, optimizer, {})  # type: ignore[arg-type]
        after = local_optimizer(network, optimizer)[1]
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name].values, before[name]) for name in before)
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))
    assert len(before) > 0


@pytest.mark.parametrize("kind", MAKERS)
def test_steps_in_the_backward_pass_are_the_same_to_the_bit(kind: str) -> None:
    after, within = dit(), dit()
    optimizer, scheduler = MAKERS[kind]().build(after, 10)
    other, other_scheduler = MAKERS[kind]().build(within, 10)
    steps = StepsInBackward(other)
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in within.parameters()))

    for parameter in within.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    for step in range(4):
        optimizer.zero_grad()
        steps.clear()
        loss(after, step).backward()
        loss(within, step).backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert torch.equal(steps.gradient_norm(), gradients.gradient_norm(after, parameters))
        names = {"a": gradients.gradient_norms(after, lambda name: name.split(".")[0])}
        assert steps.gradient_norms(within, lambda name: name.split(".")[0]) == pytest.approx(names["a"], rel=1e-6)
        for one in (optimizer, other):
            one.step()  # the latter finds no gradients
        scheduler.step()
        other_scheduler.step()
    assert max(alive) == 0
    for name, parameter in within.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name
    steps.remove()
    loss(within, 0).backward()
    assert all(p.grad is not None for p in within.parameters())


@pytest.mark.slow
def test_the_compiled_update_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [dit(64).bfloat16() for _ in range(2)]
    for network, update in zip(networks, (low_bit.update, torch.compile(low_bit.update, dynamic=True)), strict=True):
        monkeypatch.setattr(low_bit, "update", update)
        train(network, *MAKERS["8bit"]().build(network, 10), range(3))
    for name, parameter in networks[1].named_parameters():  # it may round other sums, and now and then another way
        torch.testing.assert_close(parameter, networks[0].get_parameter(name), rtol=0.02, atol=1e-3)


IN_BACKWARD = ["optim.in_backward=true", "trainer.gradient_clip_val=null", "callbacks.monitor.probe=null"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim=muon", "trainer=deepspeed"],
            "optim = muon: needs whole matrices, which no process has; use trainer=ddp or optim=paper",
        ),
        (
            ["optim=muon", "trainer=fsdp"],
            "optim = muon: needs whole matrices, which no process has; use trainer=ddp or optim=paper",
        ),
        (
            ["optim=muon", "trainer.precision=bf16-true"],
            "optim = muon: would round its steps off bfloat16 weights; use trainer.precision=bf16-mixed",
        ),
        (["optim=muon", "optim.moments=8bit"], "optim.moments = 8bit: must be float32 with optim=muon"),
        (
            ["optim.moments=bfloat16", "trainer=fsdp"],
            "optim.moments = bfloat16: needs whole parameters, which no process has; use trainer=ddp or"
            " optim.moments=float32",
        ),
        (
            ["optim.moments=8bit", "trainer.precision=64-true"],
            "optim.moments = 8bit: steps are computed in float32; use trainer.precision=32-true",
        ),
        (["optim.moments=4bit"], "optim.moments = '4bit': must be 'float32', 'bfloat16' or '8bit'"),
        (
            [*IN_BACKWARD, "trainer=ddp_sim"],
            "optim.in_backward = true: only one process can take its steps there; use trainer=gpu or trainer=cpu",
        ),
        (
            [*IN_BACKWARD, "trainer.gradient_clip_val=1.0"],
            "optim.in_backward = true: trainer.gradient_clip_val = 1.0 needs the whole gradient first; use null",
        ),
        (
            [*IN_BACKWARD, "trainer.accumulate_grad_batches=2"],
            "optim.in_backward = true: trainer.accumulate_grad_batches = 2 adds up gradients first; use 1",
        ),
        (
            IN_BACKWARD[:2],
            "optim.in_backward = true: callbacks.monitor.probe measures gradients after the backward pass; use null",
        ),
        (
            [*IN_BACKWARD, "callbacks.monitor.guard.action=skip"],
            "optim.in_backward = true: callbacks.monitor.guard.action = skip would come too late; use warn",
        ),
    ],
)
def test_what_contradicts_the_optimiser_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.checked(compose_config("paths.output_dir=/nowhere", *overrides))
    assert str(caught.value) == message


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvsplit.training.optim.find_spec", lambda name: None)
    AdamW.check("bfloat16")
    with pytest.raises(
        UserError, match=r"^optim\.moments = 8bit: needs another package: pip install -e '\.\[lowbit\]'$"
    ):
        settings.checked(compose_config("paths.output_dir=/nowhere", "optim.moments=8bit"))


def test_one_gpu_for_a_thousand_blocks() -> None:
    config = to_plain(compose_config("paths.output_dir=/nowhere", "experiment=imagenet256_1000l_one_gpu"))
    settings.check_together(config)
    assert (config["trainer"]["devices"], config["trainer"]["precision"]) == (1, "bf16-true")
    assert config["optim"]["lr"] == 1.5625e-4
