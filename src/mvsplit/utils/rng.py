"""Random numbers as a pure function of (seed, stream, index): nothing to save, nothing to replay after a resume.

With a stateful generator, noise depends on how a batch is split, on the number of devices and on interruptions. Here
sample number `index` gets the same numbers on any device and at any time.

The mixing function is splitmix64 (Steele, Lea and Flood, 2014). Integers wrap modulo 2⁶⁴.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_64_BITS = (1 << 64) - 1
NO_FLOAT64 = {"mps"}
"""Types of devices for which the CPU computes the numbers."""


class Stream(IntEnum):
    """Purpose of the numbers; each has its own sequence."""

    SHUFFLE = 1
    TRAIN_NOISE = 2
    TRAIN_TIME = 3
    LABEL_DROPOUT = 4
    AUGMENT = 5
    VAL_NOISE = 6
    SAMPLE_NOISE = 7
    STEP = 8
    LATENT = 9
    VAL_LATENT = 10
    SUBSTITUTE = 11
    SHARD_SHUFFLE = 12
    SAMPLE_LABEL = 13
    ROUNDING = 14


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift: int64's own keeps the sign


def mix(x: Tensor) -> Tensor:
    """Splitmix64's output function on int64 tensors, a bijection."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def bits(seed: int, stream: Stream, index: Tensor, count: int) -> Tensor:
    """64 random bits per entry: (B,) int64 indices → (B, count) int64."""
    # The key in Python's integers: a tensor would be copied to the device, and the host would wait.
    key = _mix(_mix(seed) + int(stream))  # unsigned; below as the int64 of the same bits
    row = mix(mix(index.to(torch.int64)) ^ (key - (key >> 63 << 64)))[:, None]
    return mix(row + torch.arange(count, device=index.device) * _GOLDEN)


def uniform(seed: int, stream: Stream, index: Tensor, count: int = 1) -> Tensor:
    """Uniform on (0, 1), float64, on MPS float32: (B,) → (B, count)."""
    numbers = (_shift_right(bits(seed, stream, _host(index), count), 11).double() + 0.5) * 2.0**-53
    return numbers.float().clamp_(max=1 - 2**-24).to(index.device) if index.device.type in NO_FLOAT64 else numbers


def _host(index: Tensor) -> Tensor:
    """The index on the CPU if its device has no float64."""
    return index.cpu() if index.device.type in NO_FLOAT64 else index


def uniform_at(seed: int, stream: Stream, index: int) -> float:
    """`uniform` for one index, in Python's integers: eighty times as fast as with a tensor of one entry."""
    bits = _mix(_mix(_mix(_mix(seed) + int(stream)) ^ _mix(index)))
    return ((bits >> 11) + 0.5) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _64_BITS
    x = ((x ^ (x >> 30)) * _MIX1) & _64_BITS
    x = ((x ^ (x >> 27)) * _MIX2) & _64_BITS
    return x ^ (x >> 31)


def normal(seed: int, stream: Stream, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal, float32: (B,) → (B, *shape), by Box and Muller's transform of pairs of uniforms."""
    count = math.prod(shape)
    half = (count + 1) // 2
    u, angle = uniform(seed, stream, _host(index), 2 * half).chunk(2, dim=1)  # (B, half) each
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * angle
    draws = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
    return draws.float().reshape(-1, *shape).to(index.device)


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of an epoch: a permutation of range(length), (length,) int64."""
    index = torch.arange(length)
    return bits(seed, Stream.SHUFFLE, index + epoch * length, 1)[:, 0].argsort(stable=True)


def step_seed(seed: int, position: int) -> int:
    """Seed of the stateful global generator at a position of the training stream (for dropout layers of forks)."""
    return int(bits(seed, Stream.STEP, torch.tensor([position]), 1)) & ((1 << 63) - 1)
