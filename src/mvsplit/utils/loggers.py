"""TensorBoard as this project uses it."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from mvsplit.utils.flat import flatten


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without its `epoch` curve (runs are counted in steps), and with the config shown whole.

    Args:
        folder: where the event files go.
        purge_step: a resumed run's first step; what was logged from there on before is not drawn twice.
    """

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_config(self, text: str, step: int) -> None:
        """The resolved config, as YAML."""
        self.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), step)

    @rank_zero_only
    def log_result(self, config: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """One row in the HParams tab: what runs differ in, and how they ended."""
        groups = ("seed", "residual", "model", "flow", "sampler", "optim", "data", "trainer")
        hparams: dict[str, Any] = {}
        for group in groups:
            hparams |= flatten(config[group], group)
        results = ("train/loss", "val/loss", "test/loss", "time/images_per_s")
        row = {f"hparam/{name}": metrics[name] for name in results if name in metrics}
        self.log_hyperparams(hparams, row, 0)
