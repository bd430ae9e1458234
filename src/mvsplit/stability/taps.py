"""Measures blocks of a network while it trains, in the backward pass.

Shapes: B batch, T tokens, D width, K inputs of a writer.

Hooks on a block's parts put a `Tap` behind their outputs: an identity whose backward pass sees the output's gradient
and the tensors that belong to it. So a measure is taken once per backward pass, also under activation checkpointing,
where forward passes run twice: a tap's saved tensors are dropped and recomputed like all others.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mvsplit.stability import measures
from mvsplit.utils.errors import UserError

BRANCHES = ("attention", "ffn")
Key = tuple[int, str]
"""Number of a block, name of a quantity."""
Heads = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class Watchable(Protocol):
    """What a network may offer for measurement. Each part is optional; without it, its measures are left out.

    Attributes:
        blocks: a sequence of modules that are called once in a forward pass. If they return tokens (B, T, D), this
            gives ρ, token cosine and the probe of t. Sharded strategies also gather weights block by block.
        segments: numbers of image and context tokens; of the context any number may be there. Gives ρ of each segment.
            Without it, all are image tokens.
    """

    blocks: Sequence[nn.Module]
    segments: tuple[int, int]

    def writers_of(self, block: Any) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """By branch (`attention`, `ffn`) its last matrix, and the module that merges its update or None.

        The matrix maps (B, T, K) to (B, T, D), and gives G_mean, G_ctr and amplification. The merging module is called
        with the trunk, the update and any others, all by position, and gives VarGain and TR ratio.
        """

    def heads_of(self, block: Any) -> tuple[nn.Linear, Heads]:
        """The matrix whose rows are all queries, all keys, all values, and a function of its output.

        Each has a third of the rows. The function returns q, k and v, (B, H, T, E) each, as softmax(q kᵀ / √E) v takes
        them. Gives Q and K gradients, μ_eff, retention, row diversity.
        """


def blocks_of(network: Any) -> list[nn.Module]:
    """A network's blocks; none if it has no sequence of modules of that name."""
    blocks = getattr(network, "blocks", None)
    listed = isinstance(blocks, Sequence | nn.ModuleList | nn.Sequential) and all(
        isinstance(block, nn.Module) for block in blocks
    )
    return list(blocks) if blocks is not None and listed else []


def kind_of(network: Any) -> str:
    """The name of a network's class, without the prefix that FSDP2 adds."""
    return type(network).__name__.removeprefix("FSDP")


def image_tokens(network: Any, tokens: Tensor) -> Tensor:
    """The image tokens among a block's tokens (B, T, D)."""
    segments = getattr(network, "segments", None)
    return tokens if segments is None else tokens[:, : segments[0]]


