"""Any number of context tokens and any image size: in training, recomputed, compiled and measured."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.kernels import choice
from mvsplit.kernels.choice import Fused
from mvsplit.models.attention import rope_table
from mvsplit.models.conditioning import ClassTokens, SampleEmbeddings
from mvsplit.models.dit import DiT
from mvsplit.models.layers import rms_norm
from mvsplit.models.recompute import Checkpointing
from mvsplit.models.residuals import ChannelSplit, LayerScale, MVSplit
from mvsplit.stability import measures
from mvsplit.stability.taps import Taps
from mvsplit.utils.errors import UserError

LENGTHS = [5, 3, 0, 17, 1, 24, 2, 9, 24, 16, 11, 7, 13, 20, 6]
"""Of the context: 24 is the longest. 16 is also the number of image tokens."""


def network(residual: Any = MVSplit, size: int = 4, captions: bool = True, **options: Any) -> DiT:
    torch.manual_seed(0)
    context: Any = functools.partial(SampleEmbeddings, num_tokens=24, embedding_width=6)
    context = context if captions else functools.partial(ClassTokens, num_classes=3)
    factory = functools.partial(residual, writer_init="standard")
    made = DiT([size, size], 2, 1, 5, 16, 2, context, factory, **options)
    nn.init.normal_(made.final_proj.weight, std=0.2)
    for name, gain in made.named_parameters():
        if name.endswith("alpha"):
            nn.init.constant_(gain, 0.3)
    return made.double()


def batch(length: int, size: int = 4, samples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    z, condition = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((samples, 2, size, size), (samples, length, 6))
    )
    return z, torch.rand(samples, generator=generator), condition


def gradients(made: DiT, *inputs: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    made(*inputs).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


# ------------------------------------------------------------------------------ image sizes


@pytest.mark.parametrize("captions", [True, False])
def test_a_network_gives_at_another_size_what_one_of_that_size_gives(captions: bool) -> None:
    here, there = network(size=4, captions=captions), network(size=7, captions=captions)
    there.load_state_dict(here.state_dict(), strict=True)
    z, t, condition = batch(5, size=7)
    condition = condition if captions else torch.tensor([0, 2, 1])
    assert torch.equal(here(z, t, condition), there(z, t, condition))
    wide = torch.randn(3, 2, 2, 11, dtype=torch.float64)
    assert here(wide, t, condition).shape == wide.shape
    assert not torch.allclose(here(wide, t, condition), here(wide.roll(1, 3), t, condition).roll(-1, 3))  # placed


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"images of shape (3, 8, 8); must be (2, height, width) with both sides divisible by"),
        ((2, 8, 7), r"images of shape (2, 8, 7); must be (2, height, width) with both sides divisible by"),
        ((2, 0, 8), r"images of shape (2, 0, 8); must be (2, height, width) with both sides divisible by"),
        ((2, 2, 1026), "images of 1 × 513 patches; at most 512 × 512 are allowed"),
    ],
)
def test_images_that_do_not_fit_are_one_line(shape: tuple[int, ...], message: str) -> None:
    context = functools.partial(ClassTokens, num_classes=3)
    made = DiT([8, 8], 2, 2, 1, 16, 2, context, MVSplit)
    with pytest.raises(UserError) as caught:
        made(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert str(caught.value).startswith(f"model: {message}")
    assert "\n" not in str(caught.value)
    assert made(torch.zeros(1, 2, 2, 1024), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape[-1] == 1024


# --------------------------------------------------------------------------- context lengths


@pytest.mark.parametrize("residual", [MVSplit, ChannelSplit, LayerScale])
def test_any_number_of_context_tokens_has_gradients(residual: Any) -> None:
    made = network(residual)
    for length in (5, 0, 1, 24, 2):
        z, t, condition = batch(length, samples=2)
        inputs = z.requires_grad_(), condition.requires_grad_()
        assert torch.autograd.gradcheck(lambda z, c, t=t: made(z, t, c), inputs, fast_mode=True)


def test_without_context_the_blocks_run_on_image_tokens_alone() -> None:
    made = network()
    z, t, condition = batch(0)
    x = rms_norm(made.patch_proj(z.flatten(2).transpose(1, 2)), 1e-6)
    tables = rope_table(4, 4, 8)
    for block in made.blocks:
        x = block(x, *tables, (16,))
    expected = made.final_proj(x).transpose(1, 2).reshape(z.shape)
    torch.testing.assert_close(made(z, t, condition), expected, rtol=1e-12, atol=1e-12)


def test_context_tokens_have_a_mean_of_their_own_whatever_their_number() -> None:
    """Eq. 7 written down for one block whose branches are replaced by fixed updates."""
    made = network()
    merge = made.blocks[0].residual1
    for length in (2, 7):
        x, update = torch.randn(2, 3, 16 + length, 16, dtype=torch.float64)
        parts = []
        for span in (slice(0, 16), slice(16, None)):
            fx, xx = update[:, span], x[:, span]
            mean, mean_x = fx.mean(1, keepdim=True), xx.mean(1, keepdim=True)
            parts.append(xx + merge.beta * (fx - mean) + merge.alpha * (mean - mean_x))
        expected = F.rms_norm(torch.cat(parts, 1), (16,), eps=1e-6)
        torch.testing.assert_close(merge(x, update, (16, length)), expected)


@pytest.mark.parametrize("every", [1, 4, "auto"])
def test_recomputed_gradients_are_the_same_for_each_length(every: Any) -> None:
    plain, recomputed = network(), network(checkpointing=Checkpointing(every))
    for length in LENGTHS[:7]:
        expected, found = gradients(plain, *batch(length)), gradients(recomputed, *batch(length))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), length
    assert gradients(plain, *batch(0))["context.proj.weight"].abs().sum() == 0
    assert gradients(plain, *batch(3))["context.proj.weight"].abs().sum() > 0


def test_fused_or_plain_is_chosen_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[choice.Sizes] = []

    def ratios(sizes: choice.Sizes, *args: Any) -> dict[str, float]:
        timed.append(sizes)
        return dict.fromkeys(("merge_norm", "rope_norm", "swiglu"), 2.0)

    monkeypatch.setattr(choice, "_can_time", lambda x, sizes: True)  # there is no GPU
    monkeypatch.setattr(choice, "time_ratios", ratios)
    made = network(kernels="auto")
    for length in LENGTHS:
        made(*batch(length))
    assert [sizes.segments for sizes in timed] == [(16, LENGTHS[0])]
    assert made.blocks[0].fused == Fused()
    made(*batch(3, size=7))
    assert [sizes.segments for sizes in timed][1:] == [(49, 3)]  # another image size is another choice


# ------------------------------------------------------------------------------- the monitor


@pytest.mark.parametrize("every", [0, 1])
def test_taps_measure_a_context_that_is_shorter_than_the_longest(every: int) -> None:
    made = network(checkpointing=Checkpointing(every))
    trunk: dict[str, Tensor] = {}
    handles = [
        made.blocks[3].register_forward_hook(lambda _, inputs, out: trunk.__setitem__("block", out.detach())),
        made.blocks[3].attention.qkv.register_forward_hook(lambda _, x, out: trunk.__setitem__("qkv", out.detach())),
    ]
    taps = Taps(made, attention_samples=3)
    for length in (7, 2, 24):
        made(*batch(length))
        x, qkv = trunk["block"], trunk["qkv"]
        taps.attach(cheap=[], full=[3])
        gradients(made, *batch(length))
        taps.detach()
        row = taps.read()[3]
        assert row["rho_image"] == pytest.approx(float(measures.rho(x[:, :16])), rel=1e-9)
        assert row["rho_context"] == pytest.approx(float(measures.rho(x[:, 16:])), rel=1e-9)
        cos, sin = rope_table(4, 4, 8, num_context=length)
        q, k = (  # turned and normalised as in the reference code, written out
            F.rms_norm(
                torch.cat([a * cos[:, :4] + b * sin[:, :4], b * cos[:, :4] - a * sin[:, :4]], -1), (8,), eps=1e-6
            )
            for a, b in (part.unflatten(2, (2, 8)).transpose(1, 2).chunk(2, -1) for part in qkv.chunk(3, -1)[:2])
        )
        attention = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
        assert row["mu_eff"] == pytest.approx(float(measures.mu_eff(attention)), rel=1e-6)  # the table is float32
        assert row["row_diversity"] == pytest.approx(float(measures.row_diversity(attention)), rel=1e-6)
    for handle in handles:
        handle.remove()


def test_a_context_too_short_for_a_ratio_leaves_the_other_measures_alone() -> None:
    made = network()
    taps = Taps(made)
    for length, found in ((1, float("inf")), (0, float("nan"))):
        taps.attach(cheap=[], full=[3])
        gradients(made, *batch(length))
        taps.detach()
        row = taps.read()[3]
        assert row.pop("rho_context") == pytest.approx(found, nan_ok=True)  # PX = 0; no token at all
        assert all(math.isfinite(value) for value in row.values())


def test_taps_of_micro_batches_of_different_lengths_are_averaged() -> None:
    made = network()
    taps, rows = Taps(made), []
    for length in (4, 9):
        taps.attach(cheap=[], full=[2])
        gradients(made, *batch(length))
        rows.append(taps.read()[2])
    taps.attach(cheap=[], full=[2])
    for length in (4, 9):
        gradients(made, *batch(length))
    taps.detach()
    for name, value in taps.read()[2].items():
        if not name.startswith("g_"):
            assert value == pytest.approx((rows[0][name] + rows[1][name]) / 2, rel=1e-12), name


# --------------------------------------------------------------------------- compiled blocks


@pytest.fixture
def graphs() -> Iterator[Any]:
    """How many graphs were compiled in this test. Sizes that earlier tests compiled are forgotten."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1])
