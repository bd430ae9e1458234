"""Pictures drawn at each validation, so that one sees what the network has learnt."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from pydantic import PositiveInt

from mvsplit.utils.images import picture_grid, save_png


class SampleGrid(Callback):
    """Draws a grid, a column per class, with the averaged weights: a PNG and `sample/grid` in the log.

    At each validation, and at the end with the final weights.

    The noise of a place in the grid never changes, so grids of different steps show the same pictures grow.

    Args:
        folder: where `step_<step>.png` goes. num_classes: classes of the data. columns: classes shown, spread evenly
            over all. rows: pictures per class. batch_size: pictures drawn at once.
    """

    def __init__(
        self,
        folder: str,
        num_classes: PositiveInt,
        columns: PositiveInt = 10,
        rows: PositiveInt = 4,
        batch_size: PositiveInt = 64,
    ) -> None:
        self.folder = Path(folder)
        columns = min(columns, num_classes)
        classes = torch.arange(columns) * num_classes // columns
        self.classes, self.columns, self.batch_size = classes.repeat(rows), columns, batch_size
        self.latest: Path | None = None
        self._drawn_at = -1

    def on_test_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self.on_validation_epoch_end(trainer, module)  # the final weights, if no validation fell on the last step

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.global_step == self._drawn_at:
            return
        self._drawn_at = trainer.global_step
        device = trainer.strategy.root_device
        classes, index = self.classes.to(device), torch.arange(len(self.classes), device=device)
        pictures = [
            module.sample(labels, numbers).cpu()
            for labels, numbers in zip(classes.split(self.batch_size), index.split(self.batch_size), strict=True)
        ]
        if not trainer.is_global_zero:
            return  # the others took part, for strategies that share the weights out
        grid = picture_grid(torch.cat(pictures), self.columns)
        self.latest = save_png(grid, self.folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            experiment: Any = logger.experiment
            if hasattr(experiment, "add_image"):
                experiment.add_image("sample/grid", grid, trainer.global_step - 1)  # where curves have it
