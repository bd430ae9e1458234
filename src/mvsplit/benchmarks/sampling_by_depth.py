"""Seconds and memory of a sample by depth at equal width, of networks with random weights.

All networks share their blocks: one of n blocks is the first n of the deepest. They are timed in turns, and each timing
runs about the same number of blocks, so that other load on the machine affects all depths alike.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvsplit.benchmarks.model_stats import LiveBytes
from mvsplit.flow.sampler import Sampler, sample_noise
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.layers import standard_std
from mvsplit.models.residuals import MVSplit
from mvsplit.utils.console import progress
from mvsplit.utils.errors import UserError

NUM_CLASSES = 10
WAYS = ("guided", "unguided")


class FreshNetwork:
    """The first blocks of a network with random weights, and what it samples from.

    Args:
        deepest: a network of at least `depth` blocks, which is not changed.
        depth: blocks.
        labels: classes of the samples, (B,).
        noise: (B, C, height, width).
    """

    def __init__(self, deepest: DiT, depth: int, labels: Tensor, noise: Tensor) -> None:
        self.network = first_blocks(deepest, depth)
        self.depth, self.labels, self.noise = depth, labels, noise

    def sample(self, cfg_scale: float, steps: int) -> Tensor:
        """(B, C, height, width), by Euler: one call of the network per step, of 2·B samples with guidance."""
        return Sampler("euler", steps, cfg_scale).sample(self.network, self.labels, self.noise)

    def seconds_per_call(self, cfg_scale: float, calls: int) -> float:
        """Mean time of that many consecutive calls."""
        begun = seconds_now(self.noise.device)
        self.sample(cfg_scale, calls)
        return (seconds_now(self.noise.device) - begun) / calls

    @property
    def weights_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.network.parameters())

    def activation_bytes(self, cfg_scale: float) -> int:
        """Additional memory at the peak of two steps.

        On a GPU as its allocator counts it; on a CPU that of all tensors, without what an operation uses inside.
        """
        device = self.noise.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.sample(cfg_scale, 2)
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        existing = (*self.network.parameters(), *self.network.buffers(), self.labels, self.noise)
        with LiveBytes(existing) as live:
            self.sample(cfg_scale, 2)
        return live.peak


def seconds_now(device: torch.device) -> float:
    """A clock to take differences of, read after all work on the device is done.

    On one thread of a CPU it counts processor time, so that other processes do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.thread_time() if clock_name(device) == "processor time" else time.perf_counter()


def fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of five calls, after one that is not counted."""
    times = []
    for _ in range(6):
        begun = seconds_now(device)
        run()
        times.append(seconds_now(device) - begun)
    return min(times[1:])


def clock_name(device: torch.device) -> str:
    """What `seconds_now` counts."""
    return "processor time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall-clock time"


def check_network(config: dict[str, Any]) -> None:
    """Raise `UserError` for sizes that `random_network` cannot have."""
    _, *size = config["image_shape"]
    try:
        DiT.check(size, config["patch_size"], config["width"], config["num_heads"], False)
    except ValueError as error:
        raise UserError(str(error).replace("model.", "")) from None


def random_network(config: dict[str, Any], depth: int, device: torch.device) -> DiT:
    """MV-Split with nonzero writers, β = 1/√depth."""
    channels, *size = config["image_shape"]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(config["seed"])
        context = partial(ClassTokens, num_classes=NUM_CLASSES)
        residual = partial(MVSplit, writer_init="standard")
        width, heads = config["width"], config["num_heads"]
        network = DiT(size, channels, config["patch_size"], depth, width, heads, context, residual).eval()
        nn.init.normal_(network.final_proj.weight, std=standard_std(config["width"]))
    return network.to(getattr(torch, config["precision"]))


def first_blocks(deepest: DiT, depth: int) -> DiT:
    """A network of the first blocks of another, which is not changed."""
    network = copy.copy(deepest)
    network._modules = deepest._modules | {"blocks": deepest.blocks[:depth]}
    return network


def fresh_networks(config: dict[str, Any], device: torch.device) -> list[FreshNetwork]:
    """One per depth, shallowest first; β is that of the deepest."""
    depths = sorted(config["depths"])
    deepest = random_network(config, depths[-1], device)
    index = torch.arange(config["batch_size"], device=device)
    noise = sample_noise(config["seed"], index, config["image_shape"])
    return [FreshNetwork(deepest, depth, index % NUM_CLASSES, noise) for depth in depths]


def time_calls(networks: Sequence[FreshNetwork], config: dict[str, Any]) -> dict[str, dict[int, list[float]]]:
    """Seconds per call in each round: way → depth → rounds."""
    scales = dict(zip(WAYS, (config["cfg_scale"], 1.0), strict=True))
    seconds: dict[str, dict[int, list[float]]] = {way: {one.depth: [] for one in networks} for way in WAYS}
    turns = [(way, one) for one in networks for way in WAYS]
    for way, one in turns:  # the first call allocates, and loads kernels on a GPU
        one.sample(scales[way], 1)
    with progress("timing", config["rounds"] * len(turns)) as advance:
        for number in range(config["rounds"]):
            for way, one in turns if number % 2 == 0 else reversed(turns):
                calls = max(1, config["timed_blocks"] // one.depth)
                seconds[way][one.depth].append(one.seconds_per_call(scales[way], calls))
                advance(1)
    return seconds


@dataclass(frozen=True)
class Line:
    """Seconds per call as constant + per_block · depth."""

    constant: float
    per_block: float

    def at(self, depth: int) -> float:
        return self.constant + self.per_block * depth


def fit_line(seconds: dict[int, float]) -> Line:
    """The line whose relative deviations from these seconds by depth are least in squares.

    The constant, which is the embedding and the head, is at least 0: a negative one would hide that blocks cost more
    in a deeper network.
    """
    y = np.array(list(seconds.values()))
    design = np.stack([1 / y, np.array(list(seconds)) / y], axis=1)
    constant, per_block = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0]
    if constant < 0:
        constant, per_block = 0.0, design[:, 1].sum() / (design[:, 1] ** 2).sum()
    return Line(float(constant), float(per_block))


def cost_by_depth(seconds: dict[int, float], config: dict[str, Any]) -> dict[str, Any]:
    """Summary of the seconds per call by depth.

    Returns:
        `constant_s` and `block_s` of the line; `deviation`, the largest relative deviation from it; `depths`, with
        `call_s`, `sample_s`, `block_ms` (the constant included), `ratio` to the reference depth and `deviation` each.
    """
    line, reference = fit_line(seconds), seconds[config["reference_depth"]]
    rows = {
        str(depth): {
            "call_s": s,
            "sample_s": s * config["steps"] / config["batch_size"],
            "block_ms": 1000 * s / depth,
            "ratio": s / reference,
            "deviation": s / line.at(depth) - 1,
        }
        for depth, s in seconds.items()
    }
    largest = max(abs(row["deviation"]) for row in rows.values())
    return {"constant_s": line.constant, "block_s": line.per_block, "deviation": largest, "depths": rows}


def memory_by_depth(networks: Sequence[FreshNetwork], config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By depth: `weights_mib`, and KiB of activations per sample in both ways."""
    kib = 1024 * config["batch_size"]
    return {
        str(one.depth): {
            "weights_mib": one.weights_bytes / 2**20,
            "guided_kib": one.activation_bytes(config["cfg_scale"]) / kib,
            "unguided_kib": one.activation_bytes(1.0) / kib,
        }
        for one in networks
    }
