"""Measures of the mean mode against their definitions, token by token in float64, and in a network's backward pass."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_tools import Copies
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mvsplit.benchmarks.model_stats import LiveBytes
from mvsplit.callbacks.stability_probe import spread_evenly, watched_blocks
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.recompute import Checkpointing
from mvsplit.models.residuals import MVSplit, PostNorm, PreNorm
from mvsplit.stability import measures
from mvsplit.stability.tables import TableWriter
from mvsplit.stability.taps import Taps
from mvsplit.training import gradients

B, T, D, K = 3, 5, 4, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rho_and_token_cosine_by_their_definitions() -> None:
    x = draw(B, T, D)
    J = torch.full((T, T), 1 / T, dtype=torch.float64)
    P = torch.eye(T, dtype=torch.float64) - J
    ratios = [(J @ sample).norm() / (P @ sample).norm() for sample in x]
    assert measures.rho(x).item() == pytest.approx(sum(ratios).item() / B, rel=1e-12)
    cosines = [
        torch.cosine_similarity(sample[i], sample[j], dim=0).item()
        for sample in x for i in range(T) for j in range(T) if i != j
    ]  # fmt: skip
    assert measures.token_cosine(x).item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
    same = x[:, :1].expand(-1, T, -1)
    assert measures.token_cosine(same).item() == pytest.approx(1)
    assert measures.rho(same) > 1e6


def test_attention_measures_by_their_definitions() -> None:
    q, k, v = (draw(2, 2, T, 3, seed=i) for i in range(3))
    a = measures.attention_matrix(q, k)
    assert torch.allclose(a.sum(-1), torch.ones(2, 2, T, dtype=torch.float64))
    P = torch.eye(T, dtype=torch.float64) - 1 / T
    heads = [(a[b, h], v[b, h]) for b in range(2) for h in range(2)]
    spectral = [torch.linalg.svdvals(P @ m @ P)[0] for m, _ in heads]
    assert measures.mu_eff(a).item() == pytest.approx(sum(spectral).item() / 4, rel=1e-10)
    one_sided = [torch.linalg.svdvals(m @ P)[0] for m, _ in heads]
    assert abs(measures.mu_eff(a).item() - sum(one_sided).item() / 4) > 1e-3  # what the released code takes
    rows = [(P @ m).norm() / m.norm() for m, _ in heads]
    assert measures.row_diversity(a).item() == pytest.approx(sum(rows).item() / 4, rel=1e-10)
    kept = [(P @ m @ values).norm() / (P @ values).norm() for m, values in heads]
    assert measures.retention(a, v).item() == pytest.approx(sum(kept).item() / 4, rel=1e-10)
    uniform = torch.full((1, 1, T, T), 1 / T, dtype=torch.float64)
    assert measures.mu_eff(uniform).item() == pytest.approx(0, abs=1e-12)


def attention_like(kind: str, tokens: int = 64, heads: int = 3) -> Tensor:
    """Matrices (1, heads, tokens, tokens) as attention makes them, float64."""
    noise = draw(1, heads, tokens, tokens)
    eye = torch.eye(tokens, dtype=torch.float64)
    if kind == "random":
        return noise.softmax(-1)
    if kind == "sharp":
        return (8 * noise).softmax(-1)
    if kind == "near uniform":
        return (1e-3 * noise).softmax(-1)
    if kind == "identity":
        return eye.expand(1, heads, -1, -1)
    if kind == "near identity":
        return 0.9 * eye + 0.1 * noise.softmax(-1)
    if kind == "blocks":
        return torch.block_diag(*[torch.full((8, 8), 1 / 8, dtype=torch.float64)] * (tokens // 8))[None, None]
    if kind == "local":
        place = torch.arange(tokens, dtype=torch.float64)
        return (-(place[:, None] - place).abs() / 3).softmax(-1)[None, None]
    # One singular value, the others where the quotient errs most.
    basis = torch.linalg.qr(noise).Q
    values = torch.full((tokens,), 1 - 3e-4, dtype=torch.float64)
    values[0] = 1
    return basis * values @ basis.transpose(-1, -2)


@pytest.mark.parametrize(
    "kind", ["random", "sharp", "near uniform", "identity", "near identity", "blocks", "local", "cluster"]
)
def test_the_spectral_norm_is_the_svds(kind: str) -> None:
    a = attention_like(kind)
    exact = torch.linalg.svdvals(a)[..., 0]
    for scale in (1.0, 1e-25, 1e25):  # in float32 their squares underflow, or overflow
        found = measures.spectral_norm((scale * a).float())
        torch.testing.assert_close(found.double() / scale, exact, rtol=3e-4, atol=0)
    centred = a - a.mean(-1, keepdim=True)
    exact = torch.linalg.svdvals(centred - centred.mean(-2, keepdim=True))[..., 0].mean()
    torch.testing.assert_close(measures.mu_eff(a.float()).double(), exact, rtol=3e-4, atol=0)


def test_the_spectral_norm_of_nothing_is_zero_and_of_nan_is_nan() -> None:
    m = draw(3, T, T)
    m[1] = 0
    m[2, 0, 1] = math.nan
    found = measures.spectral_norm(m)
    assert found[0] > 0
    assert found[1] == 0
    assert found[2].isnan()
    assert measures.mu_eff(torch.full((1, 1, T, T), math.nan)).isnan()


@pytest.mark.apart
def test_attention_is_measured_without_waiting_for_the_device() -> None:
    with FakeTensorMode():
        q, k, v = (torch.zeros(2, 3, T, 4, device="cuda") for _ in range(3))
        with Copies() as copies:
            a = measures.attention_matrix(q, k)
            found = measures.mu_eff(a), measures.retention(a, v), measures.row_diversity(a)
        assert [value.device.type for value in found] == ["cuda"] * 3
        assert copies.found == []


def test_branch_measures_by_their_definitions() -> None:
    x, update = draw(B, T, D), draw(B, T, D, seed=1)
    P = torch.eye(T, dtype=torch.float64) - 1 / T
    gains = [(P @ u).norm() / (P @ s).norm() for u, s in zip(update, x, strict=True)]
    assert measures.var_gain(update, x).item() == pytest.approx(sum(gains).item() / B, rel=1e-12)
    assert measures.tr_ratio(2 * x, x).item() == pytest.approx(2)


def test_writer_split_adds_up_to_the_gradient() -> None:
    y, delta = draw(B, T, K), draw(B, T, D, seed=1)
    mean, centred = measures.writer_split(y, delta)
    total = sum(torch.outer(delta[b, t], y[b, t]) for b in range(B) for t in range(T))
    torch.testing.assert_close(mean + centred, total, rtol=1e-12, atol=1e-12)
    expected = sum(T * torch.outer(delta[b].mean(0), y[b].mean(0)) for b in range(B))
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


def test_amplification_law() -> None:
    y, delta = draw(B, T, K), draw(B, T, D, seed=1)
    found = measures.amplification(y, delta)
    factors = []
    for b in range(B):
        gradient = sum(torch.outer(delta[b, t], y[b, t]) for t in range(T))
        own = sum(delta[b, t].square().sum() * y[b, t].square().sum() for t in range(T))
        factors.append((gradient.square().sum() / own).item())
    assert found["amplification"].item() == pytest.approx(sum(factors) / B, rel=1e-10)
    # With equal magnitudes A − 1 = (T − 1)·κ̂ exactly.
    unit_y, unit_delta = (torch.nn.functional.normalize(v, dim=-1) for v in (y, delta))
    equal = measures.amplification(3 * unit_y, 1e-12 * unit_delta)
    assert equal["amplification"].item() - 1 == pytest.approx(equal["alignment"].item(), rel=1e-9)
    aligned = measures.amplification(y[:, :1].expand(-1, T, -1), delta[:, :1].expand(-1, T, -1))
    assert aligned["amplification"].item() == pytest.approx(T)  # the bound
    assert aligned["alignment"].item() == pytest.approx(T - 1)
    nothing = measures.amplification(y, torch.zeros_like(delta))
    assert (nothing["amplification"].item(), nothing["alignment"].item()) == (1, 0)


def test_time_probe_reads_what_is_linear_and_not_what_is_not_there() -> None:
    tokens, t = draw(400, 8), torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert measures.time_probe(tokens, t) < 0.1
    tokens[:, 3] = 5 * t - 2 + 0.01 * tokens[:, 3]
    assert measures.time_probe(tokens, t) > 0.99


def network(residual: Any, every: int = 0) -> DiT:
    torch.manual_seed(0)
    context = functools.partial(ClassTokens, num_classes=3)
    factory = functools.partial(residual, writer_init="standard")
    net = DiT([4, 4], 1, 2, 6, 16, 2, context, factory, checkpointing=Checkpointing(every))
    torch.nn.init.normal_(net.final_proj.weight)
    return net.double()


def backward(net: DiT) -> None:
    z, t, labels = draw(3, 1, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])
    net(z, t, labels).square().mean().backward()


def explicit(net: DiT, block: int, writer: Callable[[Any], torch.nn.Module]) -> tuple[Tensor, Tensor]:
    """What plain hooks see of a writer: y and δ."""
    seen: dict[str, Tensor] = {}
    module = writer(net.blocks[block])
    handles = [
        module.register_forward_hook(lambda m, inputs, out: seen.__setitem__("y", inputs[0].detach())),
        module.register_full_backward_hook(lambda m, gi, go: seen.__setitem__("delta", go[0].detach())),
    ]
    backward(net)
    for handle in handles:
        handle.remove()
    net.zero_grad()
    return seen["y"], seen["delta"]


@pytest.mark.parametrize("residual", [MVSplit, PostNorm, PreNorm])
@pytest.mark.parametrize("every", [0, 1, 4])
def test_taps_see_what_explicit_sums_see_also_when_recomputed(residual: Any, every: int) -> None:
    net = network(residual)
    expected = {}
    for branch, writer in (("attention", lambda b: b.attention.proj), ("ffn", lambda b: b.ffn.w2)):
        y, delta = explicit(net, 4, writer)
        total = sum(torch.outer(delta[b, t], y[b, t]) for b in range(y.shape[0]) for t in range(y.shape[1]))
        mean = sum(y.shape[1] * torch.outer(d.mean(0), s.mean(0)) for d, s in zip(delta, y, strict=True))
        expected[branch] = mean.norm().item(), (total - mean).norm().item(), total
    backward(net)
    plain = {name: p.grad.clone() for name, p in net.named_parameters()}

    watched = network(residual, every)
    taps = Taps(watched, attention_samples=3)
    taps.attach(cheap=[2], full=[4])
    backward(watched)
    taps.detach()
    for name, parameter in watched.named_parameters():
        assert torch.equal(parameter.grad, plain[name]), name  # looking on changes nothing
    for branch, (mean, centred, total) in expected.items():
        parts = taps.writers[4, f"g_mean_{branch}"] + taps.writers[4, f"g_ctr_{branch}"]
        torch.testing.assert_close(parts, total, rtol=1e-10, atol=1e-14)
        writer = {"attention": watched.blocks[4].attention.proj, "ffn": watched.blocks[4].ffn.w2}[branch]
        torch.testing.assert_close(parts, writer.weight.grad, rtol=1e-10, atol=1e-14)
        table = taps.read()
        assert table[4][f"g_mean_{branch}"] == pytest.approx(mean, rel=1e-10)
        assert table[4][f"g_ctr_{branch}"] == pytest.approx(centred, rel=1e-10)
    assert set(table) == {2, 4}
    assert set(table[2]) == {
        "rho",
        "token_cosine",
        *(f"g_{p}_{b}" for p in ("mean", "ctr") for b in ("attention", "ffn")),
    }
    assert len(table[4]) == 19
    assert all(math.isfinite(value) for value in table[4].values())
    # Nothing is left behind, and nothing more is measured.
    backward(watched)
    assert taps.read() == table


def test_micro_batches_are_averaged_and_their_gradients_added_up() -> None:
    net = network(MVSplit)
    taps = Taps(net)
    taps.attach(cheap=[5])
    backward(net)
    once = taps.read()[5]
    once |= {name: 2 * value for name, value in once.items() if name.startswith("g_")}
    taps.attach(cheap=[5])
    backward(net)
    backward(net)
    twice = taps.read()[5]
    assert twice == pytest.approx(once, rel=1e-12)


def test_blocks_are_chosen_over_the_depth() -> None:
    assert spread_evenly(200, 5) == [0, 50, 100, 149, 199]
    assert spread_evenly(3, 25) == [0, 1, 2]
    assert watched_blocks(200, 3) == [124, 149, 174]
    assert watched_blocks(1, 3) == [0]


def test_a_table_drops_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "trace.csv"
    table = TableWriter(path, ("step", "loss"), 0)
    table.append([{"step": step, "loss": step / 3} for step in range(4)])
    table.close()
    table = TableWriter(path, ("step", "loss"), 2)
    table.append([{"step": 2, "loss": math.nan, "other": 1.0}, {"step": 10**7, "loss": math.inf}])
    table.close()
    assert path.read_text().split() == ["step,loss", "0,0", "1,0.3333333", "2,", "10000000,inf"]


def test_a_frozen_matrix_of_queries_has_no_gradient_to_measure() -> None:
    net = network(MVSplit)
    net.blocks[1].attention.qkv.weight.requires_grad_(False)
    backward(net)
    weights = [block.attention.qkv.weight for block in net.blocks]
    rows = {number: (weight, 0, 16) for number, weight in enumerate(weights)}
    expected = {number: weights[number].grad[:16].norm().item() for number in (0, 2, 3, 4, 5)}
    assert gradients.row_norms(net, rows) == pytest.approx(expected, rel=1e-12)
    assert gradients.row_norms(net, {1: rows[1]}) == {}


class Twice(torch.nn.Module):
    """A block that is used twice, one that returns feature maps, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Unflatten(1, (1, 5)), torch.nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.blocks[0](x)))


