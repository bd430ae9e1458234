"""Watches blocks of a network while it trains: measures are taken when gradients come by in the backward pass.

Shapes: B batch, T tokens, D width, K inputs of a writer.

Hooks on a block's parts put a `Tap` behind their outputs, an identity whose backward sees the output's gradient and the
tensors it belongs to. So a measure is taken once per backward pass, also under activation checkpointing, where forward
passes run twice: what a tap saves is saved, dropped and computed again like everything else.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mvsplit.stability import measures

WRITERS = {"attention": ("attention.proj", "residual1"), "ffn": ("ffn.w2", "residual2")}
"""Branch → its last matrix, and the residual that merges its update, as parts of a block."""
Key = tuple[int, str]
"""Number of a block, name of a quantity."""


class Tap(torch.autograd.Function):
    """Hands `out` on. In the backward pass calls `record(gradient of out, *tensors)`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, record: Callable[..., None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.record = record
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: each look would recompute
        ctx.record(grad, *tensors)
        return grad, None, *[None] * len(tensors)


class Taps:
    """Measures of chosen blocks, over the micro-batches of a step.

    Args:
        network: has `blocks`, and `rope_tables` for their attention.
        attention_samples: samples of a micro-batch whose attention matrices are looked at.

    Attributes:
        sums: sums over micro-batches of scalars.
        writers: the two parts of a writer's gradient (`measures.writer_split`), by block and branch, as this process's
            loss has them.
    """

    def __init__(self, network: Any, attention_samples: int = 2) -> None:
        self.network, self.attention_samples = network, attention_samples
        self.sums: dict[Key, Tensor] = {}
        self.writers: dict[Key, Tensor] = {}
        self._handles: list[Any] = []
        self._blocks: list[Any] = []

    def attach(self, cheap: Iterable[int], full: Iterable[int] = ()) -> None:
        """Begin to watch these blocks: ρ, token cosine and writers, or everything."""
        self.detach()
        self.sums, self.writers = {}, {}
        everything = set(full)
        for number in sorted(everything.union(cheap)):
            block = self.network.blocks[number]
            block.watched = True
            self._blocks.append(block)
            self._hook(block, self._after_block(number, number in everything))
            for branch, (writer, residual) in WRITERS.items():
                self._hook(block.get_submodule(writer), self._after_writer(number, branch, number in everything))
                if number in everything:
                    hook = self._before_merge(number, branch)
                    self._handles.append(block.get_submodule(residual).register_forward_pre_hook(hook))
            if number in everything:
                self._hook(block.attention.qkv, self._after_qkv(number, block.attention))

    def detach(self) -> None:
        """Leave the network as it was; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.watched = False
        self._handles, self._blocks = [], []

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _add(self, block: int, **values: Tensor) -> None:
        for name, value in values.items():
            key = (block, name)
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    # What follows makes hooks. Each calls `Tap.apply` in the forward pass and measures in the backward pass.

    def _after_block(self, number: int, full: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
            segments = inputs[3]

            def record(grad: Tensor, x: Tensor) -> None:
                self._add(number, rho=measures.rho(x), token_cosine=measures.token_cosine(x))
                if full:
                    image, context = x.split(segments, dim=1)
                    self._add(number, rho_image=measures.rho(image), rho_context=measures.rho(context))

            return Tap.apply(out, record, out)

        return hook

    def _after_writer(self, number: int, branch: str, full: bool) -> Callable[..., Any]:
        def record(delta: Tensor, y: Tensor) -> None:
            for part, matrix in zip(("mean", "ctr"), measures.writer_split(y, delta), strict=True):
                key = (number, f"g_{part}_{branch}")
                self.writers[key] = self.writers[key] + matrix if key in self.writers else matrix
            if full:
                found = measures.amplification(y, delta)
                self._add(number, **{f"amplification_{branch}": found.factor, f"alignment_{branch}": found.alignment})

        return lambda module, inputs, out: Tap.apply(out, record, inputs[0])

    def _before_merge(self, number: int, branch: str) -> Callable[..., Any]:
        def record(grad: Tensor, update: Tensor, x: Tensor) -> None:
            ratios = {"var_gain": measures.var_gain(update, x), "tr_ratio": measures.tr_ratio(update, x)}
            self._add(number, **{f"{name}_{branch}": value for name, value in ratios.items()})

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, update, segments = inputs
            return x, Tap.apply(update, record, update, x), segments

        return hook

    def _after_qkv(self, number: int, attention: Any) -> Callable[..., Any]:
        def record(grad: Tensor, qkv: Tensor) -> None:
            q, k, v = attention.heads(qkv[: self.attention_samples], *self.network.rope_tables)
            a = measures.attention_matrix(q, k)
            diversity = measures.row_diversity(a)
            self._add(number, mu_eff=measures.mu_eff(a), retention=measures.retention(a, v), row_diversity=diversity)

        return lambda module, inputs, out: Tap.apply(out, record, out)

    def read(self, micro_batches: int) -> dict[int, dict[str, float]]:
        """What was measured, by block: means over micro-batches and processes; a collective call if there are several.

        Args:
            micro_batches: backward passes since `attach`.
        """
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        keys = [*self.sums, *self.writers]
        norms = []
        for matrix in self.writers.values():  # one at a time: of all blocks together they are as large as the gradient
            if world > 1:
                dist.all_reduce(matrix)
            norms.append(torch.linalg.matrix_norm(matrix) / world)
        numbers = torch.stack([value / micro_batches for value in self.sums.values()] + norms).double()
        if world > 1:  # norms are the same everywhere already
            dist.all_reduce(numbers)
            numbers /= world
        table: dict[int, dict[str, float]] = {}
        for (block, name), number in zip(keys, numbers.tolist(), strict=True):
            table.setdefault(block, {})[name] = number
        return table
