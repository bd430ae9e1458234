"""The times of training and of sampling. The paper does not state its training distribution.

A time distribution maps uniform random numbers on (0, 1), which are functions of the position, to times.
"""

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor


def time_shift(t: Tensor, shift: float) -> Tensor:
    """T' = s·t / (1 + (s − 1)·t): keeps 0 and 1; s > 1 moves the rest towards noise (paper: s = 4)."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times from 1 (noise) to 0 (data), evenly spaced before the shift: (steps + 1,) float64."""
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


@dataclass(frozen=True)
class Uniform:
    """t ~ U(0, 1)."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """logit t ~ N(mean, std²) (Esser et al., 2024): most mass in the middle; mean > 0 shifts it towards noise."""

    mean: float = 0.0
    std: PositiveFloat = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
