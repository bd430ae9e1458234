"""What needs a GPU: the same numbers there as on the CPU."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvsplit.flow.graph_replay import GraphReplay
from mvsplit.flow.objective import Flow, velocity_loss
from mvsplit.flow.sampler import Sampler
from mvsplit.kernels import choice
from mvsplit.kernels.merge_norm import merge_norm, merge_norm_reference
from mvsplit.kernels.rope_norm import rope_norm
from mvsplit.kernels.swiglu import swiglu
from mvsplit.models.attention import rope_table
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.residuals import MVSplit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_draws_are_the_same_on_every_device() -> None:
    position, x0 = torch.arange(64), torch.zeros(64, 1, 8, 8)
    ours, theirs = (Flow().draw(0, position.to(d), x0.to(d)) for d in ("cpu", "cuda"))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right.cpu(), rtol=0, atol=1e-6)


def test_merge_and_its_gradients() -> None:
    x, update = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    gradients = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device, copy=True).requires_grad_() for t in (x, update, torch.rand(16).double() * 0 + 0.3)]
        out = merge_norm(inputs[0], inputs[1], inputs[2], inputs[2], (5, 3), 1e-6)
        gradients.append(torch.autograd.grad(out.square().sum() + out.sum(), inputs))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right.cpu(), rtol=0, atol=1e-10)


def test_loss_of_a_deep_network() -> None:
    torch.manual_seed(0)
    make = functools.partial(MVSplit, writer_init="standard")
    network = DiT([8, 8], 1, 2, 50, 64, 4, functools.partial(ClassTokens, num_classes=10), make)
    torch.nn.init.normal_(network.final_proj.weight, std=0.1)
    x0, x1 = torch.randn(2, 4, 1, 8, 8)
    losses = [
        velocity_loss(
            network.to(d), x0.to(d), x1.to(d), torch.full((4,), 0.3, device=d), torch.arange(4, device=d)
        ).cpu()
        for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_replayed_sampling_gives_the_same_samples_for_all_batch_sizes() -> None:
    torch.manual_seed(0)
    make = functools.partial(MVSplit, writer_init="standard")
    network = DiT([8, 8], 1, 2, 20, 64, 4, functools.partial(ClassTokens, num_classes=10), make).eval().cuda()
    torch.nn.init.normal_(network.final_proj.weight, std=0.1)
    replay, sampler = GraphReplay(network), Sampler("heun", 4, cfg_scale=2.0, cfg_interval=[0.1, 0.9])
    noise, labels = torch.randn(8, 1, 8, 8).cuda(), torch.arange(8).cuda()
    for size in (8, 8, 5, 1):
        expected = sampler.sample(network, labels[:size], noise[:size])
        got = sampler.sample(replay, labels[:size], noise[:size])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert len(replay._recorded) == 4, "guided and unguided of two sizes; the others are called as usual"


# ------------------------------------------------------------------------ fused kernels

SEGMENTS = (61, 4)


def operations(
    width: int, trunk: torch.dtype, branch: torch.dtype
) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Operations as functions of tensors and `fused`, and their inputs."""
    generator = torch.Generator("cuda").manual_seed(width)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    tokens, heads = sum(SEGMENTS), 4
    cos, sin = (t.cuda() for t in rope_table(61, 1, width // heads, num_context=4))
    update = normal(3, tokens, width, dtype=branch)
    return {
        "merge_norm": (
            lambda *t, fused: merge_norm(*t, SEGMENTS, 1e-6, fused),
            [normal(3, tokens, width, dtype=trunk), update, normal(width), normal(width)],
        ),
        "rope_norm": (
            lambda qkv, fused: torch.stack(rope_norm(qkv, cos, sin, 1e-6, heads, fused)),
            [normal(3, tokens, 3 * width, dtype=branch)],
        ),
        "swiglu": (lambda packed, fused: swiglu(packed, fused), [normal(3, tokens, 2 * width, dtype=branch)]),
    }


def step(function: Callable[..., Any], inputs: list[Tensor], fused: bool) -> list[Tensor]:
    """The result and the gradients of sin(3·result)'s sum."""
    out = function(*inputs, fused=fused)
    return [out, *torch.autograd.grad(out, inputs, (3 * out.detach().float()).sin().to(out.dtype))]


@pytest.mark.parametrize("width", [64, 208, 1024, 8192])
@pytest.mark.parametrize(
    ("trunk", "branch"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_fused_kernels_are_as_exact_as_plain_ones(width: int, trunk: torch.dtype, branch: torch.dtype) -> None:
    for name, (function, inputs) in operations(width, trunk, branch).items():
        wide = [t.detach().double().requires_grad_() for t in inputs]
        merged = name == "merge_norm"
        exact = merge_norm_reference(*wide, SEGMENTS, 1e-6) if merged else function(*wide, fused=False)
        plain = function(*inputs, fused=False)
        g = (3 * plain.detach().float()).sin().to(plain.dtype)  # the same one for all three
        right = [exact.detach(), *torch.autograd.grad(exact, wide, g.double())]
        scale = max(float(t.norm()) for t in right)
        errors = []
        for out in (function(*inputs, fused=True), plain):
            found = [out.detach(), *torch.autograd.grad(out, inputs, g)]
            errors.append([float((t.double() - r).norm()) for t, r in zip(found, right, strict=True)])
        for number, (ours, theirs) in enumerate(zip(*errors, strict=True)):
            # A narrow trunk is read again as it was rounded: the gains' float32 gradients see that, others hardly.
            floor = 2**-11 if trunk == torch.bfloat16 and number > 2 else 4 * torch.finfo(torch.float32).eps
            assert ours <= 1.3 * theirs + floor * scale, (name, number)


def test_fused_kernels_do_not_wait_for_the_gpu() -> None:
    for function, inputs in operations(1024, torch.float32, torch.bfloat16).values():
        step(function, inputs, True)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(function, inputs, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_fused_kernels_are_captured_in_a_graph() -> None:
    for name, (function, inputs) in operations(256, torch.float32, torch.bfloat16).items():
        expected = step(function, inputs, True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(function, inputs, True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(function, inputs, True)
        graph.replay()
        for left, right in zip(found, expected, strict=True):
            assert torch.equal(left, right), name


@pytest.mark.parametrize("compile", [False, True])
def test_auto_times_both_forms_and_finds_them_equal(compile: bool) -> None:
    sizes = choice.Sizes((256, 4), 1024, 8, 3072, torch.float32, torch.bfloat16)
    ratios = choice.time_ratios(sizes, 8, torch.device("cuda"), compile)
    assert all(0 < ratio < 10 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("compile", [False, True])
def test_a_network_with_fused_kernels(compile: bool) -> None:
    gradients = []
    for kernels in ("plain", "fused"):
        torch.manual_seed(0)
        make: Any = functools.partial(MVSplit, writer_init="standard")
        network = DiT([8, 8], 1, 2, 3, 64, 4, functools.partial(ClassTokens, num_classes=10), make,
                      compile=compile and kernels == "fused", kernels=kernels).cuda()  # fmt: skip
        torch.nn.init.normal_(network.final_proj.weight, std=0.1)
        z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            network(z, torch.zeros(4, device="cuda"), torch.arange(4, device="cuda")).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()