def test_a_block_is_measured_by_its_calls_if_it_gives_tokens() -> None:
    net, x = Twice().double(), draw(B, T, D)
    taps = Taps(net)
    taps.attach([], range(3))
    net(x).square().sum().backward()
    once = net.blocks[0](x)
    expected = [(f(once) + f(net.blocks[0](once))).item() / 2 for f in (measures.rho, measures.token_cosine)]
    table = taps.read()
    assert set(table) == {0}
    assert [table[0]["rho"], table[0]["token_cosine"]] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("blocks", [None, 3, "layers", [1, 2]])
def test_what_is_not_a_sequence_of_modules_is_not_watched(blocks: Any) -> None:
    net = torch.nn.Linear(2, 2)
    net.blocks = blocks
    taps = Taps(net)
    taps.attach(watched_blocks(len(taps.blocks), 3), spread_evenly(len(taps.blocks), 25))
    net(torch.zeros(1, 2)).sum().backward()
    assert (taps.blocks, taps.read()) == ([], {})


def test_measures_take_bounded_memory_at_16384_tokens() -> None:
    """At width 1024; in float32 the attention matrices of two samples with two heads each alone are 4 GiB."""
    with FakeTensorMode():
        q, k, v = (torch.zeros(2, 2, 16384, 64, dtype=torch.bfloat16) for _ in range(3))
        x, y = torch.zeros(4, 16384, 1024), torch.zeros(4, 16384, 3072, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            "attention": lambda: measures.attention(q, k, v),
            "attention, 4096 tokens": lambda: measures.attention(q[:, :, :4096], k[:, :, :4096], v[:, :, :4096]),
            "writer_split": lambda: measures.writer_split(y, x),
            "amplification": lambda: measures.amplification(y, x),
            "rho": lambda: measures.rho(x),
            "token_cosine": lambda: measures.token_cosine(x),
            "var_gain": lambda: measures.var_gain(x, x),
            "tr_ratio": lambda: measures.tr_ratio(x, x),
        }
        peaks = {}
        for name, call in calls.items():
            with LiveBytes((q, k, v, x, y)) as live:
                call()
            peaks[name] = live.peak / 2**20
    assert {name: peak for name, peak in peaks.items() if peak > 520} == {}  # MiB


