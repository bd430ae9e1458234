"""What bf16 costs in exactness, by depth: errors of output, loss and gradients against float32, and what a step takes.

The reference is the same network with the same weights, all of them bf16 numbers, computed in float32. So the errors
are those of the arithmetic alone, not of rounding the weights.
"""

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import PositiveFloat, PositiveInt
from rich.table import Table
from torch import Tensor, nn

from mvsplit.benchmarks.common import RoundsConfig
from mvsplit.evaluation.pictures import best_device
from mvsplit.flow.objective import velocity_loss
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.layers import standard_std
from mvsplit.models.recompute import saved_bytes
from mvsplit.models.residuals import MVSplit
from mvsplit.training.checkpoints import SavedRun
from mvsplit.training.run import TrainConfig
from mvsplit.utils.config import build
from mvsplit.utils.console import print_table, say, show_table
from mvsplit.utils.rng import Stream, normal
from mvsplit.utils.runs import find_checkpoint

WAYS = {
    "bf16 weights, trunk=float32": (torch.bfloat16, "float32"),
    "bf16 weights, trunk=compute": (torch.bfloat16, "compute"),
    "autocast, trunk=float32": (torch.float32, "float32"),
    "autocast, trunk=compute": (torch.float32, "compute"),
}
"""Type of the weights, and `model.trunk`. ZeRO-3 and FSDP2 compute with bf16 weights, DDP under autocast."""
REFERENCE = "float32"


@dataclass
class LimitsConfig:
    output: PositiveFloat
    loss: PositiveFloat
    qkv: PositiveFloat


@dataclass
class Config(RoundsConfig):
    """Top-level keys of `bench_precision.yaml`."""

    ckpt_path: str | None  # type: ignore[assignment]
    weights: Literal["ema", "raw"]
    depths: Annotated[list[PositiveInt], Len(1)]
    width: PositiveInt
    num_heads: PositiveInt
    batch_size: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    limits: LimitsConfig

    @staticmethod
    def check(width: int, num_heads: int, device: str) -> None:
        """Raise `ValueError` for what does not fit together or is not there."""
        DiT.check([8, 8], 2, width, num_heads, False)
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = cuda: this machine has no usable GPU; allowed are auto and cpu")


@dataclass(frozen=True)
class Case:
    """A network in float32 whose weights are bf16 numbers, and what it is given: the arguments of `velocity_loss`."""

    network: nn.Module
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, network: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> "Case":
        return cls(network.bfloat16().float().to(device), tuple(tensor.to(device) for tensor in inputs))


