"""Residuals against the paper's equations and against autograd, in float64."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mvsplit.kernels.merge_norm import merge_norm, merge_norm_reference, merge_reference, segment_mean, spread
from mvsplit.models.norm_placements import Keel, LayerNormScaling, PeriNorm, SiameseNorm
from mvsplit.models.residuals import (
    ChannelSplit,
    DeepNorm,
    LayerScale,
    MVSplit,
    PostNorm,
    PreNorm,
    Residual,
    ReZero,
)

B, D = 3, 10
SEGMENTS = [(5, 3), (7, 0), (0, 4), (1, 0), (1, 1), (6,)]
ALL = [
    PostNorm,
    PreNorm,
    ReZero,
    DeepNorm,
    LayerScale,
    MVSplit,
    ChannelSplit,
    Keel,
    LayerNormScaling,
    PeriNorm,
]


def tensors(segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(segments))
    x, update = torch.randn(2, B, sum(segments), D, generator=generator, dtype=torch.float64)
    return x, update


def norm(z: Tensor) -> Tensor:
    return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def mean(x: Tensor, segments: tuple[int, ...]) -> Tensor:
    return spread(segment_mean(x, segments), segments)


def centred(x: Tensor, segments: tuple[int, ...]) -> Tensor:
    return x - mean(x, segments)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_closed_form_backward_equals_autograd(segments: tuple[int, ...]) -> None:
    x, update = tensors(segments)
    alpha, beta = torch.linspace(-0.5, 1.2, D).double(), torch.linspace(1.5, 0.1, D).double()
    ours = [t.clone().requires_grad_() for t in (x, update, alpha, beta)]
    plain = [t.clone().requires_grad_() for t in (x, update, alpha, beta)]
    out, expected = merge_norm(*ours, segments, 1e-6), merge_norm_reference(*plain, segments, 1e-6)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    g = torch.randn_like(out)
    out.backward(g)
    expected.backward(g)
    for name, left, right in zip(("dX", "dF", "dα", "dβ"), ours, plain, strict=True):
        assert (left.grad - right.grad).abs().max() < 1e-10, name


def test_closed_form_backward_passes_finite_differences() -> None:
    x, update = tensors((4, 2))
    inputs = [x, update, torch.full((D,), 0.3).double(), torch.full((D,), 0.8).double()]
    assert torch.autograd.gradcheck(lambda *a: merge_norm(*a, (4, 2), 1e-6), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("segments", SEGMENTS)
def test_merge_moves_the_parts_as_equation_9_says(segments: tuple[int, ...]) -> None:
    x, update = tensors(segments)
    alpha, beta = torch.rand(D).double(), torch.rand(D).double()
    z = merge_reference(x, update, alpha, beta, segments)
    torch.testing.assert_close(centred(z, segments), centred(x, segments) + beta * centred(update, segments))
    torch.testing.assert_close(mean(z, segments), (1 - alpha) * mean(x, segments) + alpha * mean(update, segments))


@pytest.mark.parametrize("segments", SEGMENTS)
def test_alpha_0_beta_1_keeps_the_mean_and_adds_the_centred_part(segments: tuple[int, ...]) -> None:
    x, update = tensors(segments)
    residual = MVSplit(D, alpha_init=0.0, beta_init=1.0).double()
    expected = norm(mean(x, segments) + centred(x, segments) + centred(update, segments))
    torch.testing.assert_close(residual(x, update, segments), expected)


def test_gradient_of_the_update_is_equation_10() -> None:
    segments = (5, 3)
    x, update = tensors(segments)
    update.requires_grad_()
    alpha, beta = torch.rand(D).double(), torch.rand(D).double()
    g = torch.randn_like(x)
    merge_reference(x, update, alpha, beta, segments).backward(g)
    torch.testing.assert_close(update.grad, beta * centred(g, segments) + alpha * mean(g, segments))


def test_alpha_1_of_one_token_replaces_it() -> None:
    x, update = tensors((1,))
    residual = MVSplit(D, alpha_init=1.0, beta_init=1.0).double()
    torch.testing.assert_close(residual(x, update, (1,)), norm(update))  # a single token is its own mean


def test_ablations() -> None:
    segments = (5, 3)
    x, update = tensors(segments)

    def out(**options: object) -> Tensor:
        return MVSplit(D, alpha_init=0.4, beta_init=0.7, **options).double()(x, update, segments)

    both = (8,)
    expected = norm(x + 0.7 * centred(update, both) + 0.4 * (mean(update, both) - mean(x, both)))
    torch.testing.assert_close(out(segment_means=False), expected)
    expected = norm(x + 0.7 * centred(update, segments) + 0.4 * mean(update, segments))
    torch.testing.assert_close(out(mean_update="plain"), expected)
    torch.testing.assert_close(out(mean_update="none"), norm(x + 0.7 * centred(update, segments)))
    torch.testing.assert_close(out(attention_only=True, branch="ffn"), norm(x + update))
    torch.testing.assert_close(out(attention_only=True, branch="attention"), out())


def test_baselines_are_their_formulas() -> None:
    segments = (5, 3)
    x, update = tensors(segments)
    torch.testing.assert_close(PostNorm(D)(x, update, segments), norm(x + update))
    torch.testing.assert_close(PreNorm(D)(x, update, segments), x + update)
    torch.testing.assert_close(PreNorm(D).branch_input(x), norm(x))
    torch.testing.assert_close(PostNorm(D).branch_input(x), x)
    assert torch.equal(ReZero(D).double()(x, update, segments), x)  # its gain starts at 0
    deep = DeepNorm(D, depth=8)
    torch.testing.assert_close(deep(x, update, segments), norm(2 * x + update))  # (2·8)^(1/4) = 2
    scale = LayerScale(D, lambda_init=0.01).double()
    torch.testing.assert_close(scale(x, update, segments), norm(x + scale.scale * update))
    assert scale.scale.tolist() == pytest.approx([0.01] * D)
    split = ChannelSplit(D, mean_fraction=0.3, alpha_init=0.5, beta_init=0.25).double()
    merged = torch.cat([0.5 * mean(update, segments)[..., :3], 0.25 * centred(update, segments)[..., 3:]], dim=-1)
    torch.testing.assert_close(split(x, update, segments), norm(x + merged))


def test_rivals_are_their_formulas() -> None:
    segments = (5, 3)
    x, update = tensors(segments)
    keel = Keel(D, depth=8, number=3)
    torch.testing.assert_close(keel.branch_input(x), norm(x))
    torch.testing.assert_close(keel(x, update, segments), norm(16 * x + update))  # 2·8 merges
    scaling = LayerNormScaling(D, depth=8, number=4)
    torch.testing.assert_close(scaling.branch_input(x), norm(x) / 2)
    torch.testing.assert_close(scaling(x, update, segments), x + update)
    peri = PeriNorm(D, depth=8)
    torch.testing.assert_close(peri.branch_input(x), norm(x))
    torch.testing.assert_close(peri(x, update, segments), x + norm(update))


def test_siamese_norm_is_its_two_streams() -> None:
    segments = (5, 3)
    x, update = tensors(segments)
    residual = SiameseNorm(D, depth=8, number=2)
    assert torch.equal(residual.enter(x), torch.cat([x, x], dim=-1))
    post, pre = x, 3 * x.roll(1, 1)
    trunk = torch.cat([post, pre], dim=-1)
    torch.testing.assert_close(residual.branch_input(trunk), norm(post + norm(pre)))
    torch.testing.assert_close(residual.leave(trunk), post + norm(pre))
    torch.testing.assert_close(
        residual(trunk, update, segments),
        torch.cat([norm(post + update / 2), pre + update], dim=-1),  # √(2·2) = 2
    )


def test_keel_adds_the_part_of_the_update_that_it_is_told_to() -> None:
    segments = (5, 3)
    x, update = tensors(segments)
    means, rest = mean(update, segments), centred(update, segments)
    found = Keel(D, depth=8, split="channels")(x, update, segments)
    torch.testing.assert_close(found, norm(16 * x + torch.cat([means[..., :5], rest[..., 5:]], dim=-1)))
    torch.testing.assert_close(Keel(D, depth=8, split="centred")(x, update, segments), norm(16 * x + rest))


def test_the_number_of_the_block_survives_a_cast() -> None:
    scaling = LayerNormScaling(D, depth=400, number=399).bfloat16()
    x = torch.ones(1, 1, D)
    torch.testing.assert_close(scaling.branch_input(x), torch.full_like(x, 399**-0.5), rtol=1e-5, atol=0)
    assert not list(scaling.state_dict())


@pytest.mark.parametrize("make", ALL)
def test_no_update_changes_nothing_but_the_scale(make: type[Residual]) -> None:
    """With F = 0 every residual keeps the direction of each token, so that a zero branch is harmless."""
    segments = (5, 3)
    x, update = tensors(segments)
    out = make(D, depth=4).double()(x, torch.zeros_like(update), segments)
    torch.testing.assert_close(F.normalize(out, dim=-1), F.normalize(x, dim=-1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (PostNorm, 0.0),
        (MVSplit, 0.0),
        (ChannelSplit, 0.0),
        (PreNorm, 48**-0.5),
        (Keel, 48**-0.5),
        (LayerNormScaling, 48**-0.5),
        (PeriNorm, 48**-0.5),
        (SiameseNorm, 48**-0.5),
        (ReZero, 48**-0.5),
        (LayerScale, 0.02),
        (DeepNorm, 48**-0.5 * (8 * 32) ** -0.25),
    ],
)
def test_default_writer_initialisation(make: type[Residual], expected: float) -> None:
    assert make(D, depth=32).writer_std(16) == pytest.approx(expected)
    assert make(D, depth=32, writer_init="standard").writer_std(16) == pytest.approx(48**-0.5)


def test_auto_gain_is_one_over_root_depth() -> None:
    assert MVSplit(D, depth=100).beta.tolist() == pytest.approx([0.1] * D)
    assert MVSplit(D, depth=100).alpha.tolist() == [0.0] * D
    assert LayerScale(D, depth=100, lambda_init="auto").scale.tolist() == pytest.approx([0.1] * D)


def test_channel_split_refuses_an_empty_group() -> None:
    with pytest.raises(ValueError, match=r"residual\.mean_fraction = 0\.01"):
        ChannelSplit(D, mean_fraction=0.01)


@pytest.mark.parametrize("make", ALL)
def test_usable_in_any_transformer(make: type[Residual]) -> None:
    """A fork's own block: call with an update, get the next trunk, train every gain."""
    x, update = (t.float() for t in tensors((5, 3)))
    update.requires_grad_()
    residual = functools.partial(make, depth=3)(width=D)
    out = residual(x, update, (5, 3))
    assert out.shape == x.shape
    trained = [update, *residual.parameters()]
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), trained)
    assert all(g.isfinite().all() for g in gradients)


def test_mixed_precision_promotes_like_the_plain_form() -> None:
    """Under autocast the trunk is float32 and the update bfloat16."""
    x, update = (t.float() for t in tensors((5, 3)))
    residual = MVSplit(D, alpha_init=0.4, beta_init=0.7)
    mixed = update.bfloat16().requires_grad_()
    out = residual(x, mixed, (5, 3))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, residual(x, mixed.float(), (5, 3)))
    out.square().sum().backward()
    assert mixed.grad is not None
    assert mixed.grad.dtype == torch.bfloat16
