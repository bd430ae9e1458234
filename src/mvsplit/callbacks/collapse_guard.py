"""What happens when the detector finds that the network begins to collapse, before the optimiser takes the step."""

import json
import math
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from annotated_types import Gt, Le
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import NonNegativeInt, PositiveInt
from torch.optim.lr_scheduler import LambdaLR

from mvsplit.callbacks.ema import EMA
from mvsplit.callbacks.stability_probe import StepRow
from mvsplit.stability.detector import CollapseDetector, Event
from mvsplit.training.gradients import drop_gradients
from mvsplit.training.snapshots import Snapshot
from mvsplit.utils.console import info
from mvsplit.utils.errors import AgreedError

ALARMS = ("onset", "dead")
ROWS_IN_REPORT = 50
MAX_SKIPPED = 50
SAVED = ("lr_scale", "rollbacks", "skipped")


class RunControl:
    """What the guard may do to a run, on all ranks alike.

    Args:
        folder: of `guard.jsonl` and of reports.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        self.trainer, self.module, self.folder = trainer, module, folder
        self.averages = next((c.shadow for c in trainer.callbacks if isinstance(c, EMA)), {})

    def any_rank(self, wanted: bool) -> bool:
        return self.trainer.strategy.reduce_boolean_decision(wanted, all=False)

    def snapshot(self, step: int) -> Snapshot:
        return Snapshot(step, self.module, self.trainer.optimizers[0], self.averages)

    def restore(self, snapshot: Snapshot) -> None:
        snapshot.restore(self.module, self.trainer.optimizers[0], self.averages)

    def skip_step(self) -> None:
        """Let the optimiser step that follows change nothing."""
        drop_gradients(self.module)

    def scale_lr(self, scale: float) -> None:
        """Multiply the schedule's learning rate. Call at each step: a resume restores the config's values."""
        scheduler = self.module.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] * scale for group in groups]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)

    def log(self, decision: dict[str, Any]) -> None:
        """Append a decision to `guard.jsonl`, print it, and show it in TensorBoard."""
        if not self.trainer.is_global_zero:
            return
        step, kind, why, action, *_ = decision.values()
        more = (
            f" to step {decision['back_to']}, learning rate × {decision['lr_scale']:g}" if "back_to" in decision else ""
        )
        info(f"guard            step {step}: {kind}, {why}; action: {action}{more}")
        with (self.folder / "guard.jsonl").open("a") as file:
            file.write(json.dumps(decision) + "\n")
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("stability/guard", f"{kind}: {why}; {action}", step)

    def report(self, step: int, content: dict[str, Any]) -> Path:
        path = self.folder / f"collapse_step_{step}.json"
        if self.trainer.is_global_zero:
            path.write_text(json.dumps(content, indent=2))
        return path


class CollapseGuard:
    """Acts at an onset or a dead network. Benign spikes are only logged.

    - `warn`: logs the event, nothing more.
    - `skip`: the step is not taken; weights and optimiser stay as they are to the bit. Nor are the steps after it, as
      long as their statistics are beyond the thresholds. After 50 skipped steps in a row the run stops: the weights
      themselves have collapsed.
    - `rollback`: weights, optimiser and averages return to a copy in host memory that is clearly older than the onset;
      this step is not taken, and the learning rate is multiplied by `lr_factor` from here on. Data and schedule are
      functions of the step and continue. After `max_rollbacks` rollbacks the run stops.
    - `stop`: the run ends on all ranks, with a report `collapse_step_<step>.json`.

    Copies are never part of a checkpoint: after a resume the loaded state is the first copy.

    Args:
        action: see above.
        snapshot_every: healthy steps between two copies, of which the last two are kept.
        margin: a copy must be this many steps older than the onset, if one is (the paper's gradients rise 30 steps
            before).
        max_rollbacks: in the whole run, including resumes.
        lr_factor: see above.

    Raises:
        AgreedError: where the run ends.
    """

    def __init__(
        self,
        action: Literal["warn", "skip", "rollback", "stop"] = "warn",
        snapshot_every: PositiveInt = 100,
        margin: NonNegativeInt = 50,
        max_rollbacks: NonNegativeInt = 3,
        lr_factor: Annotated[float, Gt(0), Le(1)] = 0.5,
    ) -> None:
        self.action = action
        self.snapshot_every, self.margin = snapshot_every, margin
        self.max_rollbacks, self.lr_factor = max_rollbacks, lr_factor
        self.lr_scale, self.rollbacks, self.skipped = 1.0, 0, 0
        self.decisions: list[dict[str, Any]] = []
        self.snapshots: list[Snapshot] = []
        self._healthy_since = 0
        self._rows: deque[dict[str, Any]] = deque(maxlen=ROWS_IN_REPORT)

    def start(self, step: int, on_disk: bool) -> None:
        """Training begins or resumes at this step.

        Args:
            on_disk: whether the optimiser's state is stored on NVMe.
        """
        if self.action == "rollback" and on_disk:
            raise AgreedError(
                "callbacks.monitor.guard.action = rollback: state on NVMe cannot be restored; use warn, skip or stop"
            )
        self.snapshots, self._healthy_since = [], step

    def act(self, row: StepRow, detector: CollapseDetector, run: RunControl) -> None:
        """Act on the events in the row, which the detector has just observed. A collective call."""
        self._rows.append({"step": row.step} | row.values)
        alarm = next((event for event in row.events if event.kind in ALARMS), None)
        for event in row.events:
            if event is not alarm or self.action == "warn":
                self._log(run, event, "warn" if event is alarm else "none")
        if self.action == "rollback":
            self._keep(row.step, detector, run)
        persists = self.action == "skip" and detector.state != "healthy" and detector.beyond
        # The values are the same on all ranks, so this is too. If it ever differed, all ranks would act, not some.
        if self.action == "warn" or not run.any_rank(bool(alarm or persists)):
            self.skipped = 0
            return
        kind: Literal["onset", "dead"] = "dead" if detector.state == "dead" else "onset"
        alarm = alarm or Event(row.step, kind, "still beyond the thresholds")
        if self.action == "stop":
            self._stop(run, alarm, detector, f"the network is {'dead' if alarm.kind == 'dead' else 'collapsing'}")
        elif self.action == "skip":
            self._skip(run, alarm, detector)
        else:
            self._roll_back(run, alarm, detector)

    def _log(self, run: RunControl, event: Event, action: str, **more: Any) -> None:
        decision = {"step": event.step, "kind": event.kind, "why": event.why, "action": action} | more
        self.decisions.append(decision)
        run.log(decision)

    def _skip(self, run: RunControl, alarm: Event, detector: CollapseDetector) -> None:
        self.skipped += 1
        if self.skipped > MAX_SKIPPED:
            self._stop(run, alarm, detector, f"no recovery after {MAX_SKIPPED} skipped steps")
        self._log(run, alarm, "skip")
        run.skip_step()

    def _keep(self, step: int, detector: CollapseDetector, run: RunControl) -> None:
        """Take a copy at the first step, and whenever the run has been healthy for long enough since the last one."""
        if detector.state != "healthy" or detector.beyond:
            self._healthy_since = step + 1
        due = step - max(self._healthy_since, self.snapshots[-1].step if self.snapshots else 0) >= self.snapshot_every
        if due if self.snapshots else detector.state == "healthy":
            self.snapshots = [*self.snapshots[-1:], run.snapshot(step)]

    def _roll_back(self, run: RunControl, alarm: Event, detector: CollapseDetector) -> None:
        if not self.snapshots:
            self._stop(run, alarm, detector, "no healthy state to roll back to")
        if self.rollbacks >= self.max_rollbacks:
            self._stop(run, alarm, detector, f"the network is collapsing again after {self.rollbacks} rollbacks,")
        old_enough = [snapshot for snapshot in self.snapshots if snapshot.step <= alarm.step - self.margin]
        snapshot = old_enough[-1] if old_enough else self.snapshots[0]
        self.rollbacks += 1
        self.lr_scale *= self.lr_factor
        self._log(run, alarm, "rollback", back_to=snapshot.step, lr_scale=self.lr_scale)
        run.restore(snapshot)
        run.skip_step()
        run.scale_lr(self.lr_scale)
        self.snapshots = [snapshot]
        self._healthy_since = alarm.step + 1
        detector.went_back()

    def _stop(self, run: RunControl, alarm: Event, detector: CollapseDetector, what: str) -> NoReturn:
        self._log(run, alarm, "stop")
        content = {
            "step": alarm.step,
            "kind": alarm.kind,
            "why": alarm.why,
            "rows": [{k: v if math.isfinite(v) else str(v) for k, v in row.items()} for row in self._rows],
            "thresholds": asdict(detector.thresholds),
            "decisions": self.decisions,
            "rollbacks": self.rollbacks,
            "lr_scale": self.lr_scale,
        }
        path = run.report(alarm.step, content)
        raise AgreedError(f"{what} at step {alarm.step} ({alarm.why}); the step was not taken; see {path}")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAVED} | {"decisions": self.decisions[-ROWS_IN_REPORT:]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in SAVED:
            setattr(self, name, state[name])
        self.decisions = list(state["decisions"])