def fresh(depth: int, config: dict[str, Any], device: torch.device) -> Case:
    """A network at initialisation whose writers are not zero, on noise: β = 1/√depth, digits' shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        context = partial(ClassTokens, num_classes=10)
        residual = partial(MVSplit, writer_init="standard")
        network = DiT([8, 8], 1, 2, depth, config["width"], config["num_heads"], context, residual)
        nn.init.normal_(network.final_proj.weight, std=standard_std(config["width"]))  # of zeros nothing can be told
    index = torch.arange(config["batch_size"])
    x0, x1 = (normal(config["seed"], stream, index, (1, 8, 8)) for stream in (Stream.VAL_NOISE, Stream.SAMPLE_NOISE))
    t = (index + 0.5) / len(index)
    return Case.of(network, (x0, x1, t, index % 10), device)


def trained(path: Path, config: dict[str, Any], device: torch.device) -> tuple[str, Case]:
    """The network of a checkpoint, on samples of its own validation set; and what it is called in the table."""
    saved = SavedRun(path, config["weights"], TrainConfig)
    module, data = build(saved.config["module"]), build(saved.config["data"])
    data.prepare_data()
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    batch = {name: value[: config["batch_size"]] for name, value in batch.items()}
    name = f"{saved.config['model']['depth']}, trained for {saved.step} steps"
    return name, Case.of(saved.network, module.validation_inputs(batch), device)


# ----------------------------------------------------------------- measurement


@dataclass
class Result:
    """Of one forward and backward pass.

    Attributes:
        output, gradients: float32, on the CPU. kept: bytes that autograd holds for the backward pass, weights left out.
        trunk: bytes of the trunk between two blocks, what activation checkpointing keeps of a group of blocks.
        seconds: of further passes.
    """

    output: Tensor
    loss: float
    gradients: dict[str, Tensor]
    kept: int
    trunk: int
    seconds: list[float]


class Contestant:
    """A network computed in one way."""

    def __init__(self, case: Case, way: str) -> None:
        dtype, trunk = WAYS.get(way, (torch.float32, "float32"))
        network: Any = copy.deepcopy(case.network)
        network.trunk = trunk
        for block in network.blocks:
            block.compiled = None  # the copied block's would still run the original's weights
        self.network = network.to(dtype)
        self.inputs = case.inputs
        self.device = case.inputs[0].device
        self.autocast = way.startswith("autocast")

    def _loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return velocity_loss(self.network, *self.inputs).mean()

    def seconds(self) -> float:
        """Of a forward and a backward pass."""
        self.network.zero_grad()
        self._synchronise()
        begun = time.perf_counter()
        self._loss().backward()
        self._synchronise()
        return time.perf_counter() - begun

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def result(self) -> Result:
        """Everything but the seconds; one pass, which is no measurement of time."""
        output: list[Tensor] = []
        trunk: list[int] = []
        hooks = (
            self.network.register_forward_hook(lambda module, inputs, out: output.append(out.detach().float().cpu())),
            self.network.blocks[0].register_forward_pre_hook(lambda module, inputs: trunk.append(inputs[0].nbytes)),
        )
        # The weights as tensors that are there anyway: as the module's they would be asked for anew by each tensor.
        loss, kept = saved_bytes(self._loss, nn.Identity(), list(self.network.parameters()))
        for hook in hooks:
            hook.remove()
        loss.backward()
        named = self.network.named_parameters()
        gradients = {name: p.grad.float().cpu() for name, p in named if p.grad is not None}
        return Result(output[0], float(loss.detach()), gradients, kept, trunk[0], [])


def compare(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """By way: relative errors of output, loss, gradients of W_qkv and of all weights, and what a step costs."""
    contestants = {way: Contestant(case, way) for way in (REFERENCE, *WAYS)}
    results = {way: contestant.result() for way, contestant in contestants.items()}
    for _ in range(rounds):  # in turns: other load on the machine meets all of them
        for way, contestant in contestants.items():
            results[way].seconds.append(contestant.seconds())
    exact = results[REFERENCE]
    rows = {}
    for way, result in results.items():
        rows[way] = {
            "output": relative(result.output, exact.output),
            "loss": abs(result.loss - exact.loss) / abs(exact.loss),
            "qkv": _gradient_error(result, exact, lambda name: name.endswith("qkv.weight")),
            "gradients": _gradient_error(result, exact, lambda name: True),
            "step_s": statistics.median(result.seconds),
            "kept_mib": result.kept / 2**20,
            "trunk_mib": result.trunk / 2**20,
        }
    return rows


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def _gradient_error(result: Result, exact: Result, chosen: Callable[[str], bool]) -> float:
    """Of all chosen gradients as one vector."""
    both = [
        torch.cat([gradient.flatten() for name, gradient in found.gradients.items() if chosen(name)])
        for found in (result, exact)
    ]
    return relative(*both)


# --------------------------------------------------------------------- results


def measure(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """All figures, shown, written to `bench_precision.json` and returned."""
    device = best_device() if config["device"] == "auto" else torch.device(config["device"])
    result: dict[str, Any] = {"machine": _machine(device), "networks": {}}
    if config["ckpt_path"] is not None:  # first, since it may be missing or damaged
        path = find_checkpoint(config["ckpt_path"], config["paths"]["log_dir"])
        name, case = trained(path, config, device)
    for depth in config["depths"]:
        say(f"{depth} blocks, fresh")
        result["networks"][f"{depth}, fresh"] = compare(fresh(depth, config, device), config["rounds"])
    if config["ckpt_path"] is not None:
        say(f"{name}: {path}")
        result["networks"][name] = compare(case, config["rounds"])
    result["holds"] = verdicts(result["networks"], config["limits"])
    path = output_dir / "bench_precision.json"
    path.write_text(json.dumps(result, indent=1))
    show(result, path)
    return result


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"cpus": os.cpu_count(), "system": platform.platform(), "device": name, "torch": torch.__version__}


def verdicts(networks: dict[str, dict[str, dict[str, float]]], limits: dict[str, float]) -> dict[str, bool]:
    """By network, whether both ways with a float32 trunk stay within the limits."""
    return {
        name: all(rows[way][key] <= limit for way in WAYS if "=float32" in way for key, limit in limits.items())
        for name, rows in networks.items()
    }


def show(result: dict[str, Any], path: Path) -> None:
    """The tables."""
    table = Table(title=f"Relative errors against float32 ({result['machine']['device']})", title_justify="left")
    columns = ("blocks", "computed with", "output", "loss", "W_qkv grad", "all grad", "step s", "kept MiB", "trunk KiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "computed with" else "right")
    for name, rows in result["networks"].items():
        for way, row in rows.items():
            errors = [f"{100 * row[key]:.2f} %" for key in ("output", "loss", "qkv", "gradients")]
            shown = ["–"] * 4 if way == REFERENCE else errors
            cost = (f"{row['step_s']:.3f}", f"{row['kept_mib']:.1f}", f"{1024 * row['trunk_mib']:.0f}")
            table.add_row(name if way == REFERENCE else "", way, *shown, *cost)
        table.add_section()
    print_table(table)
    held = {name: "yes" if held else "NO" for name, held in result["holds"].items()}
    show_table("trunk=float32 within the limits", held)
    say(f"figures          {path}")
