"""What tells a healthy network from one that the token mean has swallowed (paper, appendix A).

Shapes: B batch, T tokens, D width, K inputs of a writer, H heads, S segments. J takes the mean over tokens, P = I − J.

All of them are pure functions, computed in float32 at least; those of a batch are computed per sample and averaged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mvsplit.kernels.merge_norm import upcast

SQUARINGS = 12
"""Of MᵀM in `spectral_norm`: as many products of T × T matrices, which stand for 2¹² power iterations."""


def _exact(x: Tensor) -> Tensor:
    """Float32 at least: half precision has too few digits for differences of tokens."""
    return upcast(x.detach())


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over all tokens, and what remains: JX's row (B, 1, D), PX (B, T, D)."""
    mean = x.mean(1, keepdim=True)
    return mean, x - mean


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each sample: (B, …) → (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def rho(x: Tensor) -> Tensor:
    """ρ = ‖JX‖_F / ‖PX‖_F, energy of the mean over that of the rest. x: (B, T, D). Returns a scalar, inf if PX = 0.

    Of one segment: `rho(x[:, :I])`. Healthy is about 1; in the paper's collapse it rises from 0.65 to 2000.
    """
    mean, rest = split(_exact(x))
    return (x.shape[1] ** 0.5 * _norm(mean) / _norm(rest)).mean()


def token_cosine(x: Tensor) -> Tensor:
    """Mean over i ≠ j of cos(x_i, x_j); 1 if all tokens point the same way. x: (B, T, D). Returns a scalar."""
    unit = F.normalize(_exact(x), dim=-1)
    T = x.shape[1]
    # Σ_ij cos = ‖Σ_i unit_i‖², of which each token's own is left out (a zero vector has none).
    own = unit.square().sum((1, 2))
    return ((unit.sum(1).square().sum(-1) - own) / (T * (T - 1))).mean()


def attention_matrix(q: Tensor, k: Tensor) -> Tensor:
    """A = softmax(q kᵀ / √E). q, k: (B, H, T, E). Returns (B, H, T, T)."""
    return torch.softmax(_exact(q) @ _exact(k).transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)


def _centred_rows(a: Tensor) -> Tensor:
    """PA: each column loses its mean over rows."""
    return a - a.mean(-2, keepdim=True)


def mu_eff(a: Tensor) -> Tensor:
    """μ_eff = ‖PAP‖₂, the most by which attention passes on what differs between tokens.

    a: (B, H, T, T). Returns the mean over samples and heads. (The paper's released code takes ‖AP‖₂ instead.)
    """
    return spectral_norm(_centred_rows(_centred_rows(a).transpose(-1, -2))).mean()  # (PAP)ᵀ has the same norm


def spectral_norm(m: Tensor) -> Tensor:
    """‖M‖₂ by matrix products alone: (…, T, T) → (…). 0 for M = 0; NaN where M holds one.

    An SVD takes one matrix after the other on a GPU, and raises at a NaN. Here G = MᵀM is squared again and again, each
    time with its trace brought back to 1: after k squarings G^(2^k) holds the directions of the largest singular values
    alone, and the Rayleigh quotient over them is the largest eigenvalue. It is never above ‖M‖₂, and below it by at
    most 2.1e-4 of it at T = 260: where 259 singular values lie together just beneath the first.
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
    """The quotient, and 0 where both are 0; a NaN stays."""
    return x / by.masked_fill(by == 0, 1.0)


def row_diversity(a: Tensor) -> Tensor:
    """‖PA‖_F / ‖A‖_F: 0 if all tokens attend alike. a: (B, H, T, T). Returns the mean over samples and heads."""
    return (torch.linalg.matrix_norm(_centred_rows(a)) / torch.linalg.matrix_norm(a)).mean()


def retention(a: Tensor, v: Tensor) -> Tensor:
    """‖P A V‖_F / ‖P V‖_F: the share of what differs between tokens that is left after attention has averaged.

    a: (B, H, T, T). v: (B, H, T, E). Returns the mean over samples and heads.
    """
    v = _exact(v)
    return (torch.linalg.matrix_norm(_centred_rows(a @ v)) / torch.linalg.matrix_norm(_centred_rows(v))).mean()


def var_gain(update: Tensor, x: Tensor) -> Tensor:
    """VarGain = ‖PU‖_F / ‖PX‖_F of a branch's update U against the trunk X. (B, T, D) both. Returns a scalar."""
    return (_norm(split(_exact(update))[1]) / _norm(split(_exact(x))[1])).mean()


def tr_ratio(update: Tensor, x: Tensor) -> Tensor:
    """TR ratio = ‖U‖_F / ‖X‖_F. (B, T, D) both. Returns a scalar."""
    return (_norm(_exact(update)) / _norm(_exact(x))).mean()


def writer_split(y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a writer W (output W y_t, whose gradient is δ_t) in two parts that add up to it (eq. 5).

    Per sample Σ_t δ_t y_tᵀ = T·δ̄ȳᵀ + Σ_t δ̃_t ỹ_tᵀ, summed over the batch: mean-coherent and centred part.

    Args:
        y: (B, T, K) inputs of the writer. delta: (B, T, D) gradients of its outputs.

    Returns:
        Two matrices (D, K); their Frobenius norms are G_mean and G_ctr.
    """
    (y_mean, y_rest), (d_mean, d_rest) = split(_exact(y)), split(_exact(delta))
    mean = y.shape[1] * d_mean[:, 0].T @ y_mean[:, 0]
    return mean, d_rest.flatten(0, 1).T @ y_rest.flatten(0, 1)


@dataclass(frozen=True)
class Amplification:
    """How far token gradients add up instead of cancelling (eq. 6), the mean over samples.

    Attributes:
        factor: A = ‖Σ_t δ_t y_tᵀ‖² / Σ_t ‖δ_t‖²‖y_t‖². At most T (Cauchy–Schwarz); 1 if tokens are unrelated.
        alignment: (T − 1)·κ̂, with κ̂ the mean over i ≠ j of cos(δ_i, δ_j)·cos(y_i, y_j). With equal magnitudes
            A − 1 equals it.
    """

    factor: Tensor
    alignment: Tensor


def amplification(y: Tensor, delta: Tensor) -> Amplification:
    """Of a writer; arguments as for `writer_split`. A sample without any gradient counts as A = 1, κ̂ = 0."""
    y, delta = _exact(y), _scaled(_exact(delta))
    T = y.shape[1]

    def pairs(y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_ij and Σ_i of ⟨δ_i, δ_j⟩⟨y_i, y_j⟩, (B,) each: T × T numbers a sample instead of a D × K matrix."""
        gram = (y @ y.transpose(1, 2)) * (delta @ delta.transpose(1, 2))  # (B, T, T)
        return gram.sum((1, 2)), gram.diagonal(dim1=1, dim2=2).sum(1)

    total, own = pairs(y, delta)
    factor = torch.where(own > 0, total / own, 1.0)
    aligned, count = pairs(F.normalize(y, dim=-1), F.normalize(delta, dim=-1))
    return Amplification(factor.mean(), ((aligned - count) / T).mean())


def _scaled(delta: Tensor) -> Tensor:
    """Each sample's gradients brought near 1, so that their fourth powers do not underflow."""
    return delta / delta.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)


def time_probe(tokens: Tensor, t: Tensor, ridge: float = 1e-3) -> float:
    """R², on samples it has not seen, of a linear probe that reads t from the mean of the image tokens.

    The paper finds 0.998 at the output: the network, which is not told t, works it out. Even samples fit the probe, odd
    ones judge it.

    Args:
        tokens: (N, D) means. t: (N,). ridge: penalty on the weights of the standardised means.

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