class Tap(torch.autograd.Function):
    """Returns `out`. The backward pass calls `record(gradient of out, *tensors)`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, record: Callable[..., None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.record = record
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: each access would recompute
        ctx.record(grad, *tensors)
        return grad, None, *[None] * len(tensors)


class Taps:
    """Measures of chosen blocks, over the micro-batches of a step.

    Args:
        network: may offer any part of `Watchable`. A block with `watched` set has hooks on its parts, which compiled
            code would not call.
        attention_samples: samples of a micro-batch whose attention matrices are measured.

    Attributes:
        sums: sums of scalars over the calls of a block. There is one call per micro-batch, more if it is used again.
        counts: number of these calls.
        writers: the two parts of a writer's gradient (`measures.writer_split`), by block and branch, of this process's
            loss.
        matrices: of queries, keys and values, by block.
    """

    def __init__(self, network: Any, attention_samples: int = 2) -> None:
        self.network, self.attention_samples = network, attention_samples
        self.blocks = blocks_of(network)
        self.sums: dict[Key, Tensor] = {}
        self.counts: dict[Key, int] = {}
        self.writers: dict[Key, Tensor] = {}
        self.matrices: dict[int, nn.Linear] = {}
        self._handles: list[Any] = []
        self._watched: list[Any] = []

    def attach(self, cheap: Iterable[int], full: Iterable[int] = ()) -> None:
        """Begin to measure: ρ, token cosine and writers of the blocks in `cheap`, everything of those in `full`."""
        self.detach()
        self.sums, self.counts, self.writers, self.matrices = {}, {}, {}, {}
        everything = set(full)
        for number in sorted(everything.union(cheap)):
            block: Any = self.blocks[number]
            block.watched = True
            self._watched.append(block)
            self._hook(block, self._after_block(number, number in everything))
            for branch, (writer, residual) in writers_of(self.network, block).items():
                self._hook(writer, self._after_writer(number, branch, number in everything))
                if number in everything and residual is not None:
                    self._handles.append(residual.register_forward_pre_hook(self._before_merge(number, branch)))
            if hasattr(self.network, "heads_of"):
                self.matrices[number], heads = self.network.heads_of(block)
                if number in everything:
                    self._hook(self.matrices[number], self._after_qkv(number, heads))

    def detach(self) -> None:
        """Remove the hooks. The measurements stay."""
        for handle in self._handles:
            handle.remove()
        for block in self._watched:
            block.watched = False
        self._handles, self._watched = [], []

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _add(self, block: int, **values: Tensor) -> None:
        for name, value in values.items():
            key = (block, name)
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    # The methods below return hooks. Each calls `Tap.apply` in the forward pass and measures in the backward pass.

    def _after_block(self, number: int, full: bool) -> Callable[..., Any]:
        segments = getattr(self.network, "segments", None)

        def record(grad: Tensor, x: Tensor) -> None:
            self._add(number, rho=measures.rho(x), token_cosine=measures.token_cosine(x))
            if full and segments is not None:
                image, context = x.tensor_split([segments[0]], dim=1)
                self._add(number, rho_image=measures.rho(image), rho_context=measures.rho(context))

        return lambda module, inputs, out: Tap.apply(out, record, out) if are_tokens(out) else None

    def _after_writer(self, number: int, branch: str, full: bool) -> Callable[..., Any]:
        def record(delta: Tensor, y: Tensor) -> None:
            for part, matrix in zip(("mean", "ctr"), measures.writer_split(y, delta), strict=True):
                key = (number, f"g_{part}_{branch}")
                self.writers[key] = self.writers[key] + matrix if key in self.writers else matrix
            if full:
                found = measures.amplification(y, delta)
                self._add(number, **{f"{name}_{branch}": value for name, value in found.items()})

        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor | None:
            return Tap.apply(out, record, inputs[0]) if are_tokens(out) and are_tokens(*inputs[:1]) else None

        return hook

    def _before_merge(self, number: int, branch: str) -> Callable[..., Any]:
        def record(grad: Tensor, update: Tensor, x: Tensor) -> None:
            ratios = {"var_gain": measures.var_gain(update, x), "tr_ratio": measures.tr_ratio(update, x)}
            self._add(number, **{f"{name}_{branch}": value for name, value in ratios.items()})

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if len(inputs) < 2 or not are_tokens(*inputs[:2]):
                return inputs
            x, update, *more = inputs
            return x, Tap.apply(update, record, update, x), *more

        return hook

    def _after_qkv(self, number: int, heads: Heads) -> Callable[..., Any]:
        def record(grad: Tensor, qkv: Tensor) -> None:
            few = qkv[: self.attention_samples]
            # The results of `heads` are several times as large as its argument.
            for samples in few.split(len(few) if few.numel() <= measures.AT_ONCE else 1):
                self._add(number, **measures.attention(*heads(samples)))

        return lambda module, inputs, out: Tap.apply(out, record, out)

    def read(self) -> dict[int, dict[str, float]]:
        """The measurements by block: means over calls and processes. A collective call."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        keys = [*self.sums, *self.writers]
        if not keys:
            return {}
        norms = []
        for matrix in self.writers.values():  # one at a time: those of all blocks are as large as the gradient
            if world > 1:
                dist.all_reduce(matrix)
            norms.append(torch.linalg.matrix_norm(matrix) / world)
        numbers = torch.stack([value / self.counts[key] for key, value in self.sums.items()] + norms).double()
        if world > 1:  # norms are already the same on all ranks
            dist.all_reduce(numbers)
            numbers /= world
        table: dict[int, dict[str, float]] = {}
        for (block, name), number in zip(keys, numbers.tolist(), strict=True):
            table.setdefault(block, {})[name] = number
        return table


def writers_of(network: Any, block: nn.Module) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """A block's writers; empty if the network does not offer them.

    Raises:
        UserError: for a branch of another name.
    """
    writers: dict[str, Any] = network.writers_of(block) if hasattr(network, "writers_of") else {}
    for branch in writers:
        if branch not in BRANCHES:
            name = type(network).__name__
            raise UserError(f"{name}.writers_of: branch {branch!r}; allowed: {', '.join(BRANCHES)}")
    return writers


def are_tokens(*found: Any) -> bool:
    """Whether there is at least one argument, and all are floating-point tensors (B, T, D)."""
    return bool(found) and all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 for x in found)
