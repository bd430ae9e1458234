"""What samples cost: seconds and memory by depth at equal width, and the metrics of trained networks by seconds.

Networks with random weights show what depth costs (`sampling_by_depth.py`), trained ones what the quality of fewer
steps, another solver or a guidance interval is (`sampling_quality.py`).
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Len
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from rich.table import Column, Table

from mvsplit.benchmarks.common import RoundsConfig, check_device, save_figures
from mvsplit.benchmarks.cost_figure import save_tradeoff
from mvsplit.benchmarks.sampling_by_depth import (
    WAYS,
    check_network,
    clock_name,
    cost_by_depth,
    fresh_networks,
    memory_by_depth,
    time_calls,
)
from mvsplit.benchmarks.sampling_quality import TrainedNetworks, in_words, sampler_node, show_quality
from mvsplit.evaluation.generation import best_device
from mvsplit.utils.config import check_tree
from mvsplit.utils.console import info, print_table, show_table
from mvsplit.utils.errors import UserError


@dataclass
class SamplingLimits:
    linear: PositiveFloat
    memory: PositiveFloat


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_sampling.yaml`."""

    device: Literal["auto", "cpu", "cuda"]
    threads: PositiveInt
    precision: Literal["float32", "bfloat16"]
    depths: Annotated[list[PositiveInt], Len(3)]
    reference_depth: PositiveInt
    width: PositiveInt
    num_heads: PositiveInt
    image_shape: Annotated[list[PositiveInt], Len(3, 3)]
    patch_size: PositiveInt
    batch_size: PositiveInt
    cfg_scale: NonNegativeFloat
    steps: PositiveInt
    timed_blocks: PositiveInt
    limits: SamplingLimits
    runs: list[str] | None
    weights: Literal["ema", "raw"]
    data: dict[str, Any] | None
    features: dict[str, Any] | None
    reference: str | None
    num_samples: Annotated[int, Ge(2)]
    draw_batch: PositiveInt
    equal_fid: Annotated[float, Ge(1)]
    samplers: Annotated[dict[str, dict[str, Any]], Len(1)]


def check_values(config: dict[str, Any]) -> None:
    """Check what the types of `Config` cannot.

    Raises:
        UserError: for values that do not fit together, a wrong key of a sampler, or a missing GPU.
    """
    check_network(config)
    depths = config["depths"]
    if len(set(depths)) < len(depths):
        raise UserError(f"depths = {depths}: must differ from each other")
    if config["reference_depth"] not in depths:
        raise UserError(f"reference_depth = {config['reference_depth']}: must be one of depths = {depths}")
    if config["cfg_scale"] == 1:
        raise UserError("cfg_scale = 1: must differ from 1, which is no guidance")
    check_device(config["device"])
    for name, keys in config["samplers"].items():
        try:
            check_tree(f"samplers.{name}", sampler_node(keys))
        except ValueError as error:  # `Sampler.check` does not know the name
            raise UserError(str(error).replace("sampler.", f"samplers.{name}.", 1)) from None


