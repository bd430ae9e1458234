"""Lightning's loggers for runs that are resumed: steps repeated after a kill replace those logged before it."""

import csv
import hashlib
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from pydantic import NonNegativeInt
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mvsplit.utils.config import to_yaml
from mvsplit.utils.errors import UserError
from mvsplit.utils.flat import flatten
from mvsplit.utils.run_dirs import distinctive_overrides, group_choices, key_of

COLUMNS = ("residual", "optim.lr", "model.depth", "seed", "model.width", "data.batch_size", "optim.warmup_steps",
           "trainer.max_steps")  # fmt: skip
"""Columns of the HParams tab for every run; other keys set on its command line follow."""
MAX_COLUMNS = 12
RESULTS = ("train/loss", "val/loss", "test/loss", "time/images_per_s")


def takes_pictures(logger: Logger) -> bool:
    return isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image")


def log_picture(logger: Logger, tag: str, picture: Tensor | np.ndarray, step: int) -> None:
    """Log an image; called in the first process only.

    Args:
        logger: TensorBoard's, or one with `log_image`, as Weights & Biases' has; others are ignored.
        tag: name of the image.
        picture: uint8 (C, height, width).
        step: optimiser step.
    """
    picture = np.asarray(picture)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, picture, step)
    elif takes_pictures(logger):
        logger.log_image(key=tag, images=[picture.transpose(1, 2, 0)], step=step)  # type: ignore[attr-defined]


def log_lines(logger: Logger, tag: str, lines: Sequence[str], step: int) -> None:
    """Log lines of text as a numbered list, in TensorBoard alone; called in the first process only."""
    if isinstance(logger, TensorBoardLogger):
        shown = (" ".join(line.split())[:300].replace("<", "&lt;") for line in lines)
        logger.experiment.add_text(tag, "\n".join(f"{i}. {line}" for i, line in enumerate(shown, 1)), step)


def hparams_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that runs are compared by: `COLUMNS`, then others set on the command line; 12 at most."""
    flat = {"seed": config["seed"]}
    for group in ("residual", "model", "flow", "sampler", "optim", "data", "trainer", "callbacks"):
        flat |= flatten(config[group], group)
    flat |= group_choices()  # the name of `residual` in `configs/`, not that of its class
    others = [key for key in map(key_of, distinctive_overrides()) if key in flat and key not in COLUMNS]
    names = [*COLUMNS, *others][:MAX_COLUMNS]
    return {name: flat[name] for name in names if name in flat}


class _LazyWriter(SummaryWriter):
    """Creates its file with the first event; Lightning requests the writer before anything is logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._made = False
        super().__init__(*args, **kwargs)
        self._made = True

    def _get_file_writer(self) -> Any:
        if not self._made:
            return None
        if self.file_writer is None:
            _wait_for_the_next_second(Path(self.log_dir))
        return super()._get_file_writer()


def _wait_for_the_next_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second of their creation.

    A resumed run's file must come after the file that it continues, so they may not share a second.
    """
    names = [path.name.removeprefix("events.out.tfevents.") for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(name[:10]) for name in names if name[:10].isdecimal()), default=0)
    while 0 <= newest - int(time.time()) < 2:  # gives up on a clock that is further off
        time.sleep(0.05)


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without its `epoch` curve (runs are counted in steps), and with the complete config.

    Nothing is written before the first metrics, so that a run which fails earlier does not appear.

    Args:
        folder: of the event files.
        purge_step: the run's first step; points logged there and later by a killed process are hidden.
    """

    def __init__(self, folder: str, purge_step: NonNegativeInt = 0) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self._config: dict[str, Any] | None = None
        self._first_step = purge_step

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            self._experiment = _LazyWriter(self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._config is not None:
            config, self._config = self._config, None
            self._write_config(config)
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Keep the resolved config until the first metrics."""
        self._config = params if isinstance(params, dict) else vars(params)

    def _write_config(self, config: dict[str, Any]) -> None:
        """Log the config as YAML and the run's row in the HParams tab, whose results are the curves' last points."""
        text = to_yaml(config)
        self.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), self._first_step)
        writer = self.experiment._get_file_writer()
        *begin, _ = hparams(hparams_of(config), dict.fromkeys(RESULTS, 0.0))
        for summary in begin:
            writer.add_summary(summary, self._first_step)

    def summary(self) -> list[str]:
        """Lines for the end of the run."""
        return [f"watch            tensorboard --logdir {Path(self.log_dir)}"]

    @rank_zero_only
    def log_finished(self) -> None:
        """Mark the run's row in the HParams tab as finished."""
        if self._experiment is not None:
            *_, end = hparams({}, {})
            self.experiment._get_file_writer().add_summary(end, self._first_step)

    @rank_zero_only
    def save(self) -> None:
        if self._experiment is not None:
            self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self.experiment.close()


class _Rows(ExperimentWriter):
    """Lightning's writer, except that existing rows before a step are kept."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        self._first_step = first_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be incomplete
        kept = [row for row in rows if int(row["step"]) < self._first_step]
        self.metrics_keys = sorted({key for row in kept for key in row if row[key] != ""})
        partial = path.with_suffix(".new")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, path)


class Csv(CSVLogger):
    """Lightning's logger with one file for a run and its resumes, and without the column `epoch`.

    Args:
        folder: of `metrics.csv` and `hparams.yaml`.
        purge_step: the run's first step; rows of that step and later, from a killed process, are dropped.
    """

    def __init__(self, folder: str, purge_step: NonNegativeInt = 0) -> None:
        super().__init__(folder, name="", version="")
        self._first_step = purge_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self._first_step)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class Wandb(WandbLogger):
    """Lightning's logger for Weights & Biases, with one W&B run for a run and its resumes.

    Account, team, server and key are settings of wandb's own (`wandb login`, WANDB_API_KEY, WANDB_ENTITY,
    WANDB_BASE_URL …). No config can name them, and only wandb reads the key.

    Args:
        folder: of the run; W&B's files go to `wandb/` in it.
        project: of the W&B account.
        offline: send nothing; `wandb sync <folder>/wandb/offline-run-*` uploads later.
        tags: of the W&B run.
        purge_step: not used: W&B cannot drop points. Steps repeated after a kill are there twice, with equal values.
    """

    def __init__(
        self,
        folder: str,
        project: str = "mvsplit",
        offline: bool = True,
        tags: list[str] | None = None,
        purge_step: NonNegativeInt = 0,
    ) -> None:
        run = Path(folder)
        name = hashlib.sha256(f"{run.parent.name}/{run.name}".encode()).hexdigest()[:12]
        settings = {"symlink": False}  # a run's folder with links that lead elsewhere is not resumed
        super().__init__(
            run.name, save_dir=folder, offline=offline, id=name, project=project, tags=tags, settings=settings
        )
        del self._wandb_init["anonymous"]  # no longer an argument of wandb's

    @staticmethod
    def check(folder: str) -> None:
        """Check that wandb is installed.

        Raises:
            UserError: if it is not.
        """
        if find_spec("wandb") is None:
            raise UserError("logger: wandb is not installed; pip install -e '.[wandb]'")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; one that an earlier job of a sweep left open is finished first."""
        import wandb

        if self._experiment is None:
            for settings in Path(str(self._save_dir)).glob("*wandb/settings"):  # or .wandb/settings
                # It could name another server, which would be sent the key.
                raise UserError(f"{settings}: W&B's settings are not read from a run's folder; remove this file")
            if wandb.run is not None:
                wandb.finish()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status != "success" and self._experiment is not None:  # success: more may be logged, by a test or a sweep
            self._experiment.finish(exit_code=1)
