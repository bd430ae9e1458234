"""What samples are compared with, how it is stored, and the numbers that come out, with a network of random weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mvsplit.evaluation import references
from mvsplit.evaluation.distances import Gaussian, Moments, frechet_distance, inception_score, kernel_distance
from mvsplit.evaluation.distances import precision_recall as reach
from mvsplit.evaluation.feature_networks import FeatureNetwork, Features
from mvsplit.evaluation.image_files import open_images
from mvsplit.evaluation.npz_files import write_npz
from mvsplit.evaluation.quality import Quality
from mvsplit.evaluation.references import Reference
from mvsplit.utils.errors import UserError

SHAPE = (3, 4, 4)
FULL = {"fid", "sfid", "is", "is_std", "precision", "recall", "kid", "kid_std"}


class Projection(FeatureNetwork):
    """Random linear features of the pixels; counts the images it is run on."""

    num_features, num_spatial = 6, 4

    def __init__(self, name: str = "projection", spatial: bool = True) -> None:
        super().__init__()
        draws = torch.randn(15, 48, generator=torch.Generator().manual_seed(0)) / 500
        self.weight = nn.Parameter(draws, requires_grad=False)
        self.name, self.seen = name, 0
        self.num_spatial = 4 if spatial else 0

    def features(self, images: Tensor) -> Features:
        self.seen += len(images)
        pooled, spatial, logits = (images.flatten(1).float() @ self.weight.T).split([6, 4, 5], dim=1)
        return Features(pooled, spatial if self.num_spatial else None, logits.softmax(1))

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}


def images(count: int, seed: int = 0, low: int = 0) -> Tensor:
    return torch.randint(low, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def stored(folder: Path, name: str = "real.npz", count: int = 50, seed: int = 0) -> Path:
    write_npz(folder / name, count, SHAPE, images(count, seed).split(7))
    return folder / name


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def measured(network: FeatureNetwork, reference: Reference, samples: Tensor, batch: int = 9) -> dict[str, float]:
    quality = Quality(network, reference)
    for part in samples.split(batch):
        quality.update(part)
    assert quality.count == len(samples)
    return quality.metrics()


def test_the_metrics_are_those_of_the_features(tmp_path: Path) -> None:
    network, samples = Projection(), images(40, seed=1, low=60)
    found = measured(network, Reference.load(str(stored(tmp_path)), network), samples)
    real, made = network(images(50)), network(samples)

    def gaussian(features: Tensor | None) -> Gaussian:
        assert features is not None
        return Gaussian(features.double().mean(0), features.double().T.cov())

    assert found.keys() == FULL
    assert found["fid"] == pytest.approx(frechet_distance(gaussian(made.pooled), gaussian(real.pooled)), rel=1e-5)
    assert found["sfid"] == pytest.approx(frechet_distance(gaussian(made.spatial), gaussian(real.spatial)), rel=1e-5)
    assert made.probabilities is not None
    assert (found["is"], found["is_std"]) == pytest.approx(inception_score(made.probabilities), rel=1e-5)
    assert (found["precision"], found["recall"]) == reach(real.pooled, made.pooled)
    assert (found["kid"], found["kid_std"]) == pytest.approx(kernel_distance(real.pooled, made.pooled), rel=1e-5)
    assert found["fid"] > 0.01


def test_the_numbers_do_not_depend_on_batches_and_are_zero_for_the_reference_itself(tmp_path: Path) -> None:
    network = Projection()
    reference = Reference.load(str(stored(tmp_path)), network)
    small, large = (measured(network, reference, images(30, seed=1), size) for size in (1, 30))
    assert small == pytest.approx(large, rel=1e-5)
    itself = measured(network, reference, images(50))
    assert itself["fid"] < 1e-9
    assert itself["sfid"] < 1e-9
    assert (itself["precision"], itself["recall"]) == (1, 1)
    assert itself["kid"] < 0  # unbiased: pairs of a sample with itself are left out


def test_published_statistics_give_the_same_distances_as_their_images(tmp_path: Path) -> None:
    network, samples = Projection(), images(40, seed=1)
    expected = measured(network, Reference.load(str(stored(tmp_path)), network), samples)
    found = network(images(50))
    assert found.spatial is not None
    parts = {"": found.pooled.double(), "_s": found.spatial.double()}
    statistics = {f"mu{suffix}": part.mean(0).numpy() for suffix, part in parts.items()}
    statistics |= {f"sigma{suffix}": part.T.cov().numpy() for suffix, part in parts.items()}
    np.savez(tmp_path / "statistics.npz", **statistics)
    network.seen = 0
    reference = Reference.load(str(tmp_path / "statistics.npz"), network)
    assert network.seen == 0
    assert (reference.features, reference.shape) == (None, None)
    metrics = measured(network, reference, samples)
    assert metrics.keys() == {"fid", "sfid", "is", "is_std"}
    assert metrics == pytest.approx({name: expected[name] for name in metrics}, rel=1e-5)
    assert measured(Projection(spatial=False), reference, samples).keys() == {"fid", "is", "is_std"}


def test_statistics_beside_images_are_used_for_fid_and_the_images_for_the_rest(tmp_path: Path) -> None:
    network, samples = Projection(), images(40, seed=1)
    part = images(20).permute(0, 2, 3, 1).numpy()
    pooled = network(images(50)).pooled.double()
    np.savez(tmp_path / "adm.npz", arr_0=part, mu=pooled.mean(0).numpy(), sigma=pooled.T.cov().numpy())
    reference = Reference.load(str(tmp_path / "adm.npz"), network)
    found = measured(network, reference, samples)
    whole = measured(network, Reference.load(str(stored(tmp_path)), network), samples)
    few = measured(network, Reference.load(str(stored(tmp_path, "few.npz", 20)), network), samples)
    assert found.keys() == FULL - {"sfid"}
    assert found["fid"] == pytest.approx(whole["fid"], rel=1e-5)
    assert found["fid"] != pytest.approx(few["fid"], rel=1e-2)
    assert torch.equal(reference.features, network(images(50)).pooled[:20])  # type: ignore[arg-type]
    assert reference.fingerprint == open_images(str(tmp_path / "adm.npz")).fingerprint


def test_a_second_evaluation_reads_the_stored_features(tmp_path: Path) -> None:
    path, network = stored(tmp_path), Projection()
    first = Reference.load(str(path), network)
    assert network.seen == 50
    [cache] = caches(tmp_path)
    assert cache.name.startswith("real.npz.")
    second = Reference.load(str(path), network)
    assert network.seen == 50
    assert measured(network, first, images(30, 1)) == measured(network, second, images(30, 1))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (path, cache):
        shutil.copy(file, moved)
    network.seen = 0
    Reference.load(str(moved / path.name), network)
    assert network.seen == 0  # the same content in another place and at another time


def test_features_of_another_network_or_of_other_images_are_not_used(tmp_path: Path) -> None:
    path, other = stored(tmp_path), Projection("other")
    Reference.load(str(path), Projection())
    [first] = caches(tmp_path)
    Reference.load(str(path), other)
    assert other.seen == 50
    assert len(caches(tmp_path)) == 2
    second = next(cache for cache in caches(tmp_path) if cache != first)
    shutil.copy(first, second)  # under the other network's name
    Reference.load(str(path), other)
    assert other.seen == 100
    stored(tmp_path, seed=3)
    assert Reference.load(str(path), other).fingerprint == open_images(str(path)).fingerprint
    assert other.seen == 150
    assert len(caches(tmp_path)) == 3


def test_a_damaged_file_of_features_is_written_again(tmp_path: Path) -> None:
    path, network = stored(tmp_path), Projection()
    reference = Reference.load(str(path), network)
    [cache] = caches(tmp_path)
    whole = cache.read_bytes()
    place = len(whole) - 5  # a value
    damaged = [whole[:-9], b"", b"x" * 200, whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :]]
    for i, content in enumerate(damaged):
        cache.write_bytes(content)
        again = Reference.load(str(path), network)
        assert network.seen == 50 * (i + 2)
        assert torch.equal(again.pooled.covariance, reference.pooled.covariance)
        assert load_file(cache).keys() >= {"features", "pooled_mean", "spatial_mean"}


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    lines: list[str] = []
    monkeypatch.setattr(references, "whole_file", refuse)
    monkeypatch.setattr(references, "info", lines.append)
    network = Projection()
    assert measured(network, Reference.load(str(stored(tmp_path)), network), images(30, 1)).keys() == FULL
    assert len(lines) == 1
    assert lines[0].startswith("reference: its features are not stored for the next time (Read-only file system: ")
    assert caches(tmp_path) == []


def test_a_folder_of_images_is_stored_beside_it(tmp_path: Path) -> None:
    from torchvision.io import write_png

    (tmp_path / "real").mkdir()
    for i, image in enumerate(images(6)):
        write_png(image, str(tmp_path / "real" / f"{i}.png"))
    network = Projection()
    for _ in range(2):
        reference = Reference.load(str(tmp_path / "real"), network)
        assert network.seen == 6
    [cache] = caches(tmp_path)
    assert cache.name.startswith("real.")
    assert torch.equal(reference.features, network(images(6)).pooled)  # type: ignore[arg-type]


class Ramp:
    """Image i has the value i; no file."""

    shape, fingerprint = SHAPE, "ramp"

    def __len__(self) -> int:
        return 100

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        values = torch.arange(100, dtype=torch.uint8)[:, None, None, None]
        yield from values.expand(-1, *SHAPE).split(batch_size)


def test_of_many_images_evenly_spaced_ones_are_kept() -> None:
    network = Projection()
    one = float(network(torch.ones(1, *SHAPE, dtype=torch.uint8)).pooled[0, 0])
    reference = Reference.of(Ramp(), network, batch_size=7, max_features=8)
    assert reference.features is not None
    kept = (reference.features[:, 0] / one).round().tolist()
    assert kept == [12, 24, 37, 49, 62, 74, 87, 99]
    whole = Moments()
    whole.update(network(torch.cat(list(Ramp().batches(100)))).pooled)
    assert torch.allclose(reference.pooled.covariance, whole.covariance, rtol=1e-5)  # of all of them


def test_memory_of_samples_is_bounded(tmp_path: Path) -> None:
    network = Projection()
    quality = Quality(network, Reference.load(str(stored(tmp_path)), network), max_features=20)
    for part in images(45, seed=1).split(8):
        quality.update(part)
    assert sum(len(part) for part in quality._features) == 20
    assert sum(len(part) for part in quality._probabilities) == 20
    found = quality.metrics()
    everything = measured(network, quality.reference, images(45, seed=1))
    first = measured(network, quality.reference, images(45, seed=1)[:20])
    assert found["fid"] == pytest.approx(everything["fid"], rel=1e-5)
    assert found["kid"] == pytest.approx(first["kid"], rel=1e-5)
    assert found["is"] == pytest.approx(first["is"], rel=1e-5)


def test_few_samples_have_the_metrics_that_exist(tmp_path: Path) -> None:
    network = Projection()
    reference = Reference.load(str(stored(tmp_path)), network)
    assert measured(network, reference, images(0)) == {}
    assert measured(network, reference, images(1)) == {}
    assert measured(network, reference, images(3)).keys() == {"fid", "sfid", "is", "is_std"}
    assert measured(network, reference, images(4)).keys() == FULL


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    network = Projection()
    reference = Reference.load(str(stored(tmp_path)), network)
    with pytest.raises(UserError, match=r"^samples: 3 × 4 × 5 \(channels, height, width\), must be 3 × 4 × 4 as the"):
        Quality(network, reference).update(torch.zeros(2, 3, 4, 5, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"^reference: 1 image; at least 2 are needed$"):
        Reference.load(str(stored(tmp_path, "one.npz", 1)), network)
    mean, covariance = np.zeros(6), np.eye(6)
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "other": (
            {"mu": np.zeros(2048), "sigma": covariance},
            r"'mu' has the shape \[2048\], must be \[6\] for the features of Projection",
        ),
        "sigma": ({"mu": mean, "sigma": np.eye(5)}, r"'sigma' has the shape \[5, 5\], must be \[6, 6\]"),
        "alone": ({"mu": mean}, "has no array 'sigma'"),
        "nan": ({"mu": mean * np.nan, "sigma": covariance}, "'mu' must be finite numbers"),
        "text": ({"mu": np.array(list("abcdef")), "sigma": covariance}, "'mu' must be finite numbers"),
        "spatial": (
            {"mu": mean, "sigma": covariance, "mu_s": np.zeros(5), "sigma_s": np.eye(5)},
            r"'mu_s' has the shape \[5\], must be \[4\]",
        ),
        "object": ({"mu": np.array([{}] * 6), "sigma": covariance}, "Python objects, which are never unpickled"),
    }
    for name, (arrays, message) in bad.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=f"^{path}: [^\n]*{message}[^\n]*$"):
            Reference.load(str(path), network)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        Reference.load(str(tmp_path / "nothing"), network)