def test_measures_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(3, 2, T, 3, seed=i) for i in range(3))
    x, update, y = draw(B, T, D), draw(B, T, D, seed=1), draw(B, T, K, seed=2)

    def everything() -> dict[str, Any]:
        found = measures.amplification(y, x)
        mean, centred = measures.writer_split(y, x)
        scalars = {f.__name__: f(x, update) for f in (measures.var_gain, measures.tr_ratio)}
        scalars |= {f.__name__: f(x) for f in (measures.rho, measures.token_cosine)}
        return scalars | measures.attention(q, k, v) | found | {"mean": mean, "centred": centred}

    whole = everything()
    assert set(whole) > {"mu_eff", "retention", "row_diversity"}
    for most in (1, 2 * T, 2 * T * T):  # one sample or head at a time, then some of them
        monkeypatch.setattr(measures, "AT_ONCE", most)
        for name, value in everything().items():
            torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(measures, "MOST_TOKENS", T - 1)  # rows of a matrix one after the other
    rows = everything()
    assert "mu_eff" not in rows
    for name, value in rows.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)


def test_alike_rows_of_long_attention_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(1, 1, 64, 4, seed=i).float() for i in range(3))
    exact = measures.attention(1e-4 * q.double(), k.double(), v.double())
    monkeypatch.setattr(measures, "MOST_TOKENS", 1)
    monkeypatch.setattr(measures, "AT_ONCE", 640)
    found = measures.attention(1e-4 * q, k, v)
    for name in ("retention", "row_diversity"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=2e-3, atol=0)


def test_attention_measures_of_half_precision_are_computed_in_float32() -> None:
    a, v = attention_like("random").bfloat16(), draw(1, 3, 64, 4).bfloat16()
    for found, same in (
        (measures.mu_eff(a), measures.mu_eff(a.float())),
        (measures.row_diversity(a), measures.row_diversity(a.float())),
        (measures.retention(a, v), measures.retention(a.float(), v.float())),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, same)
