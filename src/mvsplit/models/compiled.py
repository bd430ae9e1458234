"""One block compiled for all: in training, validation and sampling.

All blocks share the compiled code, so the time to compile does not depend on the depth (compiling a network of a
thousand blocks as a whole would take over an hour). There is one graph for training, one for training with
recomputation, and one for passes without gradients, which serves all batch sizes except one sample, which has its own.
Where the number of tokens differs between batches, PyTorch compiles the first number, and at the second one once more
for all others; where it does not, all shapes are constants of the graph.

Shapes: B batch, T tokens, D width.
"""

import functools
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

Compile = bool | Literal["auto"]
"""Whether blocks are compiled; `auto`: where there is a compiler and enough to compute, see `compile_if_repaid`."""


class Compilable(nn.Module):
    """Base of blocks: subclasses implement `compute`, the uncompiled `forward`.

    Attributes:
        compiled: whether `forward` runs the compiled code.
        may_fail: run uncompiled, with a warning, if the code cannot be compiled; otherwise that is an error.
        watched: runs uncompiled; the block has hooks on its parts, which compiled code would not call.
        per_sample: how many of `forward`'s arguments after x have a row for each sample of the batch.
    """

    compiled = False
    may_fail = False
    watched = False
    per_sample = 0
    compute: Callable[..., Tensor]

    @property
    def runs_compiled(self) -> bool:
        return self.compiled and not self.watched and type(self) not in _uncompilable

    def worth_compiling(self, x: Tensor, *args: Any) -> bool:
        """Whether these inputs are not so rare that a graph of their own costs more than it saves."""
        return True

    def forward(self, x: Tensor, *args: Any, recompute: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: (B, T, D).
            args: what the blocks share, first the `per_sample` tensors.
            recompute: keep only the inputs for the backward pass; of inputs only that run compiled.

        Returns:
            (B, T, D).
        """
        if not (self.runs_compiled and self.worth_compiling(x, *args)):
            return self.compute(x, *args)
        training = is_grad_enabled()
        if not training:  # the last batch of a set may be smaller
            for tensor in (x, *args[: self.per_sample]):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        kind: Any = type(self)
        try:
            return _compiled(kind, "recomputed" if recompute and training else "trained" if training else "drawn")(
                self, x, *args
            )
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # here: importing it takes seconds

            if not (self.may_fail and isinstance(error, TorchDynamoException)):
                raise
            _uncompilable.add(kind)  # for all blocks: each attempt takes seconds
            log.warning(f"model.compile = auto: blocks run uncompiled ({str(error).strip().splitlines()[0]})")
            return self.compute(x, *args)


_uncompilable: set[type] = set()


@functools.cache
def _compiled(kind: Any, way: Literal["trained", "recomputed", "drawn"]) -> Callable[..., Tensor]:
    """The compiled `compute` of a class of blocks. Raises after eight recompilations, instead of running uncompiled.

    Each way is a function of its own: recompilations are counted, and sizes that differ are noticed, by function.
    """

    def trained(block: Compilable, x: Tensor, *args: Any) -> Tensor:
        return block.compute(x, *args)

    def recomputed(block: Compilable, x: Tensor, *args: Any) -> Tensor:
        # Inside of what is compiled, so that only what the backward pass reads is computed again.
        return checkpoint(block.compute, x, *args, use_reentrant=False)

    def drawn(block: Compilable, x: Tensor, *args: Any) -> Tensor:
        return block.compute(x, *args)

    _expect_no_gpu()
    return torch.compile({"trained": trained, "recomputed": recomputed, "drawn": drawn}[way], fullgraph=True)


def _expect_no_gpu() -> None:
    """PyTorch's compiler warns on a machine with CUDA but without a GPU, where users compile for the CPU on purpose."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def append_blocks(blocks: nn.ModuleList, new: Iterable[Compilable], compile: Compile) -> None:
    """Append blocks one by one: sharded strategies shard each as soon as the network's `blocks` gets it."""
    for block in new:
        block.compiled = compile is True
        blocks.append(block)


def missing_for_compiling() -> str | None:
    """What this machine lacks to compile a block, or None."""
    # Triton compiles its kernel launchers from C, only with $CC if that is set; CPU kernels are C++.
    if torch.cuda.is_available():
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"needs {' or '.join(compilers)}; use false without a compiler"
    header = os.path.join(sysconfig.get_path("include"), "Python.h")  # both include it
    return None if os.path.isfile(header) else f"needs {header} (apt install python3-dev); use false without it"


def check_compiler(compile: Compile) -> None:
    """Raise `ValueError` if blocks are to be compiled on a machine without a compiler."""
    if compile is True and (missing := missing_for_compiling()):
        raise ValueError(f"model.compile = True: {missing}")


def saved_seconds(network: Any, passes: int, batch: int, training: bool) -> float:
    """Estimate of what compiled blocks save in all.

    Per block: 0.4 ms of overhead and 40 ns per value of the trunk in training, a quarter of it without gradients.
    Measured on two CPU cores (`bench.py step`), where the truth is between half and twice of it; of a GPU only the
    overhead counts.

    Args:
        network: with `blocks`.
        passes: forward passes, each with its backward pass in training.
        batch: samples per pass.
    """
    values = 0 if next(network.parameters()).is_cuda else batch * network.num_tokens * network.width
    per_block = 0.4e-3 + 40e-9 * values
    return passes * len(network.blocks) * per_block * (1 if training else 0.25)


COMPILING = 25.0
"""Seconds that compiling a block takes once per machine, on two busy CPU cores: forward and backward."""


def compile_if_repaid(network: Any, passes: int, batch: int, training: bool) -> bool:
    """Compile the blocks of a network with `compile=auto` if that saves more time than it takes.

    The decision depends on sizes, not on a measurement: a run that is repeated or resumed computes the same numbers.

    Args:
        network: any; those without compilable blocks are left alone.
        passes: forward passes that are ahead, with their backward passes in training.
        batch: samples per pass.

    Returns:
        Whether the blocks are compiled now.
    """
    blocks = [block for block in getattr(network, "blocks", ()) if isinstance(block, Compilable)]
    if not blocks or getattr(network, "compile_when", False) != "auto":
        return any(block.compiled for block in blocks)
    saved = saved_seconds(network, passes, batch, training)
    if saved < COMPILING * (1 if training else 0.5) or missing_for_compiling() or not _compiler_works():
        return False
    for block in blocks:
        block.compiled = block.may_fail = True
    log.info(f"compiling one block for all {len(blocks)}: takes {COMPILING:.0f} s at most, saves about {saved:.0f} s")
    return True


@functools.cache
def _compiler_works() -> bool:
    """Whether a small function can be compiled: a compiler may be found and yet be of no use."""
    _expect_no_gpu()
    try:
        torch.compile(lambda x: (x.sin() + 1).cos(), fullgraph=True)(torch.zeros(8))
    except Exception as error:  # whatever a compiler does: `auto` never stops a run
        log.warning(f"model.compile = auto: this machine cannot compile ({str(error).splitlines()[0]})")
        return False
    return True
