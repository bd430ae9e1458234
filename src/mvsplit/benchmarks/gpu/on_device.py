"""Measurements on a device, each in its own process: `python -m mvsplit.benchmarks.gpu.on_device FUNCTION JSON OUT`.

A function takes plain keyword arguments; a case's function returns its checks and figures.
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import functools
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from mvsplit.flow.objective import Flow, velocity_loss
from mvsplit.models.attention import Attention, rope_table
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.residuals import MVSplit
from mvsplit.stability.measures import mu_eff

SIDE, CHANNELS, GIB, RANKS, GROUP = 16, 4, 2**30, 8, 8
"""Side and channels of latents; bytes of a GiB; ranks of FSDP2, and blocks that it gathers at once."""
MU_EFF_MS = 20.0
SHARE_LIMIT, PEAK_LIMIT = 1.02, 1.25
"""What a rank may hold, and its peak while building, as multiples of the network's size over the number of ranks; the
peak may also include two groups of whole blocks."""


def machine(cpu: bool) -> dict[str, Any]:
    """A description of this machine. cpu: ignore its GPU."""
    about: dict[str, Any] = {"kind": "cpu", "name": "cpu", "torch": torch.__version__, "system": platform.platform()}
    if not cpu and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        about |= {"kind": "cuda", "name": gpu.name, "gib": gpu.total_memory / GIB, "gpus": torch.cuda.device_count()}
        about |= {"capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda}
    return about


def make_network(depth: int, width: int, num_heads: int, device: str, seed: int = 0) -> DiT:
    """A network of 256 + 4 tokens whose last layer is not zero."""
    torch.manual_seed(seed)
    context = functools.partial(ClassTokens, num_classes=10)
    with torch.device(device):
        network = DiT([SIDE, SIDE], CHANNELS, 1, depth, width, num_heads, context,
                      functools.partial(MVSplit, writer_init="standard"))  # fmt: skip
        torch.nn.init.normal_(network.final_proj.weight, std=width**-0.5)
    return network


def _ms(function: Callable[[], Any]) -> float:
    """The mean time of a call, in milliseconds; the timer warms up and waits for a GPU."""
    return 1000 * Timer("function()", globals={"function": function}).timeit(10).mean


def host_syncs(device: str) -> dict[str, Any]:
    """Whether a training step, or drawing noise and times, waits for the device."""
    on = "meta" if device == "cpu" else device  # where reading a value is an error
    network = make_network(4, 64, 4, on)
    with torch.device(on):
        (x0, x1), t, position = torch.randn(2, 4, CHANNELS, SIDE, SIDE), torch.full((4,), 0.3), torch.arange(4)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = velocity_loss(network, x0, x1, t, position).mean()
        loss.backward()

    figures = {"network": _first_wait(step, on), "draw": _first_wait(lambda: Flow().draw(0, position, x0), on)}
    return {"checks": {"network_does_not_wait": not figures["network"]}, "figures": figures}


def _first_wait(work: Callable[[], object], device: str) -> str:
    """Where a function first waits for the device; empty if it does not."""
    try:
        if device == "cuda":
            work()  # lazy initialisation
            work()
            torch.cuda.set_sync_debug_mode("error")
        work()
    except RuntimeError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{Path(place.filename).name}:{place.lineno}: {str(error).splitlines()[0][:80]}"
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


def attention(device: str, width: int = 1024, num_heads: int = 8) -> dict[str, Any]:
    """Which attention kernel runs, and its time, at the paper's sizes."""
    with torch.device(device):
        layer = Attention(width, num_heads)
        x = torch.randn(64 if device == "cuda" else 2, SIDE**2 + 4, width, requires_grad=True)
    cos, sin = (table.to(device) for table in rope_table(SIDE, SIDE, width // num_heads, 10000.0, 4))

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            layer(x, cos, sin).sum().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    operators = " ".join(event.key for event in trace.key_averages() if "_scaled_dot_product_" in event.key)
    fused = any(name in operators for name in ("flash", "efficient", "cudnn"))
    return {"checks": {"fused": fused}, "figures": {"ran": operators, "ms": _ms(step)}}


def spectral_norm(device: str) -> dict[str, Any]:
    """`mu_eff` of (2, 8, 260, 260): its time, its relative error against singular values, its result for a NaN."""
    torch.manual_seed(0)
    a = torch.softmax(2 * torch.randn(2, 8, 260, 260), dim=-1)
    centred = a.double() - a.double().mean(-2, keepdim=True)
    exact = torch.linalg.matrix_norm(centred - centred.mean(-1, keepdim=True), ord=2).mean().item()
    a = a.to(device)
    ms, error = _ms(lambda: mu_eff(a)), abs(float(mu_eff(a)) - exact) / exact
    a[0, 0, 3, 5] = torch.nan
    checks = {"nan_gives_nan": bool(mu_eff(a).isnan()), "right": error < 0.01}
    return {
        "checks": checks | ({"fast": ms <= MU_EFF_MS} if device == "cuda" else {}),
        "figures": {"ms": ms, "error": error},
    }


def fsdp_share(device: str, seed: int, depth: int, width: int, num_heads: int) -> dict[str, Any]:
    """A rank's share of the parameters under FSDP2, and the peak and duration of building it.

    The network is built as the first of several ranks of PyTorch's `fake` process group, whose collectives do nothing.
    """
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mvsplit.training.local_state import local
    from mvsplit.training.strategies import FSDP2

    class StandaloneFSDP2(FSDP2):
        """The strategy without a trainer."""

        root_device = torch.device(device)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    strategy = StandaloneFSDP2(GROUP)
    strategy._device_mesh = init_device_mesh(device, (RANKS, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    strategy.policy = FSDP2.bf16_mixed
    began = time.perf_counter()
    with strategy.model_sharded_context():
        network = make_network(depth, width, num_heads, device, seed)
    strategy.shard(network)
    torch.get_device_module(device).synchronize()
    figures = {"build_s": time.perf_counter() - began}
    total, block = (
        sum(p.numel() * p.element_size() for p in m.parameters()) / GIB for m in (network, network.blocks[0])
    )
    held = sum(local(p.data).untyped_storage().nbytes() for p in network.parameters()) / GIB
    figures |= {"network_gib": total, "held_gib": held, "expected_gib": total / RANKS, "group_gib": GROUP * block}
    checks = {"a_share": held <= SHARE_LIMIT * total / RANKS}
    if device == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        checks["never_whole"] = figures["peak_gib"] <= PEAK_LIMIT * total / RANKS + 2 * GROUP * block
    dist.destroy_process_group()
    return {"checks": checks, "figures": figures}


def make_latents(folder: str, shape: list[int], seed: int) -> None:
    """Write a set of random latents."""
    from mvsplit.benchmarks import synthetic_sets

    synthetic_sets.write_set(Path(folder), synthetic_sets.latents(256, shape, False, seed), 256, 128)


if __name__ == "__main__":
    name, arguments, out = sys.argv[1:]
    Path(out).write_text(json.dumps(globals()[name](**json.loads(arguments)), indent=1))
