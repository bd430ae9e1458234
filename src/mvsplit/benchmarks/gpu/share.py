"""Section `share`: a deep network, built as the first of eight ranks of which the others do not exist."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome

GIB = 2**30
SHARE_LIMIT, PEAK_LIMIT = 1.02, 1.25
"""What a rank may hold, and may have held while building, as a multiple of the whole network over the ranks; the peak
beside two groups of whole blocks."""


@dataclass
class ShareSizes:
    """Of the network and of the group."""

    depth: PositiveInt
    width: PositiveInt
    num_heads: PositiveInt
    ranks: PositiveInt
    blocks_per_group: PositiveInt


def cases(bench: Bench) -> list[Case]:
    return [Case("share", "fsdp", fsdp)]


def fsdp(bench: Bench, place: Path) -> Outcome:
    """A rank's share of the parameters under FSDP2, the peak of building it, and the time that takes."""
    figures = bench.child(place, "share", device=bench.kind, seed=bench.config["seed"], **bench.of("share"))
    checks = {"a_share": figures["held_gib"] <= SHARE_LIMIT * figures["expected_gib"]}
    if bench.kind == "cuda":
        limit = PEAK_LIMIT * figures["expected_gib"] + 2 * figures["group_gib"]
        checks["never_whole"] = figures["peak_gib"] <= limit
    return Outcome(checks, figures)


def share(
    device: str, seed: int, depth: int, width: int, num_heads: int, ranks: int, blocks_per_group: int
) -> dict[str, Any]:
    """Build under FSDP2 on PyTorch's `fake` process group, whose collectives do nothing (see `child.py`)."""
    import torch
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mvsplit.benchmarks.gpu.on_device import make_network
    from mvsplit.training.shards import local
    from mvsplit.training.strategies import FSDP2

    class Lone(FSDP2):
        """The strategy without a trainer."""

        root_device = torch.device(device)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    strategy = Lone(blocks_per_group)
    strategy._device_mesh = init_device_mesh(device, (ranks, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    strategy.policy = FSDP2.bf16_mixed
    began = time.perf_counter()
    with strategy.model_sharded_context():
        network = make_network(depth, width, num_heads, device, seed)
    strategy.shard(network)
    if device == "cuda":
        torch.cuda.synchronize()
    found = {"build_s": time.perf_counter() - began}
    total = sum(p.numel() * p.element_size() for p in network.parameters())
    block = sum(p.numel() * p.element_size() for p in network.blocks[0].parameters())
    found["parameters"] = total // 4
    found["held_gib"] = sum(local(p.data).untyped_storage().nbytes() for p in network.parameters()) / GIB
    found |= {"expected_gib": total / ranks / GIB, "group_gib": block * blocks_per_group / GIB}
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    dist.destroy_process_group()
    return found
