"""A sampling step as one CUDA graph: the host launches one graph instead of thousands of kernels.

Shapes: B batch, C channels.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from mvsplit.flow.objective import Network

log = logging.getLogger(__name__)
Recording = tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]
"""The graph, the memory it reads its inputs from, and that of its result."""


class GraphReplay:
    """A network on a GPU whose forward pass is recorded once for each batch shape, and replayed.

    The recorded kernels read and write fixed memory: weights may change their values, but must not move. The network is
    called as usual without a GPU, where gradients are needed, where hooks must run, and if it cannot be recorded since
    it reads a value back to the host. Other attributes are the network's.

    Args:
        network: in eval mode.
        shapes: batch shapes recorded at most, each with its own activations: that of a set's batches and that of its
            last one, with and without guidance. Other batches are called as usual.
    """

    def __init__(self, network: Network, shapes: int = 4) -> None:
        self.network, self.shapes = network, shapes
        self._recorded: dict[Any, Recording | None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity at z; see the network. z: (B, C, height, width); t: (B,). Returns (B, C, height, width)."""
        inputs = z, t, condition
        if not z.is_cuda or torch.is_grad_enabled() or self._has_hooks():
            return self.network(*inputs)
        key = tuple((tuple(x.shape), x.dtype) for x in inputs)
        if key not in self._recorded and len(self._recorded) < self.shapes:
            self._recorded[key] = self._record(inputs)
        recorded = self._recorded.get(key)
        if recorded is None:
            return self.network(*inputs)
        graph, places, out = recorded
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return out.clone()

    def _has_hooks(self) -> bool:
        return any(getattr(self.network, hooks, None) for hooks in ("_forward_hooks", "_forward_pre_hooks"))

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording | None:
        places = tuple(x.clone() for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile, choose algorithms, allocate workspaces: none of it may be recorded
            for _ in range(3):
                self.network(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = self.network(*places)
        except RuntimeError as error:
            log.warning(f"sampling is not recorded as a CUDA graph: {str(error).splitlines()[0]}")
            return None
        return graph, places, out
