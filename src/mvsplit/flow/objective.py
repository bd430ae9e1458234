"""The training objective: straight path, velocity target, plain MSE.

Shapes: B batch, C channels; images and latents are (B, C, height, width).

    z_t = (1 − t)·x0 + t·x1,  x1 ~ N(0, I);   v = x0 − x1;   loss = mean (v̂ − v)²        (paper, objective)

t = 1 is noise, t = 0 is data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import torch
from annotated_types import Ge, Le
from pydantic import PositiveFloat
from torch import Tensor

from mvsplit.flow.times import Uniform, time_shift
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Stream, normal, uniform


class Network(Protocol):
    """The interface that the flow expects of a network.

    Attributes:
        input_shape: (C, height, width) of an input.
    """

    input_shape: tuple[int, ...]

    def __call__(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity at z (B, C, height, width) and t (B,)."""

    def drop(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Replace the condition where mask (B,) is true with the null condition."""


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1), in the dtype of `like`."""
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 − t)·x0 + t·x1."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * x1


def drop_condition(network: Network, condition: Tensor, mask: Tensor, null: Tensor | None = None) -> Tensor:
    """Replace the condition of the samples where mask (B,) is true with the null condition.

    Args:
        network: knows its null condition if `null` is None.
        condition: of the network: (B,) classes or (B, S, W) embeddings.
        mask: (B,).
        null: embeddings of the empty caption, (S', W) with S' ≥ S. A causal text encoder's states do not depend on
            later padding, so the first S of them are what the caption gives when it is padded to S tokens.
    """
    if null is None:
        return network.drop(condition, mask)
    return torch.where(mask[:, None, None], null[: condition.shape[1]].to(condition.dtype), condition)


def velocity_loss(network: Network, x0: Tensor, x1: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, one value per sample, float32. Returns (B,).

    Raises:
        UserError: if the network returns another shape.
    """
    prediction = network(interpolate(x0, x1, t), t, condition)
    if prediction.shape != x0.shape:
        raise UserError(f"model: returned shape {tuple(prediction.shape)}, expected its input's, {tuple(x0.shape)}")
    return (prediction.float() - (x0 - x1).float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Flow:
    """The choices of the objective.

    Args:
        times: maps uniform random numbers on (0, 1) to times (see `flow/times.py`).
        time_shift: s in t' = s·t / (1 + (s − 1)·t), applied to training times and to the sampler's grid alike
            ("must match training", paper: 4 at 256 tokens × 128 channels).
        label_dropout: share of the samples trained with the null condition, for guidance.
    """

    times: Callable[[Tensor], Tensor] = field(default_factory=Uniform)
    time_shift: PositiveFloat = 1.0
    label_dropout: Annotated[float, Ge(0), Le(1)] = 0.1

    def draw(self, seed: int, position: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise x1 (like x0), times (B,) and dropout mask (B,) of the samples at these positions in the stream.

        Args:
            position: (B,) int64, step × global batch size + slot. It is unique in a run, so that the random numbers do
                not depend on micro-batches, the number of devices or a resume.
        """
        x1 = normal(seed, Stream.TRAIN_NOISE, position, x0.shape[1:]).to(x0.dtype)
        t = self.times(uniform(seed, Stream.TRAIN_TIME, position)[:, 0])
        mask = uniform(seed, Stream.LABEL_DROPOUT, position)[:, 0] < self.label_dropout
        return x1, time_shift(t, self.time_shift).float(), mask
