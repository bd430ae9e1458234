"""Distances between sets of features, against closed forms and slow loops."""

import itertools
import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from mvsplit.evaluation.distances import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(*batches: Tensor) -> Moments:
    found = Moments()
    for batch in batches:
        found.update(batch)
    return found


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def test_moments_of_batches_and_merged_parts_equal_those_of_all() -> None:
    features = normal(203, 17) * 1e-3 + 50  # small spread, large mean: raw squares would cancel
    batches = features.split([1, 64, 0, 100, 38])
    streamed, first, second = moments(*batches), moments(*batches[:2]), moments(*batches[2:])
    empty = Moments()
    for part in (first, second, Moments()):
        empty.merge(part)
    for found in (streamed, empty):
        assert found.count == 203
        assert (found.mean - features.mean(0)).abs().max() < 1e-12
        assert (found.covariance - features.T.cov()).abs().max() < 1e-12


def test_moments_survive_their_tensors() -> None:
    found = moments(normal(9, 4))
    again = Moments.from_tensors(found.tensors())
    again.update(normal(5, 4, seed=1))
    found.update(normal(5, 4, seed=1))
    assert again.count == found.count == 14
    assert torch.equal(again.covariance, found.covariance)
    with pytest.raises(ValueError, match="a covariance of 1 samples"):
        _ = moments(normal(1, 4)).covariance


def test_moments_begun_in_inference_mode_take_batches_outside_of_it() -> None:
    features, found = normal(30, 4), Moments()
    for i, part in enumerate(features.split(10)):
        with torch.inference_mode(i < 2):
            found.update(part * 1)
    assert (found.covariance - features.T.cov()).abs().max() < 1e-12


def test_float32_features_are_summed_in_float64() -> None:
    features = (normal(400, 8) + 1000).float()
    assert (moments(*features.split(30)).covariance - features.double().T.cov()).abs().max() < 1e-12


def test_distance_of_diagonal_gaussians_has_its_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    expected = 5.25 + (1 + 1 + 6.25)  # |shift|² + Σ (√a − √b)²
    found = frechet_distance(Gaussian(shift, a.diag()), Gaussian(torch.zeros(3).double(), b.diag()))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("zeros", [0, 20, 49])
def test_distance_of_rotated_singular_gaussians_has_its_closed_form(zeros: int) -> None:
    turn = rotation(50)
    a, b = (normal(50, seed=i).square() for i in (1, 2))
    a[: zeros // 2], b[50 - (zeros - zeros // 2) :] = 0, 0
    mean = normal(50, seed=3)
    expected = float((a.sqrt() - b.sqrt()).square().sum() + mean.square().sum())
    found = frechet_distance(Gaussian(mean, turn * a @ turn.T), Gaussian(mean * 0, turn * b @ turn.T))
    assert found == pytest.approx(expected, rel=1e-9)


def test_distance_equals_the_matrix_root_where_that_is_well_conditioned() -> None:
    a, b = (moments(normal(500, 20, seed=i) @ normal(20, 20, seed=i + 2) + i).gaussian() for i in (1, 2))
    root = torch.from_numpy(scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real)
    spread = (a.covariance + b.covariance - 2 * root).trace()
    expected = float((a.mean - b.mean).square().sum() + spread)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize("count", [10, 64, 400])
def test_distance_of_a_set_to_itself_is_zero_also_with_few_samples(count: int) -> None:
    features = normal(count, 128).exp()
    shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    assert 0 <= frechet_distance(moments(features).gaussian(), moments(*shuffled.split(7)).gaussian()) < 1e-9


def test_distance_of_few_samples_equals_that_in_the_space_they_span() -> None:
    basis = rotation(200)[:, :12]  # 200 features of which 12 vary
    a, b = normal(8, 12), normal(9, 12, seed=1) * 2
    small = frechet_distance(moments(a).gaussian(), moments(b).gaussian())
    assert frechet_distance(moments(a @ basis.T).gaussian(), moments(b @ basis.T).gaussian()) == pytest.approx(
        small, rel=1e-9
    )


def slow_mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    same_a = [kernel(a[i], a[j]) for i, j in itertools.permutations(range(len(a)), 2)]
    same_b = [kernel(b[i], b[j]) for i, j in itertools.permutations(range(len(b)), 2)]
    across = [kernel(x, y) for x in a for y in b]
    return sum(same_a) / len(same_a) + sum(same_b) / len(same_b) - 2 * sum(across) / len(across)


def test_kernel_distance_of_whole_sets_equals_the_double_loop() -> None:
    a, b = normal(21, 6), normal(17, 6, seed=1) + 0.3
    mean, std = kernel_distance(a.float(), b.float())
    assert mean == pytest.approx(slow_mmd(a.float().double(), b.float().double()), rel=1e-9)
    assert std == 0


def test_kernel_distance_equals_the_library_s() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = normal(60, 10), normal(60, 10, seed=1) * 1.2
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1.0}
    expected = kid.kernel_mmd(a.numpy(), b.numpy(), kid_kernel_poly_gamma=None, **settings)
    assert kernel_distance(a, b)[0] == pytest.approx(float(expected), rel=1e-9)


