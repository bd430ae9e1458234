"""The accuracy of bf16 by depth: errors of output, loss and gradients against float32, and the cost of a step.

The reference is the same network, whose weights are all bf16 numbers, computed in float32. So the errors are those of
the arithmetic alone, not of rounding the weights.
"""

import copy
import os
import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import PositiveFloat, PositiveInt
from rich.table import Column, Table
from torch import Tensor, nn

from mvsplit.benchmarks.common import RoundsConfig, save_figures
from mvsplit.evaluation.generation import best_device
from mvsplit.evaluation.inputs import data_of, validating_module
from mvsplit.flow.objective import velocity_loss
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.layers import standard_std
from mvsplit.models.recompute import saved_bytes
from mvsplit.models.residuals import MVSplit
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.config import build
from mvsplit.utils.console import info, print_table, show_table
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Stream, normal
from mvsplit.utils.run_dirs import find_checkpoint

WAYS = {
    "bf16 weights, trunk=float32": (torch.bfloat16, "float32"),
    "bf16 weights, trunk=compute": (torch.bfloat16, "compute"),
    "autocast, trunk=float32": (torch.float32, "float32"),
    "autocast, trunk=compute": (torch.float32, "compute"),
}
"""Type of the weights and `model.trunk`. ZeRO-3 and FSDP2 compute with bf16 weights, DDP with autocast."""
REFERENCE = "float32"


