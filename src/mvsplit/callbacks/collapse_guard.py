"""Looks at the step's statistics before each optimiser step, and acts when the network begins to collapse."""

import json
import math
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mvsplit.callbacks.ema import EMA
from mvsplit.callbacks.stability import StabilityProbe
from mvsplit.stability.watch import Event, Thresholds, Watch
from mvsplit.training.shards import drop_gradients, on_disk
from mvsplit.training.snapshots import Snapshot
from mvsplit.training.strategies import takes_step
from mvsplit.utils.console import say
from mvsplit.utils.errors import AgreedError, UserError

ALARMS = ("onset", "dead")
ROWS_IN_REPORT = 50
MAX_SKIPPED = 50


class CollapseGuard(Callback):
    """Judges the values of the `StabilityProbe` (which must stand before it) and acts at an onset or a dead network.

    Every decision is appended to `<folder>/guard.jsonl`, said, and shown as text in TensorBoard; benign spikes too, but
    nothing is done about them. What is done otherwise, before the optimiser takes the step:

    - `warn`: nothing more.
    - `skip`: the step is not taken, weights and optimiser stay as they are to the bit; nor are the next ones, while
      their statistics are beyond the thresholds. After 50 in a row the run stops: the weights themselves are ill.
    - `rollback`: weights, optimiser and averages go back to a copy in host memory, of a time comfortably before; this
      step is not taken and the learning rate is `lr_factor` of what it was from now on. The stream of data and the
      schedule go on: they are functions of the step. After `max_rollbacks` of them the run stops.
    - `stop`: the run ends on all ranks, with a report `<folder>/collapse_step_<step>.json`.

    Copies are never in a checkpoint: after a resume the loaded state is the first one.

    Args:
        action: see above. folder: of the log and the report.
        snapshot_every: healthy steps between two copies, of which the last two are kept. margin: steps that a copy
            must be older than the onset (the paper's gradients stir 30 steps before), if one is. max_rollbacks: in
            the whole run, resumes included. lr_factor: see above.
        spike, ratio, cosine_onset, cosine_dead, q_dead, loss_rise, loss_dead, window, patience, recovery: the
            thresholds that may need another value, see `mvsplit.stability.thresholds.Thresholds`.

    Raises:
        UserError: if there is no probe before it. AgreedError: where the run ends.
    """

    def __init__(
        self,
        folder: str,
        action: Literal["warn", "skip", "rollback", "stop"] = "warn",
        snapshot_every: PositiveInt = 100,
        margin: NonNegativeInt = 50,
        max_rollbacks: NonNegativeInt = 3,
        lr_factor: Annotated[float, Gt(0), Le(1)] = 0.5,
        spike: PositiveFloat = Thresholds.spike,
        ratio: PositiveFloat = Thresholds.ratio,
        cosine_onset: Annotated[float, Gt(0), Le(1)] = Thresholds.cosine_onset,
        cosine_dead: Annotated[float, Gt(0), Le(1)] = Thresholds.cosine_dead,
        q_dead: PositiveFloat = Thresholds.q_dead,
        loss_rise: PositiveFloat = Thresholds.loss_rise,
        loss_dead: PositiveFloat = Thresholds.loss_dead,
        window: Annotated[int, Ge(Thresholds.min_rows)] = Thresholds.window,
        patience: PositiveInt = Thresholds.patience,
        recovery: PositiveInt = Thresholds.recovery,
    ) -> None:
        self.folder, self.action = Path(folder), action
        self.snapshot_every, self.margin = snapshot_every, margin
        self.max_rollbacks, self.lr_factor = max_rollbacks, lr_factor
        self.thresholds = Thresholds(
            spike=spike,
            ratio=ratio,
            cosine_onset=cosine_onset,
            cosine_dead=cosine_dead,
            q_dead=q_dead,
            loss_rise=loss_rise,
            loss_dead=loss_dead,
            window=window,
            patience=patience,
            recovery=recovery,
        )
        self.watch = Watch(self.thresholds)
        self.lr_scale, self.rollbacks, self.skipped = 1.0, 0, 0
        self.decisions: list[dict[str, Any]] = []
        self.snapshots: list[Snapshot] = []
        self._healthy_since = 0
        self._rows: deque[dict[str, Any]] = deque(maxlen=ROWS_IN_REPORT)
        self._probe: StabilityProbe | None = None

    # ------------------------------------------------------------------- set-up

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        self._probe = next((c for c in before if isinstance(c, StabilityProbe)), None)
        if self._probe is None:
            raise UserError(
                "callbacks.guard: needs callbacks.stability, before it; or switch it off: callbacks.guard=null"
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.action == "rollback" and on_disk(module):
            raise AgreedError(
                "callbacks.guard.action = rollback: NVMe cannot be put back; allowed are warn, skip and stop"
            )
        self.snapshots, self._healthy_since = [], trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------ each step

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._scale_lr(module)

    def _scale_lr(self, module: LightningModule) -> None:
        """The schedule's learning rate times ours. Anew each step: a resume puts the config's values back."""
        if self.lr_scale == 1.0:
            return
        scheduler = module.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] * self.lr_scale for group in groups]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if not takes_step(trainer):
            return
        assert self._probe is not None
        step, values = trainer.global_step, dict(self._probe.values)
        self._rows.append({"step": step} | values)
        events = self.watch.observe(step, dict(values))
        alarm = next((event for event in events if event.kind in ALARMS), None)
        for event in events:
            if event is not alarm or self.action == "warn":
                self._log(trainer, event, "warn" if event is alarm else "none")
        if self.action == "rollback":
            self._keep(trainer, module, step)
        still_ill = self.action == "skip" and self.watch.state != "healthy" and self.watch.beyond
        # The values are the same on all ranks, so this is too; if ever it were not, all act rather than some.
        if self.action == "warn" or not trainer.strategy.reduce_boolean_decision(bool(alarm or still_ill), all=False):
            self.skipped = 0
            return
        alarm = alarm or Event(step, "dead" if self.watch.state == "dead" else "onset", "still beyond the thresholds")
        if self.action == "stop":
            self._stop(trainer, alarm, f"the network is {'dead' if alarm.kind == 'dead' else 'collapsing'}")
        elif self.action == "skip":
            self._skip(trainer, module, alarm)
        else:
            self._roll_back(trainer, module, alarm)

    def _log(self, trainer: Trainer, event: Event, action: str, **more: Any) -> None:
        decision = {"step": event.step, "kind": event.kind, "why": event.why, "action": action} | more
        self.decisions.append(decision)
        if not trainer.is_global_zero:
            return
        say(f"guard            step {event.step}: {event.kind}, {event.why}; action: {action}")
        with (self.folder / "guard.jsonl").open("a") as file:
            file.write(json.dumps(decision) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("stability/guard", f"{event.kind}: {event.why}; {action}", event.step)

    # -------------------------------------------------------------------- actions

    def _skip(self, trainer: Trainer, module: LightningModule, alarm: Event) -> None:
        self.skipped += 1
        if self.skipped > MAX_SKIPPED:
            self._stop(trainer, alarm, f"after {MAX_SKIPPED} skipped steps the network is no better")
        self._log(trainer, alarm, "skip")
        drop_gradients(module)

    def _keep(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Copy what this process holds, at the first step and whenever all has been well since the last time."""
        if self.watch.state != "healthy" or self.watch.beyond:
            self._healthy_since = step + 1
        due = step - max(self._healthy_since, self.snapshots[-1].step if self.snapshots else 0) >= self.snapshot_every
        if self.snapshots and not due:
            return
        if not self.snapshots and self.watch.state != "healthy":
            return
        self.snapshots = [*self.snapshots[-1:], Snapshot(step, module, trainer.optimizers[0], self._averages(trainer))]

    def _roll_back(self, trainer: Trainer, module: LightningModule, event: Event) -> None:
        if self.rollbacks >= self.max_rollbacks or not self.snapshots:
            known = (
                f"after {self.rollbacks} rollbacks" if self.snapshots else "there is no healthy state to go back to,"
            )
            self._stop(trainer, event, f"{known} the network is collapsing again")
        old_enough = [snapshot for snapshot in self.snapshots if snapshot.step <= event.step - self.margin]
        snapshot = old_enough[-1] if old_enough else self.snapshots[0]
        self.rollbacks += 1
        self.lr_scale *= self.lr_factor
        self._log(trainer, event, "rollback", back_to=snapshot.step, lr_scale=self.lr_scale)
        snapshot.restore(module, trainer.optimizers[0], self._averages(trainer))
        drop_gradients(module)
        self.snapshots = [snapshot]
        self._scale_lr(module)
        self._healthy_since = event.step + 1
        self.watch.went_back()
        if trainer.is_global_zero:
            say(
                f"guard            back to the state of step {snapshot.step}, learning rate × {self.lr_scale:g}"
                f" (rollback {self.rollbacks} of {self.max_rollbacks})"
            )

    def _stop(self, trainer: Trainer, event: Event, what: str) -> None:
        self._log(trainer, event, "stop")
        path = self.folder / f"collapse_step_{event.step}.json"
        if trainer.is_global_zero:
            report = {
                "step": event.step,
                "kind": event.kind,
                "why": event.why,
                "rows": [{k: v if math.isfinite(v) else str(v) for k, v in row.items()} for row in self._rows],
                "thresholds": asdict(self.thresholds),
                "decisions": self.decisions,
                "rollbacks": self.rollbacks,
                "lr_scale": self.lr_scale,
            }
            path.write_text(json.dumps(report, indent=2))
        raise AgreedError(f"{what} at step {event.step} ({event.why}); no step was taken, see {path}")

    @staticmethod
    def _averages(trainer: Trainer) -> dict[str, Tensor]:
        return next((c.shadow for c in trainer.callbacks if isinstance(c, EMA)), {})

    # ----------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self.watch.state_dict(),
            "lr_scale": self.lr_scale,
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "decisions": self.decisions[-ROWS_IN_REPORT:],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.lr_scale, self.rollbacks, self.skipped = state["lr_scale"], state["rollbacks"], state["skipped"]
        self.decisions = list(state["decisions"])
