"""Solvers for dx/d(−t) = v(x, t), from t = 1 (noise) to t = 0 (data): x ← x + (t − t_next)·v (paper, sampling).

Each is a small pure function `(velocity, x, times) -> x` over falling times; calls of `velocity` per step:

    euler 1, first order (paper)    heun 2, second order    multistep 1, second order
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor

from mvsplit.flow.guidance import Velocity

Solver = Callable[[Velocity, Tensor, Tensor], Tensor]


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """First order: the velocity at the left end of each step."""
    for t, t_next in pairwise(times.tolist()):
        x = x + (t - t_next) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Second order: the average of the velocities at both ends (Heun's method, two calls a step)."""
    for t, t_next in pairwise(times.tolist()):
        v = velocity(x, t)
        end = x + (t - t_next) * v
        x = x + (t - t_next) * (v + velocity(end, t_next)) / 2
    return x


def multistep(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Second order at one call a step: Adams and Bashforth's two-step method for uneven steps; starts with Euler."""
    previous: tuple[float, Tensor] | None = None  # the step before: its length and velocity
    for t, t_next in pairwise(times.tolist()):
        h, v = t - t_next, velocity(x, t)
        if previous is None:
            x = x + h * v
        else:
            ratio = h / previous[0]
            x = x + h * ((1 + ratio / 2) * v - ratio / 2 * previous[1])
        previous = (h, v)
    return x


SolverName = Literal["euler", "heun", "multistep"]
SOLVERS: dict[SolverName, Solver] = {"euler": euler, "heun": heun, "multistep": multistep}
