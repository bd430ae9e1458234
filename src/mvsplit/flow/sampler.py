"""From noise to images: classifier-free guidance, solvers, and both combined on a time grid.

Guidance is on all channels (Ho and Salimans, 2022), optionally restricted to an interval of t:

    v = v_null + w·(v_cond − v_null);  w = cfg_scale inside the interval, 1 outside (Kynkäänniemi et al., 2024)

With a guide, a weaker network of the same kind (an earlier or smaller checkpoint), v_null is the guide's velocity for
the same condition: autoguidance (Karras et al., 2024).

Solvers are for dx/d(−t) = v(x, t), from t = 1 (noise) to t = 0 (data): x ← x + (t − t_next)·v (paper, sampling). Each
is a small pure function `(velocity, x, times) -> x` over falling times; calls of `velocity` per step:

    euler 1, first order (paper)    heun 2, second order    multistep 1, second order
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le, Len
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from mvsplit.flow.objective import Network, drop_condition
from mvsplit.flow.times import time_grid
from mvsplit.utils.rng import Stream, normal

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, t): x (B, C, height, width), one t for the whole batch."""
Solver = Callable[[Velocity, Tensor, Tensor], Tensor]


def guided_velocity(
    network: Network,
    condition: Tensor,
    cfg_scale: float = 1.0,
    interval: Sequence[float] = (0.0, 1.0),
    guide: Network | None = None,
    null: Tensor | None = None,
) -> Velocity:
    """The velocity field for these conditions.

    Both branches of one network run as one batch. Where w = 1 the other branch is skipped, so a scale of 1 is the same
    as no guidance.

    Args:
        condition: B conditions of the network.
        cfg_scale: w.
        interval: [low, high] of t, inclusive.
        guide: gives the other branch; None for the null condition.
        null: the null condition of embeddings, see `drop_condition`.
    """
    both = condition
    if cfg_scale != 1 and guide is None:
        everywhere = torch.ones(len(condition), dtype=torch.bool, device=condition.device)
        both = torch.cat([condition, drop_condition(network, condition, everywhere, null)])

    def velocity(x: Tensor, t: float) -> Tensor:
        if cfg_scale == 1 or not interval[0] <= t <= interval[1]:
            return network(x, x.new_full((len(x),), t), condition)
        if guide is not None:
            times = x.new_full((len(x),), t)
            weaker = guide(x, times, condition)
            return weaker + cfg_scale * (network(x, times, condition) - weaker)
        conditional, unconditional = network(torch.cat([x, x]), x.new_full((2 * len(x),), t), both).chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional)

    return velocity


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """First order: the velocity at the left end of each step."""
    for t, t_next in pairwise(times.tolist()):
        x = x + (t - t_next) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Second order: the average of the velocities at both ends (Heun's method, two calls per step)."""
    for t, t_next in pairwise(times.tolist()):
        v = velocity(x, t)
        end = x + (t - t_next) * v
        x = x + (t - t_next) * (v + velocity(end, t_next)) / 2
    return x


def multistep(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Second order, one call per step: two-step Adams–Bashforth for uneven steps; starts with Euler."""
    previous: tuple[float, Tensor] | None = None  # length and velocity of the previous step
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


@dataclass(frozen=True)
class Sampler:
    """Settings for generating images.

    Args:
        solver: name of one of `SOLVERS`.
        steps: intervals of the time grid.
        cfg_scale: guidance weight; 1 is no guidance.
        cfg_interval: [low, high] of t in which guidance is on; None is everywhere.
        time_shift: of the time grid; None is that of the training flow, which it should match.
        guide: path of the weaker network's checkpoint, loaded by whoever samples; None guides by the null condition.
    """

    solver: SolverName = "euler"
    steps: PositiveInt = 25
    cfg_scale: NonNegativeFloat = 2.0
    cfg_interval: Annotated[list[Annotated[float, Ge(0), Le(1)]], Len(2, 2)] | None = None
    time_shift: PositiveFloat | None = None
    guide: str | None = None

    @property
    def calls(self) -> int:
        """Calls of the network for a batch of samples."""
        return self.steps * (2 if self.solver == "heun" else 1)

    @property
    def doubles(self) -> bool:
        """Whether both branches of the guidance are computed in one batch."""
        return self.cfg_scale != 1 and self.guide is None

    @staticmethod
    def check(cfg_interval: list[float] | None) -> None:
        """Raise `ValueError` for an empty interval; called on the composed config before anything is built."""
        if cfg_interval is not None and cfg_interval[0] > cfg_interval[1]:
            raise ValueError(f"sampler.cfg_interval = {cfg_interval}: low must not exceed high")

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        condition: Tensor,
        noise: Tensor,
        time_shift: float = 1.0,
        guide: Network | None = None,
        null: Tensor | None = None,
    ) -> Tensor:
        """Generate one image per condition.

        Args:
            condition: B conditions of the network.
            noise: (B, C, height, width), see `sample_noise`.
            time_shift: that of the training flow.
            guide: the network of the checkpoint that `self.guide` names.
            null: the null condition of embeddings, see `drop_condition`.

        Returns:
            (B, C, height, width), in the data's range ([−1, 1] for pixels), not clamped.
        """
        velocity = guided_velocity(network, condition, self.cfg_scale, self.cfg_interval or (0.0, 1.0), guide, null)
        return SOLVERS[self.solver](velocity, noise, time_grid(self.steps, self.time_shift or time_shift))


def sample_noise(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise of the images with numbers `index` (B,), whatever their batch. Returns (B, *shape) float32."""
    return normal(seed, Stream.SAMPLE_NOISE, index, shape)
