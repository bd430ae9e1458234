"""Which operations run as Triton kernels: the config's word, or the faster form on this GPU.

Shapes: B batch, T tokens, D width, H heads, E head dimension (D/H), F feed-forward hidden width.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensor

from mvsplit.kernels.merge_norm import Segments, merge_norm
from mvsplit.kernels.rope_norm import rope_norm
from mvsplit.kernels.swiglu import swiglu

log = logging.getLogger(__name__)

Kernels = Literal["auto", "fused", "plain"]
WIDEST = 8192
"""The most channels of a row that the kernels keep in registers."""
TOKENS = 2**14
"""Tokens that are timed, at most: enough to fill a GPU, little memory."""
STEPS, ROUNDS = 10, 3
TOLERANCE = 0.03
"""Relative difference between fused and plain results; bfloat16 rounds to 0.4 %."""


@dataclass(frozen=True)
class Fused:
    """Operations that are fused."""

    merge_norm: bool = False
    rope_norm: bool = False
    swiglu: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a choice holds for: not the batch size, so that the last batch of a set does not recompile blocks."""

    segments: Segments
    width: int
    num_heads: int
    hidden: int
    trunk: torch.dtype
    branch: torch.dtype


class KernelChoice:
    """Chooses between fused and plain operations.

    Args:
        kernels: `plain`; `fused`; or `auto`: plain on a CPU, on a GPU what is faster, timed at the first batch.
        merges: whether the network's residuals have a fused form.
    """

    def __init__(self, kernels: Kernels, merges: bool = True) -> None:
        self.kernels, self.merges = kernels, merges
        self._chosen: dict[Any, Fused] = {}

    @staticmethod
    def check(kernels: str, width: int) -> None:
        """Raise `ValueError` for what cannot run anywhere, or not with this installation."""
        if kernels != "fused":
            return
        if find_spec("triton") is None:
            raise _unavailable()
        if width > WIDEST:
            raise ValueError(f"model.width = {width}: must be at most {WIDEST} with model.kernels = fused")

    def choose(self, sizes: Sizes, x: Tensor, compile: bool = False) -> Fused:
        """What to fuse for inputs of these sizes.

        Args:
            sizes: of the inputs.
            x: the trunk, for its device and batch size.
            compile: time compiled operations.

        Raises:
            ValueError: for `fused` on a CPU.
        """
        if self.kernels == "plain" or (self.kernels == "auto" and not _can_time(x, sizes)):
            return Fused()
        key = (replace(sizes, segments=sizes.segments[:1]), x.device)  # captions differ in length: not timed for each
        if key not in self._chosen:
            if self.kernels == "fused":
                if not available(x.device):
                    raise _unavailable()
                self._chosen[key] = Fused(merge_norm=self.merges, rope_norm=True, swiglu=True)
                _info("kernels: fused")
            else:
                self._chosen[key] = self._fastest(sizes, x, compile)
        return self._chosen[key]

    def _fastest(self, sizes: Sizes, x: Tensor, compile: bool) -> Fused:
        ratios = time_ratios(sizes, len(x), x.device, compile)
        if not self.merges:
            del ratios["merge_norm"]
        fused = {name: ratio < 1 for name, ratio in ratios.items()}
        parts = [f"{name} {'fused' if fused[name] else 'plain'} ({r:.2f} × plain's time)" for name, r in ratios.items()]
        _info(f"kernels: {', '.join(parts)} for {sum(sizes.segments)} tokens of width {sizes.width}")
        return Fused(**fused)


def available(device: torch.device) -> bool:
    """Whether fused operations run on a device: a GPU with Triton, or any device in Triton's interpreter."""
    if find_spec("triton") is None:
        return False
    from mvsplit.kernels.triton_ops import INTERPRETED

    return INTERPRETED or device.type == "cuda"


def _can_time(x: Tensor, sizes: Sizes) -> bool:
    """Not on a CPU, while tracing, or in a CUDA graph."""
    unreal = isinstance(x, FakeTensor) or torch.compiler.is_compiling()
    if unreal or x.device.type != "cuda" or sizes.width > WIDEST or not available(x.device):
        return False
    return not torch.cuda.is_current_stream_capturing()


