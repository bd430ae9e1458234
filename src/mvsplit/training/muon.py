"""Muon for the matrices inside the blocks and AdamW for everything else, as one optimiser.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix, which moves all singular
directions equally far. This is meant for matrices that map a layer's inputs to its outputs: gains and biases are not
matrices, and a row of a token table or of a projection from or to pixels has a scale of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mvsplit.stability.taps import blocks_of

PACKED = {"qkv": 3, "w13": 2, "modulation": 6}
"""Matrices that hold several of equal size one below the other, by the name of their layer."""


def block_matrices(network: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Trainable matrices inside a network's blocks, and the number of matrices that each holds."""
    for block in blocks_of(network):
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                layer = name.split(".")[-2] if "." in name else ""
                yield parameter, PACKED.get(layer, 1)


class PackedMuon(torch.optim.Muon):
    """PyTorch's Muon; a parameter of a group with `parts` is updated as that many matrices.

    Queries, keys and values are three maps. Orthogonalised together, the one with the largest gradient would take the
    others' share of the step, and the factor that depends on the shape would be that of a map that does not exist.
    """

    def _init_group(self, group: Any, *lists: list[Any]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [part for tensor in tensors for part in tensor.chunk(group["parts"])]
        return has_complex


class Together(Optimizer):
    """Several optimisers as one: their groups in one list, their state in one dictionary.

    Args:
        parts: the optimisers; each parameter belongs to one of them.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self.parts, self.param_groups = parts, groups  # the parts' own, so that a schedule changes both
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
