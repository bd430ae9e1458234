"""The mean mode in TensorBoard: curves by depth, maps over step and depth, profiles, a page that opens on it."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from pydantic import PositiveInt

from mvsplit.callbacks.stability import StabilityProbe
from mvsplit.stability.figures import heatmap_image, profile_image
from mvsplit.stability.outcomes import mean
from mvsplit.stability.pictures import DEPTH, grid
from mvsplit.stability.traces import read_table
from mvsplit.utils.errors import UserError

LAYOUT = {
    "stability": {
        "loss": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "gradient norm": ["Multiline", ["^train/grad_norm$"]],
        "token cosine, deep blocks": ["Multiline", ["^stability/token_cosine$"]],
        "mean over centred energy, deep blocks": ["Multiline", ["^stability/rho$"]],
        "writer gradients: mean-coherent, centred": ["Multiline", ["^stability/g_mean$", "^stability/g_ctr$"]],
        "Q and K gradients, deep blocks": ["Multiline", ["^stability/q_grad$", "^stability/k_grad$"]],
        **{f"{q.title} by depth": ["Multiline", [f"^stability/{q.name}_depth_.*"]] for q in DEPTH},
    }
}
"""TensorBoard's page Custom Scalars."""


class StabilityBoard(Callback):
    """Draws what `StabilityProbe` has measured by depth.

    After each full measurement a curve for each part of the depth (`stability/rho_depth_0.00-0.25`, …), not for each
    block. Now and then, and at the end, maps and profiles of ρ, token cosine, G_mean/G_ctr and Q gradients as pictures.

    Args:
        images_every: full measurements between two drawings, which take about a second.
        depth_bins: equal parts of the depth that get a curve each.
    """

    def __init__(self, images_every: PositiveInt = 10, depth_bins: PositiveInt = 4) -> None:
        self.images_every, self.depth_bins = images_every, depth_bins
        self._measured = 0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        probes = [c for c in trainer.callbacks if isinstance(c, StabilityProbe)]
        if not probes:
            raise UserError("callbacks.stability_board: draws what callbacks.stability measures, which is switched off")
        self._probe = probes[0]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for board in self._boards(trainer):
            board.add_custom_scalars(LAYOUT)

    @staticmethod
    def _boards(trainer: Trainer) -> list[Any]:
        experiments = [logger.experiment for logger in trainer.loggers] if trainer.is_global_zero else []
        return [experiment for experiment in experiments if hasattr(experiment, "add_custom_scalars")]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not self._probe.by_depth or not trainer.is_global_zero:
            return
        table = self._probe.by_depth
        scalars = {f"stability/{name}": value for name, value in self._by_part(table).items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, trainer.global_step - 1)
        self._probe.by_depth = {}
        self._measured += 1
        if self._measured % self.images_every == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._measured % self.images_every:
            self._draw(trainer)

    def _by_part(self, table: dict[int, dict[str, float]]) -> dict[str, float]:
        """Means over the measured blocks of each part of the depth; geometric for what spans powers of ten."""
        blocks = np.array(list(table))
        columns = {
            name: np.array([row.get(name, np.nan) for row in table.values()]) for name in next(iter(table.values()))
        }
        part = blocks * self.depth_bins // (blocks.max() + 1)
        means = {}
        for quantity in DEPTH:
            values = quantity.of({"step": np.zeros(len(blocks)), **columns})
            for i in range(self.depth_bins):
                name = f"{quantity.name}_depth_{i / self.depth_bins:.2f}-{(i + 1) / self.depth_bins:.2f}"
                means[name] = mean(values[part == i], geometric=quantity.log)
        return {name: value for name, value in means.items() if not np.isnan(value)}

    def _draw(self, trainer: Trainer) -> None:
        path: Path = self._probe.folder / "depth.csv"
        boards = self._boards(trainer)
        if not boards:
            return
        table = read_table(path)  # from the file: it knows of the time before a resume, too
        for quantity in DEPTH:
            steps, blocks, values = grid(table, quantity.of(table))
            for kind, draw in (("map", heatmap_image), ("profile", profile_image)):
                image = draw(values, steps, blocks, quantity.title, quantity.log)
                for board in boards:
                    board.add_image(f"stability/{quantity.name}_{kind}", image, trainer.global_step - 1)
