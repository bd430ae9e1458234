"""From noise to pictures: time grid, guidance and solver put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le, Len
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from mvsplit.flow.guidance import guided_velocity
from mvsplit.flow.objective import Network
from mvsplit.flow.solvers import SOLVERS, SolverName
from mvsplit.flow.times import time_grid
from mvsplit.utils.rng import Stream, normal


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn.

    Args:
        solver: see `flow/solvers.py`. steps: intervals of the time grid.
        cfg_scale: guidance weight; 1 is no guidance. cfg_interval: [low, high] of t where guidance is on.
    """

    solver: SolverName = "euler"
    steps: PositiveInt = 25
    cfg_scale: NonNegativeFloat = 2.0
    cfg_interval: Annotated[list[Annotated[float, Ge(0), Le(1)]], Len(2, 2)] | None = None

    @staticmethod
    def check(cfg_interval: list[float] | None) -> None:
        """Raise `ValueError` for values that do not fit; called on the composed config before anything is built."""
        if cfg_interval is not None and cfg_interval[0] > cfg_interval[1]:
            raise ValueError(f"sampler.cfg_interval = {cfg_interval}: low must not exceed high")

    @torch.no_grad()
    def sample(self, network: Network, condition: Tensor, noise: Tensor, time_shift: float = 1.0) -> Tensor:
        """Draw one picture per condition.

        Args:
            condition: what the network takes, B of them. noise: (B, C, height, width), see `sample_noise`.
            time_shift: the training flow's.

        Returns:
            (B, C, height, width), in the data's units ([−1, 1] for pixels), not clamped.
        """
        velocity = guided_velocity(network, condition, self.cfg_scale, self.cfg_interval or (0.0, 1.0))
        return SOLVERS[self.solver](velocity, noise, time_grid(self.steps, time_shift))


def sample_noise(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise of pictures number `index` (B,): the same for a number in any batch. Returns (B, *shape) float32."""
    return normal(seed, Stream.SAMPLE_NOISE, index, shape)