def _unavailable() -> ValueError:
    return ValueError("model.kernels = fused: needs a CUDA GPU and Triton; use auto or plain")


def _info(message: str) -> None:
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        log.info(message)


def time_ratios(sizes: Sizes, batch: int, device: torch.device, compile: bool) -> dict[str, float]:
    """By operation: time of a fused forward and backward pass, divided by that of the plain one.

    Infinite, with a warning, if the fused one fails or gives other results: a faulty driver must not stop a run.

    Args:
        batch: B; less is timed where it has many tokens.
        compile: time compiled operations.
    """
    from torch._dynamo import config  # here: importing it takes a second

    ratios = {}
    batch = max(1, min(batch, TOKENS // max(1, sum(sizes.segments))))
    # Compiled once for each operation and choice: more often than Dynamo expects of one function.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        config.patch(recompile_limit=256),
    ):
        for name, (function, inputs) in operations(sizes, batch, device).items():
            plain, expected = _timed(lambda *t, f=function: f(*t, False), inputs, compile)
            try:
                fused, found = _timed(lambda *t, f=function: f(*t, True), inputs, compile)
            except Exception as error:
                log.warning(f"kernels: {name} plain, since its fused form fails: {str(error).strip().splitlines()[:1]}")
                ratios[name] = float("inf")
                continue
            difference = float((found - expected).norm() / expected.norm())
            ratios[name] = fused / plain if difference < TOLERANCE else float("inf")
            if not difference < TOLERANCE:
                log.warning(f"kernels: {name} plain, since its fused form is off by {difference:.1%}")
    return ratios


Operation = Callable[..., tuple[Tensor, ...]]


def operations(sizes: Sizes, batch: int, device: torch.device) -> dict[str, tuple[Operation, list[Tensor]]]:
    """Each operation as a function of its tensors and `fused`, and random tensors."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    tokens, head_dim = sum(sizes.segments), sizes.width // sizes.num_heads

    def normal(*shape: int, dtype: torch.dtype, trained: bool = True) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(trained)

    gains = [normal(sizes.width, dtype=torch.float32) for _ in range(2)]
    angle = normal(tokens, head_dim // 2, dtype=torch.float32, trained=False)
    cos, sin = torch.cat([angle.cos()] * 2, dim=1), torch.cat([angle.sin(), -angle.sin()], dim=1)
    x = normal(batch, tokens, sizes.width, dtype=sizes.trunk)
    update = normal(batch, tokens, sizes.width, dtype=sizes.branch)
    return {
        "merge_norm": (
            lambda x, update, alpha, beta, fused: (merge_norm(x, update, alpha, beta, sizes.segments, 1e-6, fused),),
            [x, update, *gains],
        ),
        "rope_norm": (
            lambda qkv, fused: rope_norm(qkv, cos, sin, 1e-6, sizes.num_heads, fused),
            [normal(batch, tokens, 3 * sizes.width, dtype=sizes.branch)],
        ),
        "swiglu": (
            lambda packed, fused: (swiglu(packed, fused),),
            [normal(batch, tokens, 2 * sizes.hidden, dtype=sizes.branch)],
        ),
    }


def _timed(function: Operation, inputs: list[Tensor], compile: bool) -> tuple[float, Tensor]:
    """Seconds of a forward and backward pass, and all results and gradients in one vector."""
    run = torch.compile(function, fullgraph=True) if compile else function
    with torch.no_grad():
        out = function(*inputs)
        grads = [torch.sin(3 * t.float()).to(t.dtype) for t in out]  # not orthogonal to the results, nor parallel

    def step() -> list[Tensor]:
        results = run(*inputs)
        return [*results, *torch.autograd.grad(results, inputs, grads)]

    synchronize = torch.get_device_module(inputs[0].device).synchronize
    found = torch.cat([t.detach().float().flatten() for _ in range(3) for t in step()][-len(out) - len(inputs) :])
    seconds = []
    for _ in range(ROUNDS):
        synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds), found