def test_training_on_any_length_compiles_twice(every: int, graphs: Any) -> None:
    plain, compiled = network(), network(compile=True, checkpointing=Checkpointing(every))
    counts = []
    for length in LENGTHS:
        expected, found = gradients(plain, *batch(length)), gradients(compiled, *batch(length))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
        counts.append(graphs())
    assert counts == [1] + [2] * (len(LENGTHS) - 1)  # at the second length once more, for all that follow


@pytest.mark.slow
def test_drawing_with_any_length_and_batch_size_compiles_a_few_times(graphs: Any) -> None:
    plain, compiled = network(), network(compile=True)
    for samples in (3, 2, 8):
        for length in LENGTHS:
            with (
                torch.no_grad() if length % 2 else torch.inference_mode()
            ):  # as samples are drawn, and as Lightning does
                inputs = batch(length, samples=samples)
                torch.testing.assert_close(compiled(*inputs), plain(*inputs), rtol=1e-9, atol=1e-10)
    assert graphs() <= 3
    for size in (5, 6, 7):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*batch(9, size)), plain(*batch(9, size)), rtol=1e-9, atol=1e-10)
    assert graphs() <= 4


@pytest.mark.slow
def test_classes_keep_constant_shapes(graphs: Any) -> None:
    compiled, inputs = network(captions=False, compile=True), (*batch(4)[:2], torch.tensor([0, 2, 1]))
    for _ in range(3):
        gradients(compiled, *inputs)
    assert graphs() == 1
