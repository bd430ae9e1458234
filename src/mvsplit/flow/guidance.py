"""Classifier-free guidance on all channels (Ho and Salimans, 2022), optionally on an interval of times only.

v = v_null + w·(v_cond − v_null);  w = cfg_scale inside the interval, 1 outside (Kynkäänniemi et al., 2024)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mvsplit.flow.objective import Network

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, t): x (B, C, height, width), one t for the whole batch."""


def guided_velocity(
    network: Network, condition: Tensor, cfg_scale: float = 1.0, interval: Sequence[float] = (0.0, 1.0)
) -> Velocity:
    """The velocity field that a solver follows for these conditions.

    Both branches run as one batch. Where the guidance weight is 1 the null branch is not run at all, so scale 1
    costs and gives what no guidance does.

    Args:
        condition: what the network takes, B of them. cfg_scale: w. interval: [low, high] of t, both included.
    """
    null = network.drop(condition, torch.ones(len(condition), dtype=torch.bool, device=condition.device))
    both = torch.cat([condition, null])

    def velocity(x: Tensor, t: float) -> Tensor:
        if cfg_scale == 1 or not interval[0] <= t <= interval[1]:
            return network(x, x.new_full((len(x),), t), condition)
        conditional, unconditional = network(torch.cat([x, x]), x.new_full((2 * len(x),), t), both).chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional)

    return velocity
