"""What needs a GPU: the same numbers there as on the CPU."""

import functools

import pytest
import torch

from mvsplit.flow.graph_replay import GraphReplay
from mvsplit.flow.objective import Flow, velocity_loss
from mvsplit.flow.sampler import Sampler
from mvsplit.kernels.merge_norm import merge_norm
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