def check_limits(result: dict[str, Any], limits: dict[str, float]) -> dict[str, bool]:
    """Whether cost is linear in depth in both ways, and activations do not grow with it."""
    first, *_, last = result["memory"].values()
    return {
        "linear": all(result["cost"][way]["deviation"] <= limits["linear"] for way in WAYS),
        "memory": all(last[f"{way}_kib"] <= (1 + limits["memory"]) * first[f"{way}_kib"] for way in WAYS),
    }


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Measure, print and save all figures (`bench_sampling.json`, `quality_by_cost.png`).

    Raises:
        UserError: if a run cannot be loaded, or has other data than the first.
    """
    torch.set_num_threads(config["threads"])
    device = best_device() if config["device"] == "auto" else torch.device(config["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "device": name, "torch": torch.__version__}
    trained = TrainedNetworks.load(config, device)  # first, because they may be missing or damaged
    keys = ("width", "num_heads", "image_shape", "patch_size", "batch_size", "cfg_scale", "steps", "precision")
    result: dict[str, Any] = {
        "machine": machine | {"threads": config["threads"], "clock": clock_name(device)},
        "network": {key: config[key] for key in keys},
    }
    info(f"cost at {', '.join(map(str, sorted(config['depths'])))} blocks, width {config['width']}, on {name}")
    networks = fresh_networks(config, device)
    seconds = time_calls(networks, config)
    result["rounds"] = {way: {str(d): s for d, s in by_depth.items()} for way, by_depth in seconds.items()}
    result["cost"] = {
        way: cost_by_depth({depth: min(s) for depth, s in by_depth.items()}, config)
        for way, by_depth in seconds.items()
    }
    result["memory"] = memory_by_depth(networks, config)
    result["holds"] = check_limits(result, config["limits"])
    del networks
    show(result, config)
    result["quality"] = quality(trained, config, output_dir)
    result["statement"] = [
        *statement(result, config),
        *in_words(result["quality"], (*depth_ratio(result), config["reference_depth"]), config),
    ]
    for line in result["statement"]:
        info(line)
    save_figures(result, output_dir / "bench_sampling.json")
    return result


def quality(trained: TrainedNetworks | None, config: dict[str, Any], output_dir: Path) -> dict[str, Any] | None:
    """Metrics and seconds per sample of the trained networks, shown and drawn; None without any."""
    if trained is None:
        return None
    found = trained.measure(config)
    show_quality(found)
    save_tradeoff(output_dir / "quality_by_cost.png", found)
    info(f"quality by cost  {output_dir / 'quality_by_cost.png'}")
    return found


def depth_ratio(result: dict[str, Any]) -> tuple[int, float]:
    """The deepest network's depth, and the cost of its guided samples over that at the reference depth."""
    depth, row = list(result["cost"]["guided"]["depths"].items())[-1]
    return int(depth), row["ratio"]


def statement(result: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What depth costs, in plain words."""
    guided, unguided = (result["cost"][way] for way in WAYS)
    (depth, ratio), reference = depth_ratio(result), config["reference_depth"]
    plain = unguided["depths"][str(depth)]
    twice = guided["depths"][str(depth)]["call_s"] / plain["call_s"]
    kib = result["memory"][str(depth)]["guided_kib"] / result["memory"][str(reference)]["guided_kib"]
    return [
        f"{depth} blocks take {ratio:.1f} times as long as {reference} ({depth / reference:.1f} times the blocks),"
        f" without guidance {plain['ratio']:.1f}; guidance takes {twice:.2f} times as long",
        f"the cost deviates from a line in depth by at most {100 * guided['deviation']:.1f} %, without guidance"
        f" {100 * unguided['deviation']:.1f} %; activations per sample are {kib:.2f} times those at {reference} blocks",
    ]


def show(result: dict[str, Any], config: dict[str, Any]) -> None:
    """Print the tables of part one."""
    reference = config["reference_depth"]
    names = ("blocks", "guidance", "s per sample", f"ratio to {reference}", "ms per block", "from a line",
             "activations, KiB per sample", "weights, MiB")  # fmt: skip
    title = f"Samples of {config['steps']} Euler steps, {config['batch_size']} at once, width {config['width']}"
    table = Table(*(Column(name, justify="right") for name in names), title=title, title_justify="left")
    for way in WAYS:
        for depth, row in result["cost"][way]["depths"].items():
            memory = result["memory"][depth]
            table.add_row(
                depth, f"{config['cfg_scale']:g}" if way == "guided" else "–", f"{row['sample_s']:.4g}",
                f"{row['ratio']:.3g}", f"{row['block_ms']:.3f}", f"{100 * row['deviation']:+.1f} %",
                f"{memory[f'{way}_kib']:.1f}", f"{memory['weights_mib']:.1f}",
            )  # fmt: skip
        table.add_section()
    print_table(table)
    show_table("Within the limits", {name: "yes" if held else "NO" for name, held in result["holds"].items()})
