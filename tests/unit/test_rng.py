"""Counter-based random numbers: known answers, moments, independence of the batch, no copies between devices."""

import pytest
import torch
from device_tools import Copies
from torch._subclasses.fake_tensor import FakeTensorMode

from mvsplit.flow.objective import Flow
from mvsplit.flow.times import LogitNormal
from mvsplit.utils import rng
from mvsplit.utils.rng import Stream, bits, mix, normal, permutation, uniform, uniform_at

GOLDEN = 0x9E3779B97F4A7C15


def signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def test_mix_is_splitmix64() -> None:
    # First outputs of the published generator for seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([signed((1234567 + i * GOLDEN) % 2**64) for i in range(4)])
    assert mix(states).tolist() == [signed(x) for x in published]


def test_numbers_stay_what_they_were() -> None:
    # Runs of earlier versions go on with them.
    known = {
        0: [692271683693339722, 3020802272653681069, -7740045486560293910, 8870277937692466198],
        7: [2380039565343560405, -787768600622195173, 5577532078118549875, 6035403580658323603],
        2**63 - 1: [6036922293239106506, -3154067063320779217, -525675390691035188, 2358726944986306783],
    }
    for seed, expected in known.items():
        assert bits(seed, Stream.TRAIN_NOISE, torch.tensor([0, 2**40]), 2).flatten().tolist() == expected


def test_a_steps_draws_copy_nothing_to_the_device() -> None:
    with FakeTensorMode():
        position, x0 = torch.arange(4, device="cuda"), torch.zeros(4, 1, 8, 8, device="cuda")
        with Copies() as copies:
            Flow(LogitNormal(), 4.0).draw(3, position, x0)
        assert copies.found == []
        with Copies() as copies:  # it sees those that there are
            position.new_tensor([3])
        assert copies.found == ["aten._to_copy.default"]


def test_one_number_is_that_of_the_tensor() -> None:
    for seed in (0, 7, 2**63 - 1):
        for index in (0, 1, 12345, 2**40, 2**62):
            expected = uniform(seed, Stream.AUGMENT, torch.tensor([index])).item()
            assert uniform_at(seed, Stream.AUGMENT, index) == expected


def test_uniform_and_normal_have_their_moments() -> None:
    u = uniform(0, Stream.TRAIN_TIME, torch.arange(100_000))[:, 0]
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 3e-3
    assert abs(u.var() - 1 / 12) < 1e-3
    x = normal(0, Stream.TRAIN_NOISE, torch.arange(2000), (1, 8, 8)).double()
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs((x**4).mean() - 3) < 0.15
    correlation = torch.corrcoef(x.flatten(1).T)
    assert (correlation - torch.eye(64)).abs().max() < 0.1


def test_numbers_depend_on_index_stream_and_seed_alone() -> None:
    index = torch.arange(40, 60)
    whole = normal(3, Stream.SAMPLE_NOISE, index, (1, 8, 8))
    parts = torch.cat([normal(3, Stream.SAMPLE_NOISE, part, (1, 8, 8)) for part in index.split(3)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, normal(4, Stream.SAMPLE_NOISE, index, (1, 8, 8)))
    assert not torch.equal(whole, normal(3, Stream.VAL_NOISE, index, (1, 8, 8)))
    assert normal(3, Stream.VAL_NOISE, index, (3, 5)).shape == (20, 3, 5)  # an odd count


def test_permutation() -> None:
    first, second = permutation(0, 0, 1000), permutation(0, 1, 1000)
    assert first.sort().values.tolist() == list(range(1000))
    assert second.sort().values.tolist() == list(range(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, permutation(0, 0, 1000))


def test_a_device_without_float64_gets_the_numbers_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has none. Here such a device is `meta`: its index is taken for one on the CPU."""
    index, there = torch.arange(5), torch.empty(5, dtype=torch.int64, device="meta")
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(rng, "NO_FLOAT64", {"meta"})
    monkeypatch.setattr(rng, "_host", lambda _: index)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: sent.append(self) or self)
    normal(1, Stream.TRAIN_NOISE, there, (2, 3))
    uniform(1, Stream.TRAIN_TIME, there, 1000)
    monkeypatch.undo()
    sent = [numbers for numbers in sent if numbers.is_floating_point()]
    assert torch.equal(sent[-2], normal(1, Stream.TRAIN_NOISE, index, (2, 3)))
    assert sent[-1].dtype == torch.float32
    assert sent[-1].max() < 1
    torch.testing.assert_close(sent[-1].double(), uniform(1, Stream.TRAIN_TIME, index, 1000), rtol=0, atol=2**-24)
