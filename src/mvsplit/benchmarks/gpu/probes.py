"""Callbacks with which `train_run.py` disturbs or inspects a training run at known steps."""

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

from mvsplit.benchmarks.gpu.overlap_cases import side_work
from mvsplit.callbacks.collapse_guard import CollapseGuard
from mvsplit.callbacks.monitor import StepMonitor
from mvsplit.callbacks.stability_probe import StepRow
from mvsplit.callbacks.throughput import host_peak_gib
from mvsplit.training.local_state import local_weights

WARM_UP = 2
"""Steps that are not measured."""
FINE: dict[str, float] = {"loss": 0.6, "grad_norm": 0.5, "g_mean": 0.01, "g_ctr": 0.025, "q_grad": 0.005, "rho": 0.6,
                          "token_cosine": 0.26}  # fmt: skip
ILL = FINE | {"grad_norm": 9.0, "g_mean": 1.6, "g_ctr": 0.0125, "rho": 5.9, "token_cosine": 0.97}


class Spoil(Callback):
    """Puts a NaN into the first rank's gradient, not into its loss, after `step` optimiser steps."""

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


class Forged(StepMonitor):
    """A monitor whose statistics are made up: healthy ones, but at two steps those of a collapse.

    At the first the guard skips, at the second it rolls back. `forged_rank_<rank>.json` holds the result: by step, a
    checksum of this process's weights before and after it.

    Args:
        skip: the first of the two steps.
        back: the second.
        others: of the monitor.
    """

    def __init__(self, skip: int, back: int, folder: str, guard: CollapseGuard, **others: Any) -> None:
        super().__init__(folder, guard=guard, **(others | {"board": None}))
        self.ill, self.back, self.out = (skip, back), back, Path(folder).parent
        self.sums: dict[str, dict[int, float]] = {"before": {}, "after": {}}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        for step in range(-100, 0):  # a healthy past
            wave = 1 + 0.05 * math.sin(step)
            self.detector.observe(step, {name: value * wave for name, value in FINE.items()})

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        assert self.guard is not None
        self.guard.action = "rollback" if trainer.global_step > self.ill[0] else "skip"
        if trainer.global_step == self.ill[0] + 1:
            self.detector.went_back()  # a recovery takes longer
        self.sums["before"][trainer.global_step] = checksum(module)

    def _record(self, row: StepRow, trainer: Trainer) -> None:
        super()._record(row, trainer)
        row.measures = dict(ILL if row.step in self.ill else FINE)
        row.loss, row.grad_norm = row.measures.pop("loss"), row.measures.pop("grad_norm")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        self.sums["after"][trainer.global_step - 1] = checksum(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_end(trainer, module)
        (self.out / f"forged_rank_{trainer.global_rank}.json").write_text(json.dumps(self.sums))


def checksum(module: LightningModule) -> float:
    """A checksum of this process's weights: equal if they are equal to the bit, and hardly ever otherwise."""
    parts = [part.values for part in local_weights(module).values() if part.values.is_floating_point()]
    return sum(float((values.double().cpu() * (number + 1)).sum()) for number, values in enumerate(parts))


class Measure(Callback):
    """Writes `measured.json`: time and memory of a step, and whether other streams work beside the network.

    - `step_ms`.
    - `host_ms`: from an idle device until forward and backward pass are launched.
    - `allocated_gib`, `reserved_gib`: peaks of the device's memory.
    - `host_gib`: peak of the process's memory.
    - `side`: see `overlap_cases.side_work`.

    It must be the last callback: then the others' work at the start of a step is not measured.

    Args:
        folder: where the file goes.
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
        if trainer.global_step == trainer.max_steps - 1:  # the last step is traced, not timed
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
