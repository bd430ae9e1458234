"""Path, times, guidance and solvers against known answers."""

import functools
import math

import pytest
import torch
from torch import Tensor

from mvsplit.flow.objective import Flow, interpolate, velocity_loss
from mvsplit.flow.sampler import SOLVERS, Sampler, guided_velocity, sample_noise
from mvsplit.flow.times import LogitNormal, time_grid, time_shift
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.residuals import MVSplit


def network() -> DiT:
    torch.manual_seed(0)
    context = functools.partial(ClassTokens, num_classes=4)
    net = DiT([4, 4], 1, 2, 2, 16, 2, context, functools.partial(MVSplit, writer_init="standard"))
    torch.nn.init.normal_(net.final_proj.weight, std=0.3)
    return net.double()


def test_path_ends_at_data_and_noise() -> None:
    x0, x1 = torch.randn(2, 3, 1, 2, 2)
    assert torch.equal(interpolate(x0, x1, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones(3)), x1)
    torch.testing.assert_close(interpolate(x0, x1, torch.tensor([0.25, 0.5, 0]))[0], 0.75 * x0[0] + 0.25 * x1[0])


def test_loss_of_the_true_velocity_is_zero() -> None:
    x0, x1 = torch.randn(2, 3, 1, 2, 2)
    off_by = [velocity_loss(lambda z, t, c, d=d: x0 - x1 + d, x0, x1, torch.rand(3), torch.zeros(3)) for d in (0, 2)]  # type: ignore[arg-type]
    assert off_by[0].tolist() == [0, 0, 0]
    assert off_by[1].tolist() == pytest.approx([4, 4, 4])


def test_time_shift_is_the_papers() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert time_shift(t, 4.0).tolist() == pytest.approx([0, 4 / 7, 0.8, 1])
    assert time_shift(t, 1.0).tolist() == t.tolist()
    assert time_grid(4, 4.0).tolist() == pytest.approx([1, 12 / 13, 0.8, 4 / 7, 0])


def test_logit_normal_has_its_quantiles() -> None:
    t = LogitNormal(mean=0.5, std=2.0)(torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64))
    assert t.logit().tolist() == pytest.approx([0.5, 2.5])


def test_draws_depend_on_the_place_in_the_stream_alone() -> None:
    flow, position, x0 = Flow(label_dropout=0.5), torch.arange(100, 164), torch.zeros(64, 1, 8, 8)
    whole = flow.draw(7, position, x0)
    pieces = [flow.draw(7, p, x0[: len(p)]) for p in position.split(5)]
    for i, expected in enumerate(whole):
        assert torch.equal(expected, torch.cat([piece[i] for piece in pieces]))
    assert 20 < whole[2].sum() < 44  # half the labels dropped
    assert not torch.equal(whole[0], flow.draw(8, position, x0)[0])


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_reach_their_order(name: str, order: int, shift: float) -> None:
    # dx/d(−t) = x·cos(3t), so x(0) = x(1)·exp(sin(3)/3).
    exact = math.exp(math.sin(3) / 3)
    errors = []
    for steps in (320, 640):
        one = torch.ones(1, dtype=torch.float64)
        x = SOLVERS[name](lambda x, t: x * math.cos(3 * t), one, time_grid(steps, shift))  # type: ignore[index]
        errors.append(abs(x.item() - exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("name", ["euler", "heun", "multistep"])
def test_solvers_are_exact_on_a_straight_path(name: str) -> None:
    x1, target = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(SOLVERS[name](lambda x, t: target - x1, x1, time_grid(3)), target)  # type: ignore[index]


def test_guidance_scale_1_equals_no_guidance() -> None:
    net, classes = network(), torch.tensor([0, 1, 2])
    x, t = torch.randn(3, 1, 4, 4).double(), 0.6
    plain = net(x, torch.full((3,), t), classes)
    assert torch.equal(guided_velocity(net, classes, 1.0)(x, t), plain)
    nearly = guided_velocity(net, classes, 1 + 1e-12)(x, t)  # the same by the formula, with both branches run
    torch.testing.assert_close(nearly, plain)


def test_guidance_formula_and_interval() -> None:
    net, classes = network(), torch.tensor([0, 1, 2])
    x = torch.randn(3, 1, 4, 4).double()
    conditional, null = net(x, torch.zeros(3), classes), net(x, torch.zeros(3), torch.full((3,), 4))
    assert not torch.allclose(conditional, null)
    velocity = guided_velocity(net, classes, 3.0, [0.2, 0.7])
    torch.testing.assert_close(velocity(x, 0.5), null + 3 * (conditional - null))
    torch.testing.assert_close(velocity(x, 0.7), null + 3 * (conditional - null))
    torch.testing.assert_close(velocity(x, 0.8), conditional)
    torch.testing.assert_close(velocity(x, 0.1), conditional)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_images_do_not_depend_on_the_batch(solver: str) -> None:
    net, sampler = network().float(), Sampler(solver=solver, steps=4, cfg_scale=2.0)  # type: ignore[arg-type]
    index, classes = torch.arange(8), torch.arange(8) % 4

    def draw(batch: int) -> Tensor:
        pairs = zip(index.split(batch), classes.split(batch), strict=True)
        return torch.cat([sampler.sample(net, c, sample_noise(5, i, (1, 4, 4)), time_shift=2.0) for i, c in pairs])

    images = {batch: draw(batch) for batch in (1, 3, 8)}
    for batch in (1, 3):
        # The noise is the same to the bit; matrix products of other sizes may round differently.
        torch.testing.assert_close(images[batch], images[8], rtol=0, atol=2e-6)
