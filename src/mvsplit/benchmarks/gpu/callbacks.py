"""Callbacks with which `run.py` disturbs a training or looks into it, at known steps."""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mvsplit.benchmarks.gpu.overlap import side_work
from mvsplit.callbacks.collapse_guard import CollapseGuard
from mvsplit.callbacks.stability import StabilityProbe
from mvsplit.callbacks.throughput import host_peak_gib
from mvsplit.training.shards import held_weights

WARM_UP = 2
"""Steps that are not measured."""
FINE: dict[str, float] = {"loss": 0.6, "grad_norm": 0.5, "g_mean": 0.01, "g_ctr": 0.025, "q_grad": 0.005, "rho": 0.6,
                          "token_cosine": 0.26}  # fmt: skip
ILL = FINE | {"grad_norm": 9.0, "g_mean": 1.6, "g_ctr": 0.0125, "rho": 5.9, "token_cosine": 0.97}


class Spoil(Callback):
    """Puts a NaN into the first rank's gradient, not into its loss, once `step` optimiser steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._handle: Any = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            network: Any = module.network
            self._handle = network.register_forward_hook(lambda module, inputs, output: self._spoil(output))

    def _spoil(self, output: Tensor) -> None:
        self._handle.remove()  # once
        output.register_hook(lambda gradient: gradient * math.nan)


class Forged(StabilityProbe):
    """A probe whose values are made up: healthy ones, but those of a collapse at two steps.

    At the first the guard skips, at the second it rolls back. `forged_rank_<rank>.json` tells what came of it: by step,
    a checksum of the weights that this process holds, before and after.

    Args:
        folder, and the rest: of the probe. skip, back: the two steps.
    """

    def __init__(self, folder: str, skip: int, back: int, **probe: Any) -> None:
        super().__init__(folder, **(probe | {"every": 0}))
        self.ill, self.back, self.out = (skip, back), back, Path(folder).parent
        self.sums: dict[str, dict[int, float]] = {"before": {}, "after": {}}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._guard = next(c for c in trainer.callbacks if isinstance(c, CollapseGuard))
        for step in range(-100, 0):  # a healthy past
            wave = 1 + 0.05 * math.sin(step)
            self._guard.watch.observe(step, {name: value * wave for name, value in FINE.items()})

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        self._guard.action = "rollback" if trainer.global_step > self.ill[0] else "skip"
        if trainer.global_step == self.ill[0] + 1:
            self._guard.watch.went_back()  # a recovery takes longer
        self.sums["before"][trainer.global_step] = checksum(module)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, module, optimizer)
        self.values = dict(ILL if trainer.global_step in self.ill else FINE)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        self.sums["after"][trainer.global_step - 1] = checksum(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_end(trainer, module)
        (self.out / f"forged_rank_{trainer.global_rank}.json").write_text(json.dumps(self.sums))


def checksum(module: LightningModule) -> float:
    """Of the weights this process holds: unchanged if they are, to the bit, and hardly ever otherwise."""
    parts = [part.values for part in held_weights(module).values() if part.values.is_floating_point()]
    return sum(float((values.double().cpu() * (number + 1)).sum()) for number, values in enumerate(parts))


class Measure(Callback):
    """Writes `measured.json`: what a step takes of time and memory, and whether other streams work beside the network.

    `step_ms`; `host_ms`: until forward and backward pass are under way, the device waited for before and not after;
    `allocated_gib`, `reserved_gib`: most of it; `host_gib`: of the process; `side`: see `overlap.side_work`.

    Args:
        folder: where it goes. Put it last: before it, others have done what they do at the start of a step.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "measured.json"
        self.steps: list[float] = []
        self.host: list[float] = []
        self._trace: Any = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.on_gpu = trainer.strategy.root_device.type == "cuda"
        self._begun = time.perf_counter()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._wait()
        self._build_s = time.perf_counter() - self._begun

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._wait()
        if trainer.global_step == trainer.max_steps - 1:  # the last is not timed but traced
            self._peaks = self._memory()
            activity = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
            self._trace = profile(activities=[activity])
            self._trace.__enter__()
        self._start = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.host.append(time.perf_counter() - self._start)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._wait()
        self.steps.append(time.perf_counter() - self._start)
        if self._trace is not None:
            self._trace.__exit__(None, None, None)

    def _memory(self) -> dict[str, float]:
        if not self.on_gpu:
            return {"host_gib": host_peak_gib()}
        peaks = {"allocated_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
        return {name: peak / 2**30 for name, peak in peaks.items()} | {"host_gib": host_peak_gib()}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        found: dict[str, Any] = {"build_s": self._build_s}
        found["step_ms"] = 1000 * statistics.median(self.steps[WARM_UP:-1])
        found["host_ms"] = 1000 * statistics.median(self.host[WARM_UP:-1])
        file = self.path.with_name("trace.json")
        self._trace.export_chrome_trace(str(file))
        found["side"] = side_work(json.loads(file.read_text())["traceEvents"])
        file.unlink()
        self.path.write_text(json.dumps(found | self._peaks, indent=1))
