"""Distances between sets of features: FID and sFID, KID, inception score, precision and recall. Pure functions.

Shapes: N, M samples; D features; K classes. All sums are in float64.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mvsplit.utils.rng import NO_FLOAT64, permutation

ROUNDING = 1e-12
"""Distances² that differ by less, relative to the features' norms², are equal: duplicates must have distance 0."""


@dataclass(frozen=True)
class Gaussian:
    """What the Fréchet distance compares: mean (D,) and covariance (D, D), float64 on the CPU."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def factor(self) -> Tensor:
        """L (D, rank) with L Lᵀ = Σ. A reference's is needed at every evaluation, and takes seconds for D = 2048."""
        covariance = self.covariance.double()
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        kept = values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()


class Moments:
    """Count, mean and covariance of features that arrive in batches.

    Batches are merged by the update of Chan, Golub and LeVeque (1979). A sum of raw squares would cancel where the
    spread of a feature is small against its mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # (D, D), the sum of (x − mean)(x − mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Add a batch (B, D). The sums stay on the device of the first one."""
        if len(features) == 0:
            return
        features = double(features if self.count == 0 else features.to(self.mean.device))
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Add the samples of another one."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    @torch.inference_mode(False)  # tensors of inference mode could not be changed in place outside of it
    @torch.no_grad()
    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        mean, scatter = mean.to(self.mean.device), scatter.to(self.mean.device)
        total = self.count + count
        shift = mean - self.mean
        self.scatter.add_(scatter).addr_(shift, shift, alpha=self.count * count / total)
        self.mean.add_(shift, alpha=count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by n − 1. Raises `ValueError` for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} samples does not exist")
        return self.scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """Mean and covariance on the CPU. Raises `ValueError` for fewer than two samples."""
        return Gaussian(self.mean.cpu().clone(), self.covariance.cpu())

    def tensors(self) -> dict[str, Tensor]:
        """Its whole state, to be stored."""
        return {"count": torch.tensor(self.count), "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Moments":
        """From what `tensors` returned."""
        moments = cls()
        moments.count = int(tensors["count"])
        moments.mean, moments.scatter = tensors["mean"].clone(), tensors["scatter"].clone()
        return moments


def double(features: Tensor) -> Tensor:
    """In float64; on the CPU if their device has none."""
    return (features.cpu() if features.device.type in NO_FLOAT64 else features).double()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μA − μB|² + tr ΣA + tr ΣB − 2 tr √(ΣA ΣB): FID (Heusel et al., 2017, eq. 6).

    With ΣA = LA LAᵀ and ΣB = LB LBᵀ, tr √(ΣA ΣB) is the sum of the singular values of LAᵀ LB. The usual ways fail where
    a covariance is singular, as with fewer samples than features: `scipy.linalg.sqrtm` of the product ΣA ΣB, which is
    not symmetric, returns wrong or complex roots, and eigenvalues of the product (torchmetrics) turn rounding errors of
    10⁻¹⁶ into roots of 10⁻⁸, one for each feature. Here such eigenvalues are left out before a root is taken.
    """
    cross = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    spread = a.covariance.double().trace() + b.covariance.double().trace()
    distance = (a.mean.double() - b.mean.double()).square().sum() + spread - 2 * cross
    return max(0.0, float(distance))  # it is never negative, except by rounding


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Bińkowski et al., 2018): unbiased MMD² with the kernel (xᵀy / D + 1)³, a mean over random subsets.

    Args:
        a: (N, D), at least two.
        b: (M, D), at least two.
        subsets: how many pairs of subsets.
        subset_size: samples of each; a set that has no more is used whole.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets; (MMD², 0) if both sets are used whole.
    """
    if max(len(a), len(b)) <= subset_size:
        subsets = 1
    values = [
        _mmd(_subset(a, subset_size, seed, 2 * i), _subset(b, subset_size, seed, 2 * i + 1)) for i in range(subsets)
    ]
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def _subset(features: Tensor, size: int, seed: int, number: int) -> Tensor:
    if len(features) > size:
        features = features[permutation(seed, number, len(features))[:size].to(features.device)]
    return double(features)


def _mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased MMD² of (n, D) and (m, D): pairs of a sample with itself do not count."""
    n, m = len(a), len(b)
    within_a, within_b, across = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    same_a = (within_a.sum() - within_a.trace()) / (n * (n - 1))
    same_b = (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(same_a + same_b - 2 * across.mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """The exponential of E KL(p(y|x) ‖ p(y)) (Salimans et al., 2016), from 1 to K.

    Args:
        probabilities: (N, K), of each class.
        splits: of the samples, at most N; each has a score.
        seed: samples are shuffled before they are split: their order may follow the classes.

    Returns:
        Mean and standard deviation over the splits.
    """
    probabilities = probabilities[permutation(seed, 0, len(probabilities)).to(probabilities.device)]
    scores = []
    for part in probabilities.tensor_split(min(splits, len(probabilities))):
        p = double(part)
        marginal = p.mean(0)
        divergence = torch.special.xlogy(p, p).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, block: int = 2048) -> tuple[float, float]:
    """Share of generated samples in the manifold of the real ones, and the reverse (Kynkäänniemi et al., 2019, eq. 2).

    A set's manifold is the union of balls around its samples that reach to their k-th nearest neighbour.

    Args:
        real: (N, D), more than k.
        generated: (M, D), more than k.
        k: number of neighbours.
        block: distances are computed block × block at a time, so that memory does not grow with N·M.

    Raises:
        ValueError: for sets of no more than k samples.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} and {len(generated)} samples have no {k} nearest neighbours")
    centre = double(real).mean(0)  # distances of features far from 0 would cancel
    real_radii, generated_radii = (_radii(features, centre, k, block) for features in (real, generated))
    inside_real = torch.zeros(len(generated), dtype=torch.bool, device=centre.device)
    inside_generated = torch.zeros(len(real), dtype=torch.bool, device=centre.device)
    for i in range(0, len(real), block):
        for j in range(0, len(generated), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            squares, slack = _squares(real[rows], generated[columns], centre)
            inside_real[columns] |= (squares <= real_radii[rows, None] + slack).any(0)
            inside_generated[rows] |= (squares <= generated_radii[None, columns] + slack).any(1)
    return float(inside_real.double().mean()), float(inside_generated.double().mean())


def _radii(features: Tensor, centre: Tensor, k: int, block: int) -> Tensor:
    """(N,) squared distance of each sample to its k-th nearest neighbour."""
    radii = []
    for rows in features.split(block):
        nearest = torch.zeros(len(rows), 0, dtype=torch.float64, device=centre.device)
        for columns in features.split(block):
            near = torch.cat([nearest, _squares(rows, columns, centre)[0]], dim=1)
            nearest = near.topk(min(k + 1, near.shape[1]), largest=False).values
        radii.append(nearest.amax(1))  # the nearest of the k + 1 is the sample itself
    return torch.cat(radii)


def _squares(a: Tensor, b: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (n, m), and by how much rounding may change them.

    By a matrix product in float64: as exact as float32's differences for what float32 can distinguish, and faster.
    """
    a, b = double(a) - centre, double(b) - centre
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    return (norms - 2 * a @ b.T).clamp_(min=0), norms * ROUNDING
