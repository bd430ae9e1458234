"""Measures that distinguish a healthy network from one dominated by the token mean (paper, appendix A).

Shapes: B batch, T tokens, D width, K inputs of a writer, H heads, S segments. J takes the mean over tokens, P = I − J.

All are pure functions in float32 or better. Measures of a batch are averaged over its samples, a few at a time:
their memory does not grow with the batch, and grows with the tokens no faster than one sample does.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mvsplit.kernels.merge_norm import upcast

SQUARINGS = 12
"""How often `spectral_norm` squares MᵀM: one product of T × T matrices each, in all like 2¹² power iterations."""

AT_ONCE = 1 << 24
"""Size of a temporary tensor, in entries: 64 MiB in float32, but at least one sample. A measure has a few of them."""
MOST_TOKENS = 4096
"""Tokens up to which attention matrices are computed whole, head by head: one fills `AT_ONCE`. Beyond it there is no
μ_eff: at 16,384 tokens `spectral_norm` would take 10¹⁴ operations for a head."""


def _exact(x: Tensor) -> Tensor:
    """Float32 at least: half precision has too few digits for differences of tokens."""
    return upcast(x.detach())


def _pieces(*tensors: Tensor, largest: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """As many samples at a time as `AT_ONCE` allows. largest: size of the largest temporary tensor for a sample."""
    count = max(1, AT_ONCE // max(1, largest, *(tensor[0].numel() for tensor in tensors)))
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _mean(measure: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Mean over samples of a measure that returns (B,)."""
    return torch.cat([measure(*map(_exact, piece)) for piece in _pieces(*tensors)]).mean()


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over all tokens, and the rest: JX's row (B, 1, D), PX (B, T, D)."""
    mean = x.mean(1, keepdim=True)
    return mean, x - mean


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each sample: (B, …) → (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def rho(x: Tensor) -> Tensor:
    """ρ = ‖JX‖_F / ‖PX‖_F, energy of the mean over that of the rest. x: (B, T, D). Returns a scalar.

    It is inf if PX = 0, and NaN for no tokens. Of one segment: `rho(x[:, :I])`. Healthy is about 1; in the paper's
    collapse it rises from 0.65 to 2000.
    """

    def ratio(x: Tensor) -> Tensor:
        mean, rest = split(x)
        return x.shape[1] ** 0.5 * _norm(mean) / _norm(rest)

    return _mean(ratio, x)


def token_cosine(x: Tensor) -> Tensor:
    """Mean over i ≠ j of cos(x_i, x_j); 1 if all tokens point the same way. x: (B, T, D). Returns a scalar."""

    def cosine(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=-1)
        T = x.shape[1]
        # Σ_ij cos = ‖Σ_i unit_i‖², without the terms i = j (0 for a zero vector).
        own = unit.square().sum((1, 2))
        return (unit.sum(1).square().sum(-1) - own) / (T * (T - 1))

    return _mean(cosine, x)


def attention_matrix(q: Tensor, k: Tensor) -> Tensor:
    """A = softmax(q kᵀ / √E). q, k: (B, H, T, E). Returns (B, H, T, T)."""
    return torch.softmax(_exact(q) @ _exact(k).transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """`mu_eff`, `retention` and `row_diversity` of softmax(q kᵀ / √E), a few heads at a time. q, k, v: (B, H, T, E).

    Beyond `MOST_TOKENS` a matrix is computed a few rows at a time, and there is no μ_eff.
    """
    heads = [x.detach().flatten(0, 1) for x in (q, k, v)]  # (B·H, T, E)
    T = q.shape[2]
    sums: dict[str, Tensor] = {}
    for piece in _pieces(*heads, largest=T**2 if T <= MOST_TOKENS else AT_ONCE):
        q, k, v = (x[None] for x in piece)
        if T > MOST_TOKENS:
            found = _long_attention(*piece)
        else:
            a = attention_matrix(q, k)
            found = {"mu_eff": mu_eff(a), "retention": retention(a, v), "row_diversity": row_diversity(a)}
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(piece[0])
    return {name: value / len(heads[0]) for name, value in sums.items()}


def _long_attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The measures of one head. q, k, v: (1, T, E) each."""
    T = q.shape[1]
    v = _exact(v)

    def matrices() -> Iterator[Tensor]:
        return (attention_matrix(rows, k) for rows in q.split(max(1, AT_ONCE // T), dim=1))  # (1, rows, T)

    mean = sum(a.sum(1, keepdim=True) for a in matrices()) / T  # of the rows; two passes, or digits are lost
    squares = [(torch.linalg.vector_norm(a - mean), torch.linalg.vector_norm(a)) for a in matrices()]
    centred, whole = (torch.linalg.vector_norm(torch.stack(norms)) for norms in zip(*squares, strict=True))
    out = torch.cat([a @ v for a in matrices()], dim=1)
    kept = torch.linalg.vector_norm(_centred_rows(out)) / torch.linalg.vector_norm(_centred_rows(v))
    return {"retention": kept, "row_diversity": centred / whole}


def _centred_rows(a: Tensor) -> Tensor:
    """PA: subtracts each column's mean over rows."""
    return a - a.mean(-2, keepdim=True)


def mu_eff(a: Tensor) -> Tensor:
    """μ_eff = ‖PAP‖₂, the largest gain of attention on differences between tokens.

    a: (B, H, T, T). Returns the mean over samples and heads. (The paper's released code takes ‖AP‖₂ instead.)
    """
    return spectral_norm(_centred_rows(_centred_rows(_exact(a)).transpose(-1, -2))).mean()  # (PAP)ᵀ has the same norm


def spectral_norm(m: Tensor) -> Tensor:
    """‖M‖₂ by matrix products alone: (…, T, T) → (…). 0 for M = 0; NaN where M holds one.

    An SVD on a GPU takes one matrix after the other, and raises for a NaN. Here G = MᵀM is squared repeatedly, with its
    trace normalised to 1 each time: after k squarings only the directions of the largest singular values remain in
    G^(2^k), and their Rayleigh quotient is the largest eigenvalue. The result is never above ‖M‖₂, and at T = 260 at
    most 2.1e-4 of it below: if the other 259 singular values are just below the first.
    """
    scale = m.abs().amax((-2, -1), keepdim=True)
    m = _ratio(m, scale)  # or squares of small entries would underflow
    gram = power = m.transpose(-1, -2) @ m
    for _ in range(SQUARINGS):
        power = _trace_one(power)
        power = power @ power
    power = _trace_one(power)
    largest = _ratio((power * (gram @ power)).sum((-2, -1)), power.square().sum((-2, -1)))
    return scale[..., 0, 0] * largest.sqrt()


def _trace_one(gram: Tensor) -> Tensor:
    return _ratio(gram, gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])


def _ratio(x: Tensor, by: Tensor) -> Tensor:
    """The quotient; 0 where both are 0; NaN is kept."""
    return x / by.masked_fill(by == 0, 1.0)


def row_diversity(a: Tensor) -> Tensor:
    """‖PA‖_F / ‖A‖_F: 0 if all tokens attend alike. a: (B, H, T, T). Returns the mean over samples and heads."""
    a = _exact(a)
    return (torch.linalg.matrix_norm(_centred_rows(a)) / torch.linalg.matrix_norm(a)).mean()


def retention(a: Tensor, v: Tensor) -> Tensor:
    """‖P A V‖_F / ‖P V‖_F: the share of the differences between tokens that attention retains.

    a: (B, H, T, T). v: (B, H, T, E). Returns the mean over samples and heads.
    """
    a, v = _exact(a), _exact(v)
    return (torch.linalg.matrix_norm(_centred_rows(a @ v)) / torch.linalg.matrix_norm(_centred_rows(v))).mean()


def var_gain(update: Tensor, x: Tensor) -> Tensor:
    """VarGain = ‖PU‖_F / ‖PX‖_F of a branch's update U relative to the trunk X. (B, T, D) both. Returns a scalar."""
    return _mean(lambda update, x: _norm(split(update)[1]) / _norm(split(x)[1]), update, x)


def tr_ratio(update: Tensor, x: Tensor) -> Tensor:
    """TR ratio = ‖U‖_F / ‖X‖_F. (B, T, D) both. Returns a scalar."""
    return _mean(lambda update, x: _norm(update) / _norm(x), update, x)


def writer_split(y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a writer W (output W y_t, whose gradient is δ_t) as the sum of two parts (eq. 5).

    Per sample Σ_t δ_t y_tᵀ = T·δ̄ȳᵀ + Σ_t δ̃_t ỹ_tᵀ, summed over the batch: mean-coherent and centred part.

    Args:
        y: inputs of the writer, (B, T, K).
        delta: gradients of its outputs, (B, T, D).

    Returns:
        Two matrices (D, K); their Frobenius norms are G_mean and G_ctr.
    """

    def parts(y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        (y_mean, y_rest), (d_mean, d_rest) = split(_exact(y)), split(_exact(delta))
        return y.shape[1] * d_mean[:, 0].T @ y_mean[:, 0], d_rest.flatten(0, 1).T @ y_rest.flatten(0, 1)

    first, *others = _pieces(y, delta)
    mean, centred = parts(*first)
    for piece in others:
        more = parts(*piece)
        mean, centred = mean + more[0], centred + more[1]
    return mean, centred


def amplification(y: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """How much token gradients of a writer add up instead of cancelling (eq. 6), the mean over samples.

    Arguments as for `writer_split`. A sample without any gradient counts as A = 1, κ̂ = 0.

    Returns:
        amplification: A = ‖Σ_t δ_t y_tᵀ‖² / Σ_t ‖δ_t‖²‖y_t‖². At most T (Cauchy–Schwarz); 1 if tokens are unrelated.
        alignment: (T − 1)·κ̂, with κ̂ the mean over i ≠ j of cos(δ_i, δ_j)·cos(y_i, y_j). With equal magnitudes
            A − 1 equals it.
    """
    T = y.shape[1]
    matrix = y.shape[2] * delta.shape[2]  # numbers in Σ_t δ_t y_tᵀ, D × K

    def pairs(y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_ij and Σ_i of ⟨δ_i, δ_j⟩⟨y_i, y_j⟩, (B,) each."""
        if matrix < T**2:
            own = torch.linalg.vecdot(y, y) * torch.linalg.vecdot(delta, delta)  # (B, T)
            return (delta.transpose(1, 2) @ y).square().sum((1, 2)), own.sum(1)
        gram = (y @ y.transpose(1, 2)) * (delta @ delta.transpose(1, 2))  # (B, T, T)
        return gram.sum((1, 2)), gram.diagonal(dim1=1, dim2=2).sum(1)

    def both(y: Tensor, delta: Tensor) -> Tensor:
        y, delta = _exact(y), _exact(delta)
        delta = delta / delta.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)  # or fourth powers underflow
        total, own = pairs(y, delta)
        y, delta = F.normalize(y, dim=-1), F.normalize(delta, dim=-1)
        aligned, count = pairs(y, delta)
        return torch.stack([torch.where(own > 0, total / own, 1.0), (aligned - count) / T])  # (2, B)

    found = torch.cat([both(*piece) for piece in _pieces(y, delta, largest=min(T**2, matrix))], dim=1)
    return {"amplification": found[0].mean(), "alignment": found[1].mean()}


def time_probe(tokens: Tensor, t: Tensor, ridge: float = 1e-3) -> float:
    """R² of a linear probe from the mean of the image tokens to t.

    The paper finds 0.998 at the output, though t is not an input of the network. Even samples fit the probe, odd ones
    test it.

    Args:
        tokens: means, (N, D).
        t: times, (N,).
        ridge: penalty on the weights of the standardised means.

    Returns:
        R², at most 1; negative if the probe is worse than the mean of t.
    """
    x = tokens.detach().double()
    x = (x - x[::2].mean(0)) / x[::2].std(0).clamp(min=1e-12)
    t = t.detach().double()
    centre = t[::2].mean()
    gram = x[::2].T @ x[::2] / len(x[::2]) + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x[::2].T @ (t[::2] - centre) / len(x[::2]))
    error = (t[1::2] - centre - x[1::2] @ weights).square().sum()
    return float(1 - error / (t[1::2] - t[1::2].mean()).square().sum())
