"""Logs damaged data."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from mvsplit.utils.console import info


class DataFaults(Callback):
    """Logs `data/<kind>`, the count of each kind of fault so far, and prints the first of each kind.

    `data/left_out` is about how many samples were found damaged when they were indexed.
    """

    def __init__(self) -> None:
        self._printed: set[str] = set()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        data: Any = trainer.datamodule
        for finding in data.latest:
            if finding.kind not in self._printed and trainer.is_global_zero:
                self._printed.add(finding.kind)
                info(f"data: {finding.message} ({finding.kind}; further ones are counted)")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counts = trainer.datamodule.counts["train"].counts
        left_out = {"left_out": trainer.datamodule.left_out} if trainer.datamodule.left_out else {}
        due = trainer.global_step % trainer.log_every_n_steps == 0 and not trainer.fit_loop._should_accumulate()
        if due and (counts or left_out):
            metrics = {f"data/{kind}": float(n) for kind, n in (counts | left_out).items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step - 1)
