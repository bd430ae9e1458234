"""What the section `tests` does on a device, each function in a process of its own (see `child.py`).

Shapes: B batch, T tokens, D width, H heads, E head dimension.
"""

import functools
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.flow.objective import Flow, velocity_loss
from mvsplit.models.attention import Attention
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.residuals import MVSplit
from mvsplit.models.rope import rope_table
from mvsplit.stability.measures import mu_eff

CLASSES, SIDE, CHANNELS = 10, 16, 4
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def make_network(depth: int, width: int, num_heads: int, device: str, seed: int = 0) -> DiT:
    """A network of 256 + 4 tokens whose last layer is not zero."""
    torch.manual_seed(seed)
    context = functools.partial(ClassTokens, num_classes=CLASSES)
    residual = functools.partial(MVSplit, writer_init="standard")
    with torch.device(device):
        network = DiT([SIDE, SIDE], CHANNELS, 1, depth, width, num_heads, context, residual)
        torch.nn.init.normal_(network.final_proj.weight, std=width**-0.5)
    return network


def _inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, x1, t and classes."""
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, batch, CHANNELS, SIDE, SIDE, generator=generator).to(device)
    return x0, x1, torch.full((batch,), 0.3, device=device), (torch.arange(batch) % CLASSES).to(device)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _ms(function: Callable[[], Any], device: str, times: int = 10) -> float:
    """The median time of a call."""
    found = []
    for number in range(times + 2):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        if number >= 2:
            found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


# ------------------------------------------------------------------------ waiting


class _HostReads(TorchDispatchMode):
    """Counts values that Python reads from tensors; on a GPU each waits for everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def host_syncs(device: str) -> dict[str, Any]:
    """How often the host waits for the device, by part, and on a GPU where.

    Returns:
        `network`: in forward pass, loss and backward pass. `draw`: in drawing noise and times. Without a GPU only the
        values that Python reads are seen, not copies.
    """
    network = make_network(4, 64, 4, device)
    x0, x1, t, condition = _inputs(4, device)
    position = torch.arange(4, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = velocity_loss(network, x0, x1, t, condition).mean()
        loss.backward()

    found: dict[str, Any] = {"blocks": 4, "sites": []}
    for name, work in {"network": step, "draw": lambda: Flow().draw(0, position, x0)}.items():
        for _ in range(2):  # lazy set-up and the allocator's first requests
            work()
        _wait(device)
        if device == "cuda":
            found[name], sites = _waits(work)
            found["sites"] += sites
        else:
            with _HostReads() as reads:
                work()
            found[name] = reads.count
    return found


def _waits(work: Callable[[], object]) -> tuple[int, list[str]]:
    """How often some work waits, and from where it was called. Any waiting is an error first: nothing escapes that."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
            return 0, []
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sites = Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in told if "synchroniz" in str(w.message))
    return max(1, sites.total()), [f"{site} × {count}" for site, count in sites.most_common(5)]


# ---------------------------------------------------------------------- attention


def attention(device: str, batch_size: int, width: int = 1024, num_heads: int = 8) -> dict[str, Any]:
    """Which attention kernel ran, and what each takes forward and backward.

    Returns:
        `ran`: flash, efficient, cudnn or math, or an empty name if none is known. `kernels`: names of the GPU's
        kernels. `<backend>_ms`: forward and backward, or why it does not work.
    """
    with torch.device(device):
        layer = Attention(width, num_heads)
        cos, sin = rope_table(SIDE, SIDE, width // num_heads, 10000.0, 4)
        x = torch.randn(batch_size, SIDE**2 + 4, width, requires_grad=True)
    cos, sin = cos.to(device), sin.to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            layer(x, cos, sin).sum().backward()

    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as trace:
        step()
        _wait(device)
    names = [event.key for event in trace.key_averages()]
    operators = [name for name in names if "_scaled_dot_product_" in name]
    kernels = [n for n in names if not n.startswith("aten::") and any(w in n for w in ("flash", "fmha", "sdpa"))]
    ran = next((backend for backend in BACKENDS if any(backend in name for name in operators)), "")
    found: dict[str, Any] = {"ran": ran, "kernels": [name[:80] for name in kernels]}
    for name, backend in BACKENDS.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # why a kernel cannot run, in many lines
                found[f"{name}_ms"] = _ms(step, device)
        except RuntimeError as error:
            found[f"{name}_ms"] = str(error).splitlines()[0][:80]
    return found


# ------------------------------------------------------------------------- mu_eff


def spectral_norm(device: str) -> dict[str, Any]:
    """`mu_eff` of (2, 8, 260, 260): its time, its relative error against singular values, what it makes of a NaN."""
    torch.manual_seed(0)
    a = torch.softmax(2 * torch.randn(2, 8, 260, 260), dim=-1)
    centred = a.double() - a.double().mean(-2, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    exact = float(torch.linalg.matrix_norm(centred, ord=2).mean())
    a = a.to(device)
    found: dict[str, Any] = {"ms": _ms(lambda: mu_eff(a), device, times=5)}
    found["error"] = abs(float(mu_eff(a)) - exact) / exact
    a[0, 0, 3, 5] = torch.nan
    try:
        found["nan"] = f"{float(mu_eff(a)):g}"
    except RuntimeError as error:
        found["nan"] = " ".join(str(error).split())[:80]
    return found
