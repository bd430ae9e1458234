"""Time of the fused operations, forward and backward, as a share of the bandwidth that a copy reaches in the same run.

Counted is the least traffic of an operation: the merge with its norm reads x and F and writes X'; its backward pass
reads the gradient and X' and writes dX. An operation that moves more has a lower share.
"""

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt
from rich.table import Column, Table
from torch import Tensor

from mvsplit.benchmarks.common import RoundsConfig, check_machine, other_merge, save_figures
from mvsplit.benchmarks.sampling_by_depth import fastest, seconds_now
from mvsplit.evaluation.generation import best_device
from mvsplit.kernels import offline
from mvsplit.kernels.choice import Operation, Sizes, available, operations
from mvsplit.utils.console import info, print_table, progress
from mvsplit.utils.errors import UserError

Dtype = Literal["float32", "bfloat16"]


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_kernels.yaml`."""

    widths: Annotated[list[PositiveInt], Len(1)]
    num_heads: PositiveInt
    segments: Annotated[list[NonNegativeInt], Len(1)]
    batch_size: PositiveInt
    trunk: Dtype
    branch: Dtype
    device: Literal["auto", "cpu", "cuda"]
    compile: bool
    offline: bool
    against: str | None


def check_values(config: dict[str, Any]) -> None:
    """Raise `UserError` for sizes that do not fit together, a missing GPU or compiler, or another merge not allowed."""
    for width in config["widths"]:
        if width % (4 * config["num_heads"]):
            raise UserError(f"widths = {width}: must be divisible by 4 · num_heads = {4 * config['num_heads']}")
    if not sum(config["segments"]):
        raise UserError(f"segments = {config['segments']}: must contain a token")
    check_machine(config, config["compile"])


class Form:
    """One way to compute an operation."""

    def __init__(self, name: str, function: Operation, inputs: list[Tensor]) -> None:
        self.name, self.function, self.inputs = name, function, inputs
        out = function(*inputs)
        self.gradients = [torch.randn_like(tensor) for tensor in out]

    def seconds(self) -> tuple[float, float]:
        """Of the forward and of the backward pass."""
        device = self.inputs[0].device
        begun = seconds_now(device)
        out = self.function(*self.inputs)
        middle = seconds_now(device)
        torch.autograd.grad(out, self.inputs, self.gradients)
        return middle - begun, seconds_now(device) - middle


def least_bytes(operation: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
    """Bytes that must be moved in the forward and in the backward pass; gains are too small to count."""
    large = [tensor for tensor in inputs if tensor.ndim == 3]
    read, written = sum(t.nbytes for t in large), sum(t.nbytes for t in outputs)
    if operation == "merge_norm":
        return read + written, 3 * written
    return read + written, written + 2 * read  # reads the gradient and the input, writes the input's gradient


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes, the best of five."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def forms_of(
    name: str, function: Operation, inputs: list[Tensor], config: dict[str, Any], device: torch.device
) -> list[Form]:
    """Plain, compiled, fused where it runs, and another implementation of the merge."""
    functions: dict[str, Callable[..., Any]] = {"plain": lambda *tensors: function(*tensors, False)}
    if config["compile"]:
        functions["plain, compiled"] = torch.compile(functions["plain"], fullgraph=True)
    if available(device):
        functions["fused"] = lambda *tensors: function(*tensors, True)
    if config["against"] and name == "merge_norm":
        other, segments = other_merge(config["against"]), tuple(config["segments"])
        functions[config["against"]] = lambda *tensors: (other(*tensors, segments, 1e-6),)
    return [Form(form, run, inputs) for form, run in functions.items()]


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Measure, print and save all figures (`bench_kernels.json`)."""
    device = best_device() if config["device"] == "auto" else torch.device(config["device"])
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {
        "machine": {"device": device.type, "cpus": os.cpu_count(), "system": platform.platform()},
        "settings": {k: config[k] for k in ("num_heads", "segments", "batch_size", "trunk", "branch")},
        "copy_gb_s": bandwidth / 1e9,
        "kernels": [row for width in config["widths"] for row in time_width(width, config, device, bandwidth)],
    }
    if config["offline"]:
        types = ((getattr(torch, config["trunk"]), getattr(torch, config["branch"])),)
        result["offline"] = [vars(figure) for figure in offline.figures(config["widths"], types)]
    show(result)
    save_figures(result, output_dir / "bench_kernels.json")
    return result


def time_width(width: int, config: dict[str, Any], device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """The rows of one width: each operation in each form."""
    trunk, branch = (getattr(torch, config[key]) for key in ("trunk", "branch"))
    sizes = Sizes(tuple(config["segments"]), width, config["num_heads"], 3 * width, trunk, branch)
    rows = []
    torch.compiler.reset()  # a form's code may be compiled for few sizes only
    with progress(f"width {width}", 3 * (config["rounds"] + 1)) as advance:
        for name, (function, inputs) in operations(sizes, config["batch_size"], device).items():
            forms = forms_of(name, function, inputs, config, device)
            seconds: dict[str, list[tuple[float, float]]] = {form.name: [] for form in forms}
            for number in range(config["rounds"] + 1):
                for form in forms if number % 2 else reversed(forms):
                    taken = form.seconds()
                    if number:  # the first compiles and allocates
                        seconds[form.name].append(taken)
                advance(1)
            least = least_bytes(name, inputs, forms[0].gradients)
            for form in forms:
                both = list(zip(*seconds[form.name], strict=True))
                ratios = sorted(sum(p) / sum(t) for p, t in zip(seconds["plain"], seconds[form.name], strict=True))
                forward, backward = map(statistics.median, both)
                rows.append(
                    {"operation": name, "width": width, "form": form.name, "forward_s": forward, "backward_s": backward,
                     "forward_share": least[0] / forward / bandwidth, "backward_share": least[1] / backward / bandwidth,
                     "ratio": statistics.median(ratios), "ratios": [ratios[0], ratios[-1]]}
                )  # fmt: skip
    return rows


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    info(f"a copy moves {result['copy_gb_s']:.1f} GB/s on {result['machine']['device']}")
    names = ("operation", "width", "form", "forward ms", "of copy", "backward ms", "of copy", "× plain", "range")
    table = Table(*(Column(name, justify="left" if name in ("operation", "form") else "right") for name in names))
    for row in result["kernels"]:
        table.add_row(
            row["operation"], str(row["width"]), row["form"],
            f"{1e3 * row['forward_s']:.3f}", f"{100 * row['forward_share']:.0f} %",
            f"{1e3 * row['backward_s']:.3f}", f"{100 * row['backward_share']:.0f} %",
            f"{row['ratio']:.2f}", f"{row['ratios'][0]:.2f}–{row['ratios'][1]:.2f}",
        )  # fmt: skip
    print_table(table)
    if "fused" not in {row["form"] for row in result["kernels"]}:
        info("fused kernels need a GPU: not timed here")
    if found := result.get("offline"):
        columns = [
            Column(n, justify="right") for n in ("width", "registers", "spilled bytes", "widest load", "compiling s")
        ]
        table = Table("kernel", "types", *columns, title="Compiled for Hopper (sm_90a)", title_justify="left")
        for f in found:
            numbers = (f["width"], f["registers"], f["spills"], f["widest_load"], f"{f['seconds']:.2f}")
            table.add_row(f["kernel"], f["types"], *map(str, numbers))
        print_table(table)
