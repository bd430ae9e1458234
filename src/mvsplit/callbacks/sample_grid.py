"""Samples drawn at each validation, to show what the network has learnt."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, Trainer
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from mvsplit.callbacks.drawn_conditions import draws, has_captions, of_captions
from mvsplit.data.autoencoders import Autoencoder
from mvsplit.data.latent_space import LatentDecoder, LatentSpace
from mvsplit.utils.console import info_once
from mvsplit.utils.errors import AgreedError, UserError
from mvsplit.utils.images import picture_grid, save_png
from mvsplit.utils.loggers import log_lines, log_picture


def space_of(trainer: Trainer) -> LatentSpace | None:
    """How the data's samples become images; None if they are, or if it is not known."""
    return getattr(trainer.datamodule, "space", None)


class SampleGrid(Callback):
    """Draws a grid, a column per class or caption, with the averaged weights: a PNG and `sample/grid` in the log.

    Captions are the first of the validation set, padded together; `sample/captions` in the log lists them from left to
    right. At each validation, and at the end with the final weights. The noise at a place in the grid is always the
    same, so grids of different steps show the same samples as they improve. Latents are decoded; without an autoencoder
    they are shown as colours, three fixed projections of their channels.

    Args:
        folder: of `step_<step>.png`.
        num_classes: number of classes of the data.
        columns: number of classes shown, spread evenly over all; or of captions.
        rows: samples of each.
        batch_size: samples drawn at once.
        autoencoder: that encoded the latents, or null.
        decode_on: device of the autoencoder: `cpu`, so that it takes no memory from training, or `gpu`.

    Raises:
        UserError: if another autoencoder encoded the latents.
    """

    def __init__(
        self,
        folder: str,
        num_classes: NonNegativeInt,
        columns: PositiveInt = 10,
        rows: PositiveInt = 4,
        batch_size: PositiveInt = 64,
        autoencoder: Autoencoder | None = None,
        decode_on: Literal["cpu", "gpu"] = "cpu",
    ) -> None:
        self.folder = Path(folder)
        self.num_classes, self.columns, self.rows, self.batch_size = num_classes, columns, rows, batch_size
        self.captions: list[str] = []
        self._conditions: tuple[Tensor, Tensor | None] | None = None
        self.latest: Path | None = None
        self.autoencoder, self.decode_on = autoencoder, decode_on
        self._decoder: LatentDecoder | None = None
        self._drawn_at = -1

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self._prepare(trainer, module)

    def on_test_start(self, trainer: Trainer, module: Any) -> None:
        self._prepare(trainer, module)

    def _prepare(self, trainer: Trainer, module: Any) -> None:
        """Check the autoencoder before the first step, on all ranks alike."""
        if not draws(trainer, module, "sample_grid") or self.autoencoder is None or self._decoder is not None:
            return
        if (space := space_of(trainer)) is None:
            raise AgreedError("autoencoder: the set contains images, not latents; use null")
        try:
            decoder = LatentDecoder(space, self.autoencoder)
        except UserError as error:
            raise AgreedError(str(error)) from None
        if trainer.is_global_zero:
            self._decoder = decoder.to(trainer.strategy.root_device if self.decode_on == "gpu" else torch.device("cpu"))

    def on_test_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self.on_validation_epoch_end(trainer, module)  # the final weights, if no validation fell on the last step

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.global_step == self._drawn_at:
            return
        if not draws(trainer, module, "sample_grid"):
            return
        self._drawn_at = trainer.global_step
        device = trainer.strategy.root_device
        conditions, null = self._drawn(trainer)
        columns, pictures = len(conditions), list[Tensor]()
        for index in torch.arange(columns * self.rows, device=device).split(self.batch_size):
            common = {} if null is None else {"null": null}
            pictures.append(module.sample(conditions[index % columns], index, **common).cpu())
        if not trainer.is_global_zero:
            return  # the other ranks only take part because sharded strategies need them
        samples = torch.cat(pictures)
        if self._decoder is not None:
            parts = samples.split(self.batch_size)
            samples = torch.cat([self._decoder(part).cpu() for part in parts])
        elif space_of(trainer) is not None:
            info_once("sample grid: latents are shown as colours, not decoded; give autoencoder=… to decode them")
        grid = picture_grid(samples, columns)
        self.latest = save_png(grid, self.folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            log_picture(logger, "sample/grid", grid, trainer.global_step - 1)  # the step at which curves are logged
            if self.captions:
                log_lines(logger, "sample/captions", self.captions, trainer.global_step - 1)

    def _drawn(self, trainer: Trainer) -> tuple[Tensor, Tensor | None]:
        """Conditions of a row of the grid, and the null condition if it comes with them."""
        if self._conditions is None and has_captions(trainer):
            count = min(self.columns, len(trainer.datamodule.validation_index()))
            condition, null, self.captions = of_captions(trainer, list(range(count)))
            self._conditions = condition, null
        elif self._conditions is None:
            columns = min(self.columns, self.num_classes)
            classes = torch.arange(columns) * self.num_classes // columns
            self._conditions = classes.to(trainer.strategy.root_device), None
        return self._conditions

    def summary(self) -> list[str]:
        """Lines for the end of the run."""
        return [f"samples          {self.latest}"] if self.latest else []

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_at": self._drawn_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn_at = state["drawn_at"]
