"""Records the samples trained on: for audits, and to check that a resume neither lost nor repeated any."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mvsplit.utils.errors import UserError


class SampleRecord(Callback):
    """Appends a line per micro-batch to `samples_rank_<r>.txt`: the step, and place=key of each sample.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.datamodule.source.numbered:
            raise UserError("callbacks.record: needs data.reader=index; other readers do not number samples")

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        data: Any = trainer.datamodule
        index = data.indices["train"]
        pairs = zip(batch["position"].tolist(), batch["index"].tolist(), strict=True)
        keys = " ".join(f"{place}={index.key(data.storage, number)}" for place, number in pairs)
        with (self.folder / f"samples_rank_{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.global_step} {keys} .\n")  # the dot marks a complete line
