"""Saves checkpoints: each step at most once. A policy decides which ones are kept."""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from mvsplit.training.checkpoint_format import is_checkpoint_in, remove, step_of
from mvsplit.training.checkpoint_io import FAILED, UNDER_WAY, FolderCheckpoints, SaveOptions
from mvsplit.utils.errors import AgreedError


class CheckpointSaver(Checkpoint):
    """Writes `<folder>/step-<step>.ckpt`, points the links `last.ckpt` and `best.ckpt` at it, and removes old ones.

    A checkpoint is whole or invisible, so a run killed at any moment can resume from the newest. With `async_save` a
    save only copies the state; a thread writes it while training continues. The next save, and the end of training,
    wait for it. If one process cannot write, all raise at the end of a step.

    Only checkpoints in `folder` that this run has made are ever removed.

    Args:
        folder: of the checkpoints.
        every_n_steps: optimiser steps between two saves.
        keep_last: the newest checkpoints to keep; if the newest is damaged, the one before it is used.
        keep_best: the checkpoints with the best `monitor` to keep; saved after the validation that measured it.
        monitor: a logged metric of the validation.
        mode: whether the best is its `min` or its `max`.
        keep_every_n_steps: optimiser steps between two checkpoints that are kept for good, or null.
        async_save: write in the background, if there is room in host memory for a copy of the state.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: PositiveInt = 100,
        keep_last: PositiveInt = 2,
        keep_best: NonNegativeInt = 1,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        keep_every_n_steps: PositiveInt | None = 10000,
        async_save: bool = True,
    ) -> None:
        self.folder, self.every_n_steps, self.async_save = Path(folder), every_n_steps, async_save
        self.keep_last, self.keep_best, self.keep_every_n_steps = keep_last, keep_best, keep_every_n_steps
        self.monitor, self.sign = monitor, 1.0 if mode == "min" else -1.0
        self.requested = False
        """Save at the end of this step or validation, for another callback."""
        self.scores: dict[str, float | None] = {}
        """Checkpoint that this run may remove → its `monitor`, if it was measured at that step."""
        self._saved_step = -1
        self._pending = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        self.settle(trainer)
        if self.requested or (self._is_due(trainer.global_step) and not self._validation_follows(trainer)):
            self._log_now(trainer)
            self.save(trainer)

    def _is_due(self, step: int) -> bool:
        return any(n is not None and step % n == 0 for n in (self.every_n_steps, self.keep_every_n_steps))

    @staticmethod
    def _log_now(trainer: Trainer) -> None:
        """Log this step's metrics before the checkpoint, instead of after this hook.

        A kill after the checkpoint would lose them, and a stopped run would log a step that other runs do not.
        """
        connector = trainer._logger_connector
        stopping, trainer.should_stop = trainer.should_stop, False  # else Lightning would log although it is not due
        connector.update_train_step_metrics()
        trainer.should_stop = stopping
        # In the object's own dict this hides the method; the next call only removes it.
        connector.update_train_step_metrics = lambda: vars(connector).pop("update_train_step_metrics")  # type: ignore

    @staticmethod
    def _validation_follows(trainer: Trainer) -> bool:
        # A run resumed from a state saved before a validation continues after it, so that validation would be lost.
        done = trainer.fit_loop.total_batch_idx + 1
        interval = trainer.val_check_batch
        return bool(trainer.enable_validation and interval and done % interval == 0)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or step <= self._saved_step:
            return
        score = self._score(trainer)
        if self.requested or self._is_due(step) or self._is_best(score):
            self.save(trainer, score)

    def _score(self, trainer: Trainer) -> float | None:
        if not self.keep_best or trainer.fast_dev_run:
            return None
        if self.monitor not in trainer.callback_metrics:
            if any(self.monitor in getattr(callback, "sometimes_logs", ()) for callback in trainer.callbacks):
                return None
            logged = ", ".join(sorted(map(str, trainer.callback_metrics)))
            raise AgreedError(f"callbacks.checkpoint.monitor = {self.monitor}: not logged; allowed: {logged}")
        # The first process decides for all: a metric may not have been reduced over the processes.
        score = float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))
        return None if math.isnan(score) else score

    def _ranked(self) -> list[str]:
        """Checkpoints with a score, the best first; of equal ones the earlier first."""
        scores = {name: self.sign * score for name, score in self.scores.items() if score is not None}
        return sorted(scores, key=lambda name: (scores[name], step_of(Path(name))))

    def _is_best(self, score: float | None) -> bool:
        if score is None:
            return False
        best = [self.scores[name] or 0.0 for name in self._ranked()[: self.keep_best]]
        return len(best) < self.keep_best or self.sign * score < self.sign * best[-1]

    def save(self, trainer: Trainer, score: float | None = None) -> None:
        """Save this step. Called on all processes.

        Args:
            trainer: whose state is saved.
            score: the monitored metric at this step, if it is known.
        """
        self.requested = False
        if trainer.fast_dev_run:
            return
        self.settle(trainer, wait=True)
        name = f"step-{trainer.global_step:08d}.ckpt"
        self._saved_step, self._pending = trainer.global_step, self.async_save
        self.scores[name] = score
        best = self._ranked()[: self.keep_best]
        kept = {*best, *sorted(self.scores, key=lambda name: step_of(Path(name)))[-self.keep_last :]}
        for_good = {name for name in self.scores if step_of(Path(name)) % (self.keep_every_n_steps or math.inf) == 0}
        dropped = self.scores.keys() - kept - for_good

        def finished() -> None:  # may run later, in a thread: uses what was decided at this step
            self._link("last.ckpt", name)
            if best:
                self._link("best.ckpt", best[0])
            for old in sorted(dropped):
                remove(self.folder / old, self.folder)

        # The saved state still names what is dropped: if a kill prevents its removal, the resumed run removes it.
        trainer.save_checkpoint(self.folder / name, storage_options=SaveOptions(self.async_save, finished))
        self.scores = {name: score for name, score in self.scores.items() if name in kept}

    def _link(self, link: str, name: str) -> None:
        fresh = self.folder / f"{link}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, self.folder / link)

    def settle(self, trainer: Trainer, wait: bool = False) -> None:
        """Check on the background write; a collective call while one is under way.

        Args:
            trainer: that saved.
            wait: until it ends.

        Raises:
            AgreedError: on all processes, if one could not write.
        """
        if not self._pending:
            return
        writes = trainer.strategy.checkpoint_io
        assert isinstance(writes, FolderCheckpoints)
        progress = torch.tensor(writes.progress(wait), device=trainer.strategy.root_device)
        progress = trainer.strategy.reduce(progress, reduce_op="min")
        self._pending = int(progress) == UNDER_WAY
        if int(progress) == FAILED:
            writes.finish()
            raise AgreedError("another process could not write the checkpoint")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step > max(self._saved_step, 0):
            self.save(trainer)
        self.settle(trainer, wait=True)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        writes = trainer.strategy.checkpoint_io
        if isinstance(writes, FolderCheckpoints) and not isinstance(exception, KeyboardInterrupt):
            writes.progress(wait=True)  # keep a checkpoint from before the error

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores)}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over what the state records about this folder's checkpoints; those of another run are ignored."""
        states = checkpoint["callbacks"]
        scores: Any = states[self.state_key].get("scores") if self.state_key in states else self._earlier(states)
        own = Path(str(trainer.ckpt_path)).resolve().parent == self.folder.resolve()
        found = {
            name: score if isinstance(score, float) else None
            for name, score in (scores if own and isinstance(scores, dict) else {}).items()
            if Path(str(name)).name == name and is_checkpoint_in(self.folder / name, self.folder)
        }
        self.scores = trainer.strategy.broadcast(found)  # the first process's: others may see other files

    def _earlier(self, states: dict[str, Any]) -> dict[str, float | None]:
        """The same for runs of earlier versions: `last-….ckpt`, and the best of Lightning's `ModelCheckpoint`."""
        scores: dict[str, float | None] = {path.name: None for path in self.folder.glob("last-*.ckpt")}
        for key, state in states.items():
            if (
                str(key).startswith("ModelCheckpoint")
                and isinstance(state, dict)
                and state.get("monitor") == self.monitor
            ):
                best = state.get("best_k_models")
                for path, score in best.items() if isinstance(best, dict) else ():
                    scores[Path(str(path)).name] = float(score) if isinstance(score, float | Tensor) else None
        return scores

    def summary(self) -> list[str]:
        """Lines for the table at the end of a run."""
        lines = [f"last checkpoint  {self.folder / 'last.ckpt'}"] if (self.folder / "last.ckpt").exists() else []
        return lines + [f"best checkpoint  {self.folder / name}" for name in self._ranked()[:1]]
