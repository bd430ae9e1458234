"""The mean mode in the log: curves by depth, maps over step and depth, profiles, and a TensorBoard page for them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from pydantic import PositiveInt

from mvsplit.callbacks.stability_probe import StepRow
from mvsplit.stability.by_depth import DEPTH, grid, mean
from mvsplit.stability.plotting import heatmap_image, profile_image
from mvsplit.stability.tables import read_table
from mvsplit.utils.loggers import log_picture, takes_pictures

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


class StabilityBoard:
    """Logs full measurements: after each one a curve per part of the depth (`stability/rho_depth_0.00-0.25`, …).

    Less often, and at the end, images: maps and profiles of ρ, token cosine, G_mean/G_ctr and Q gradients.

    Args:
        images_every: full measurements between two sets of images, which take about a second to draw.
        depth_bins: equal parts of the depth, with one curve each.
    """

    def __init__(self, images_every: PositiveInt = 10, depth_bins: PositiveInt = 4) -> None:
        self.images_every, self.depth_bins = images_every, depth_bins
        self._laid_out = False

    def show(self, row: StepRow, every: int, max_steps: int, table: Path, loggers: Sequence[Logger]) -> None:
        """Log a full measurement, one of each `every` steps. Images come from the table `depth.csv`."""
        scalars = {f"stability/{name}": value for name, value in self._by_part(row.by_depth).items()}
        for logger in loggers:
            logger.log_metrics(scalars, row.step)
            if not self._laid_out and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(LAYOUT)
        self._laid_out = True
        if self._draws(row.step, every, max_steps):
            self._draw(row.step, table, loggers)

    def _draws(self, step: int, every: int, max_steps: int) -> bool:
        """Whether images follow this full measurement; they always follow the last step's."""
        number, rest = divmod(step, every)  # from the step: the same after a resume
        return (rest == 0 and (number + 1) % self.images_every == 0) or step == max_steps - 1

    def _by_part(self, table: dict[int, dict[str, float]]) -> dict[str, float]:
        """Means over the measured blocks of each part of the depth; geometric for what spans powers of ten."""
        blocks = np.array(list(table))
        names = {name for row in table.values() for name in row}
        columns = {name: np.array([row.get(name, np.nan) for row in table.values()]) for name in names}
        part = blocks * self.depth_bins // (blocks.max() + 1)
        means = {}
        for quantity in DEPTH:
            values = quantity.of({"step": np.zeros(len(blocks)), **columns})
            for i in range(self.depth_bins):
                name = f"{quantity.name}_depth_{i / self.depth_bins:.2f}-{(i + 1) / self.depth_bins:.2f}"
                means[name] = mean(values[part == i], geometric=quantity.log)
        return {name: value for name, value in means.items() if not np.isnan(value)}

    def _draw(self, step: int, path: Path, loggers: Sequence[Logger]) -> None:
        loggers = [logger for logger in loggers if takes_pictures(logger)]
        if not loggers:
            return
        table = read_table(path)
        for quantity in DEPTH:
            steps, blocks, values = grid(table, quantity.of(table))
            if not np.isfinite(values).any():
                continue  # the network does not support it
            for kind, draw in (("map", heatmap_image), ("profile", profile_image)):
                image = draw(values, steps, blocks, quantity.title, quantity.log)
                for logger in loggers:
                    log_picture(logger, f"stability/{quantity.name}_{kind}", image, step)