@dataclass
class PrecisionLimits:
    output: PositiveFloat
    loss: PositiveFloat
    qkv: PositiveFloat


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_precision.yaml`."""

    ckpt_path: str | None  # type: ignore[assignment]
    weights: Literal["ema", "raw"]
    data: dict[str, Any] | None
    depths: Annotated[list[PositiveInt], Len(1)]
    width: PositiveInt
    num_heads: PositiveInt
    batch_size: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    limits: PrecisionLimits

    @staticmethod
    def check(width: int, num_heads: int, device: str) -> None:
        """Raise `ValueError` for sizes that do not fit together, or a missing GPU."""
        try:
            DiT.check([8, 8], 2, width, num_heads, False)
        except ValueError as error:
            raise UserError(str(error).replace("model.", "")) from None
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = cuda: this machine has no usable GPU; use auto or cpu")


class ComparedNetwork:
    """A float32 network whose weights are bf16 numbers, and its inputs: the arguments of `velocity_loss`."""

    def __init__(self, network: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> None:
        self.network = network.bfloat16().float().to(device)
        self.inputs = tuple(tensor.to(device) for tensor in inputs)


def fresh(depth: int, config: dict[str, Any], device: torch.device) -> ComparedNetwork:
    """A network at initialisation with nonzero writers, β = 1/√depth, in the shapes of digits, on noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        context = partial(ClassTokens, num_classes=10)
        residual = partial(MVSplit, writer_init="standard")
        network = DiT([8, 8], 1, 2, depth, config["width"], config["num_heads"], context, residual)
        nn.init.normal_(network.final_proj.weight, std=standard_std(config["width"]))  # zeros would hide all errors
    index = torch.arange(config["batch_size"])
    x0, x1 = (normal(config["seed"], stream, index, (1, 8, 8)) for stream in (Stream.VAL_NOISE, Stream.SAMPLE_NOISE))
    t = (index + 0.5) / len(index)
    return ComparedNetwork(network, (x0, x1, t, index % 10), device)


def trained(path: Path, config: dict[str, Any], device: torch.device) -> tuple[str, ComparedNetwork]:
    """The network of a checkpoint on samples of its own validation set, and its name in the table."""
    saved = SavedRun(path, config["weights"])
    if not isinstance(saved.network, DiT):
        raise UserError(f"ckpt_path = {path}: contains a {type(saved.network).__name__}; must be a DiT")
    module, data = validating_module(saved), build(data_of(saved, config["data"], config["paths"]["log_dir"]))
    data.prepare_data()
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    batch = {name: value[: config["batch_size"]] for name, value in batch.items()}
    name = f"{saved.config['model']['depth']}, trained for {saved.step} steps"
    return name, ComparedNetwork(saved.network, module.validation_inputs(batch), device)


class Candidate:
    """A network computed in one way, and the result of a forward and backward pass that is not timed.

    Attributes:
        output, gradients: float32, on the CPU.
        kept: bytes that autograd holds for the backward pass, without weights.
        trunk: bytes of the trunk between two blocks, which activation checkpointing keeps for each group of blocks.
    """

    def __init__(self, case: ComparedNetwork, way: str) -> None:
        dtype, trunk = WAYS.get(way, (torch.float32, "float32"))
        network: Any = copy.deepcopy(case.network)
        network.trunk = trunk
        for block in network.blocks:
            block.compiled = False
        self.network = network.to(dtype)
        self.inputs, self.device = case.inputs, case.inputs[0].device
        self.autocast = way.startswith("autocast")
        seen: list[Any] = []
        hooks = (
            self.network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].nbytes)),
            self.network.register_forward_hook(lambda module, inputs, out: seen.append(out.detach().float().cpu())),
        )
        # Weights are passed as existing tensors: as parameters of the module they would be looked up for each tensor.
        loss, self.kept = saved_bytes(self._loss, nn.Identity(), list(self.network.parameters()))
        for hook in hooks:
            hook.remove()
        loss.backward()
        named = self.network.named_parameters()
        self.gradients = {name: p.grad.float().cpu() for name, p in named if p.grad is not None}
        self.loss, self.trunk, self.output = float(loss.detach()), seen[0], seen[1]

    def _loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return velocity_loss(self.network, *self.inputs).mean()

    def seconds(self) -> float:
        """The duration of a forward and backward pass."""
        self.network.zero_grad()
        self._synchronise()
        begun = time.perf_counter()
        self._loss().backward()
        self._synchronise()
        return time.perf_counter() - begun

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gradient_error(self, exact: "Candidate", suffix: str = "") -> float:
        """The relative error of the gradients of all weights with this end of their names, as one vector."""
        names = [name for name in self.gradients if name.endswith(suffix)]
        ours, theirs = (torch.cat([c.gradients[name].flatten() for name in names]) for c in (self, exact))
        return relative(ours, theirs)


def compare(case: ComparedNetwork, rounds: int) -> dict[str, dict[str, float]]:
    """Per way of computing: relative errors of output, loss, gradients of W_qkv and of all weights; cost of a step."""
    candidates = {way: Candidate(case, way) for way in (REFERENCE, *WAYS)}
    seconds: dict[str, list[float]] = {way: [] for way in candidates}
    for _ in range(rounds):  # in turns: other load on the machine affects all of them
        for way, candidate in candidates.items():
            seconds[way].append(candidate.seconds())
    exact = candidates[REFERENCE]
    return {
        way: {
            "output": relative(candidate.output, exact.output),
            "loss": abs(candidate.loss - exact.loss) / abs(exact.loss),
            "qkv": candidate.gradient_error(exact, "qkv.weight"),
            "gradients": candidate.gradient_error(exact),
            "step_s": statistics.median(seconds[way]),
            "kept_mib": candidate.kept / 2**20,
            "trunk_mib": candidate.trunk / 2**20,
        }
        for way, candidate in candidates.items()
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Measure, print and save all figures (`bench_precision.json`)."""
    device = best_device() if config["device"] == "auto" else torch.device(config["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "device": name, "torch": torch.__version__}
    result: dict[str, Any] = {"machine": machine, "networks": {}}
    if config["ckpt_path"] is not None:  # first, because it may be missing or damaged
        path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
        name, case = trained(path, config, device)
    for depth in config["depths"]:
        info(f"{depth} blocks, fresh")
        result["networks"][f"{depth}, fresh"] = compare(fresh(depth, config, device), config["rounds"])
    if config["ckpt_path"] is not None:
        info(f"{name}: {path}")
        result["networks"][name] = compare(case, config["rounds"])
    result["holds"] = check_limits(result["networks"], config["limits"])
    show(result)
    save_figures(result, output_dir / "bench_precision.json")
    return result


def check_limits(networks: dict[str, dict[str, dict[str, float]]], limits: dict[str, float]) -> dict[str, bool]:
    """For each network, whether both ways with a float32 trunk stay within the limits."""
    return {
        name: all(rows[way][key] <= limit for way in WAYS if "=float32" in way for key, limit in limits.items())
        for name, rows in networks.items()
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    names = ("blocks", "computed with", "output", "loss", "W_qkv grad", "all grad", "step s", "kept MiB", "trunk KiB")
    columns = [Column(name, justify="left" if name == "computed with" else "right") for name in names]
    title = f"Relative errors against float32 ({result['machine']['device']})"
    table = Table(*columns, title=title, title_justify="left")
    for name, rows in result["networks"].items():
        for way, row in rows.items():
            keys = ("output", "loss", "qkv", "gradients")
            shown = ["–" if way == REFERENCE else f"{100 * row[key]:.2f} %" for key in keys]
            cost = (f"{row['step_s']:.3f}", f"{row['kept_mib']:.1f}", f"{1024 * row['trunk_mib']:.0f}")
            table.add_row(name if way == REFERENCE else "", way, *shown, *cost)
        table.add_section()
    print_table(table)
    holds = {name: "yes" if held else "NO" for name, held in result["holds"].items()}
    show_table("trunk=float32 within the limits", holds)