def test_subsets_depend_on_the_seed_only_and_scatter_about_the_whole() -> None:
    a, b = normal(400, 5), normal(300, 5, seed=1) + 0.5
    whole, _ = kernel_distance(a, b)
    mean, std = kernel_distance(a, b, subset_size=100)
    assert kernel_distance(a, b, subset_size=100) == (mean, std)
    assert kernel_distance(a, b, subset_size=100, seed=1) != (mean, std)
    assert abs(mean - whole) < 4 * std / math.sqrt(100)
    assert 0.01 < std / whole < 1
    assert abs(kernel_distance(a, normal(400, 5, seed=2), subset_size=200)[0]) < 0.02 * whole  # unbiased


def test_inception_score_of_known_distributions() -> None:
    assert inception_score(torch.full((40, 7), 1 / 7)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    sorted_classes = torch.eye(8).repeat_interleave(50, 0)
    assert inception_score(sorted_classes, splits=1) == (pytest.approx(8), 0)
    assert inception_score(sorted_classes)[0] > 7  # shuffled: a split of one class would have 1
    assert inception_score(torch.eye(3)[:2]) == (1, 0)  # fewer samples than splits
    two = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    expected = math.exp(math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert inception_score(two, splits=1)[0] == pytest.approx(expected, rel=1e-6)


def test_scores_equal_the_library_s() -> None:
    fid, isc, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "isc", "prc"))
    a, b = normal(300, 6), normal(280, 6, seed=1) * 1.2 + 0.4
    statistics = [{"mu": x.mean(0).numpy(), "sigma": x.T.cov().numpy()} for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(a).gaussian(), moments(b).gaussian()) == pytest.approx(expected, rel=1e-6)
    p = normal(200, 9).softmax(1)
    expected = isc.isc_features_to_metric(p.log(), splits=1)["inception_score_mean"]
    assert inception_score(p, splits=1)[0] == pytest.approx(expected, rel=1e-6)
    assert precision_recall(b, a) == pytest.approx(prc.calculate_precision_recall_full(a, b), abs=1e-6)


def slow_precision_recall(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    def share(inner: Tensor, outer: Tensor) -> float:
        radii = [sorted(float((x - y).square().sum()) for y in outer)[k] for x in outer]
        return sum(any((x - y).square().sum() <= r for y, r in zip(outer, radii, strict=True)) for x in inner) / len(
            inner
        )

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("block", [7, 16, 1000])
def test_precision_and_recall_equal_loops_in_any_block_size(block: int) -> None:
    real, generated = normal(40, 3), normal(33, 3, seed=1) * 0.8 + 1.2
    expected = slow_precision_recall(real, generated, 3)
    assert precision_recall(real, generated, block=block) == pytest.approx(expected, abs=0)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert expected[0] != expected[1]
    assert precision_recall(real, generated, k=1, block=block) == slow_precision_recall(real, generated, 1)


def test_ties_and_duplicates_count_as_inside() -> None:
    lattice = torch.tensor(list(itertools.product(range(4), repeat=2))).double()
    real, generated = lattice.repeat(5, 1), lattice[::3] * 1.0 + torch.tensor([0.0, 1.0])
    far = 1000.1  # where a product of float32 would cancel
    for offset in (0.0, far):
        found = precision_recall(real + offset, generated + offset, block=9)
        assert found == slow_precision_recall(real, generated, 3)
    assert 0 < found[0] < 1  # only exact copies: the radius of five equal samples is 0


def test_precision_of_equal_and_of_distant_sets() -> None:
    a = normal(50, 4).float()
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)
    with pytest.raises(ValueError, match="no 3 nearest neighbours"):
        precision_recall(a, a[:3])
