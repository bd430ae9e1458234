"""All that happens between a step's backward pass and its optimiser step, in one order: see `StepMonitor`."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mvsplit.callbacks.collapse_guard import CollapseGuard, RunControl
from mvsplit.callbacks.stability_board import StabilityBoard
from mvsplit.callbacks.stability_probe import StabilityProbe, StepRow
from mvsplit.stability.detector import CollapseDetector
from mvsplit.stability.tables import CHEAP, DEPTH, TableWriter
from mvsplit.stability.thresholds import Thresholds
from mvsplit.training.local_state import on_disk
from mvsplit.training.strategies import takes_step
from mvsplit.utils.console import info
from mvsplit.utils.errors import AgreedError


class StepMonitor(Callback):
    """Checks and records each step before the optimiser takes it. In this order, by one `StepRow`:

    1. loss and gradient norm, logged as `train/grad_norm`;
    2. are both finite? If not, all ranks stop. Weights, optimiser and average stay those of the last good step;
    3. the probe adds its measures, and the row goes to `trace.csv` and `depth.csv`;
    4. the detector classifies the row;
    5. the guard acts on what the detector has found;
    6. the board shows the full measurement in the log.

    With `optim.in_backward` the step is taken before all of this; there is no probe, and the guard can only warn.

    Args:
        folder: of the tables, `guard.jsonl` and reports.
        probe: of the network's blocks; null: the row holds loss and gradient norm only.
        guard: null: there is no detector either.
        thresholds: of the detector; null: the defaults.
        board: null: the log holds no curve or image by depth.

    Raises:
        AgreedError: at a step that is not finite, and where the guard ends the run.
    """

    def __init__(
        self,
        folder: str,
        probe: StabilityProbe | None = None,
        guard: CollapseGuard | None = None,
        thresholds: Thresholds | None = None,
        board: StabilityBoard | None = None,
    ) -> None:
        self.folder, self.probe, self.guard, self.board = Path(folder), probe, guard, board
        self.detector = CollapseDetector(thresholds)
        self._loss = self._own_loss = torch.zeros(())  # of this process: of the micro-batches so far, of the step
        self._batch: dict[str, Tensor] = {}
        self._tables: dict[str, TableWriter] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._loss = torch.zeros((), device=trainer.strategy.root_device)
        if self.probe:
            self.probe.start(module.network)
        if self.guard:
            self.guard.start(trainer.global_step, on_disk(module))
        if not trainer.is_global_zero:
            return
        if self.guard and not self.probe:
            info("callbacks.monitor.probe is off: the guard sees only loss and gradient norm")
        for name, columns in (("trace", CHEAP), ("depth", ("block", *DEPTH)))[: 2 if self.probe else 1]:
            self._tables[name] = TableWriter(self.folder / f"{name}.csv", ("step", *columns), trainer.global_step)

    def _is_full(self, trainer: Trainer) -> bool:
        return self.probe is not None and self.probe.is_full(trainer.global_step, trainer.max_steps)

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch
        if self.guard and self.guard.lr_scale != 1.0:
            RunControl(trainer, module, self.folder).scale_lr(self.guard.lr_scale)
        if self.probe:
            self.probe.attach(self._is_full(trainer))

    def on_before_backward(self, trainer: Trainer, module: Any, loss: Tensor) -> None:
        self._loss += loss.detach()  # Lightning has divided it by the number of micro-batches

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Optimizer) -> None:
        if not takes_step(trainer):
            return
        row = self._begin(trainer, module)
        self._require_finite(row, trainer, module)
        if self.probe:
            self.probe.measure(row, module)
        self._record(row, trainer)
        if self.guard:
            row.events = self.detector.observe(row.step, row.values)
            self.guard.act(row, self.detector, RunControl(trainer, module, self.folder))
        if self.board and self.probe and row.by_depth and trainer.is_global_zero:
            self.board.show(row, self.probe.every, trainer.max_steps, self.folder / "depth.csv", trainer.loggers)

    def _begin(self, trainer: Trainer, module: Any) -> StepRow:
        norm = float(module.gradient_norm())
        module.log("train/grad_norm", norm)
        self._own_loss, self._loss = self._loss, torch.zeros_like(self._loss)
        loss = trainer.strategy.reduce(self._own_loss.clone(), reduce_op="mean")  # which may work in place
        return StepRow(trainer.global_step, float(loss), norm)

    def _require_finite(self, row: StepRow, trainer: Trainer, module: Any) -> None:
        if math.isfinite(row.loss) and math.isfinite(row.grad_norm):
            return
        norms = module.gradient_norms(lambda name: ".".join(p for p in name.split(".") if not p.isdigit()))
        report = {
            "step": row.step,
            "rank": trainer.global_rank,
            "loss": str(self._own_loss.item()),
            "samples": self._batch["index"].tolist(),
            "positions": self._batch["position"].tolist(),
            "gradient_norms": {family: str(norm) for family, norm in norms.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"nonfinite_step_{row.step}_rank_{trainer.global_rank}.json"
        path.write_text(json.dumps(report, indent=2))
        taken = "its step was taken in the backward pass" if module.optim.in_backward else "the step was not taken"
        raise AgreedError(
            f"the loss or its gradient is not finite at step {row.step} (loss {row.loss:g}); {taken}; see {path}"
        )

    def _record(self, row: StepRow, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        if self.probe and self.probe.missing:
            info(f"callbacks.monitor: {self.probe.missing}")
            self.probe.missing = None
        self._tables["trace"].append([{"step": row.step} | row.values])
        if row.by_depth:
            self._tables["depth"].append({"step": row.step, "block": b} | v for b, v in row.by_depth.items())
        if (row.step + 1) % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({f"stability/{name}": value for name, value in row.measures.items()}, row.step)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables = {}

    def state_dict(self) -> dict[str, Any]:
        return {"detector": self.detector.state_dict(), "guard": self.guard.state_dict()} if self.guard else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.guard and "guard" in state:
            self.detector.load_state_dict(state["detector"])
            self.guard.load_state_dict(state["guard"])
