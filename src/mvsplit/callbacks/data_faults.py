"""What is wrong with the data, in the log."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from mvsplit.utils.console import say


class DataFaults(Callback):
    """Logs `data/<kind>`, the count of each kind of fault so far, and tells the first of each kind in a line.

    `data/left_out` is about how many samples indexing has found damaged.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        data: Any = trainer.datamodule
        for finding in data.latest:
            if finding.kind not in self._told and trainer.is_global_zero:
                self._told.add(finding.kind)
                say(f"data: {finding.message} ({finding.kind}; further ones are counted)")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counts = trainer.datamodule.counts["train"].counts
        left_out = {"left_out": trainer.datamodule.left_out} if trainer.datamodule.left_out else {}
        if (counts or left_out) and trainer.global_step % trainer.log_every_n_steps == 0:
            metrics = {f"data/{kind}": float(n) for kind, n in (counts | left_out).items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step - 1)
