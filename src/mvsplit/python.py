"""For notebooks and your own scripts: `from mvsplit import build, compose, load_run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.folders import RESOLVERS
from mvsplit.evaluation.generation import Generator, check_classes, draw
from mvsplit.evaluation.inputs import data_of, decoder_of
from mvsplit.flow.sampler import Sampler
from mvsplit.training import settings
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.config import build as build
from mvsplit.utils.entry import plain_overrides
from mvsplit.utils.errors import UserError
from mvsplit.utils.resolvers import register_resolvers
from mvsplit.utils.run_dirs import PROJECT_ROOT, find_checkpoint, new_name

LOG_DIR = PROJECT_ROOT / "logs"


class Run(SavedRun):
    """A trained network to sample from, and the data that it was trained on.

    Args:
        path: see `load_run`.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        log_dir: folder with this project's own runs.
    """

    def __init__(self, path: Path, weights: Literal["ema", "raw"], log_dir: Path) -> None:
        super().__init__(path, weights)
        self.weights, self.log_dir = weights, log_dir

    def draw(
        self,
        classes: Sequence[int],
        count: int = 1,
        seed: int = 0,
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw `count` images of each class, in rounds over all classes.

        Args:
            classes: class numbers.
            count: images per class.
            seed: of the noise.
            sampler: Euler with 25 steps and guidance 2 if None.
            batch_size: images drawn at once.

        Returns:
            (count · len(classes), C, height, width) on the CPU: latents, or images from −1 (black) to 1 (white) or
            slightly beyond.

        Raises:
            UserError: if the network was not trained on one of the classes.
        """
        check_classes(self, classes)
        sampler = sampler or Sampler()
        generator = Generator(self, sampler, seed, guide=self.guide_of(sampler))
        return draw(generator, list(classes) * count, batch_size)

    def guide_of(self, sampler: Sampler) -> "Run | None":
        """The run that the sampler names as a guide, if it names one.

        Raises:
            UserError: if it cannot be loaded.
        """
        try:
            return None if sampler.guide is None else load_run(sampler.guide, self.weights, self.log_dir)
        except UserError as error:
            raise UserError(str(error).replace("ckpt_path", "sampler.guide", 1)) from None

    def generator(self, config: dict[str, Any], whole_set: bool) -> Generator:
        """The network with the sampler, guide, precision and decoder that a command's config names.

        Args:
            config: of `sample.yaml` or `eval.yaml`, checked.
            whole_set: latents must be decoded; otherwise they may be shown as colours.

        Raises:
            UserError: if the guide or the autoencoder cannot be loaded, or does not fit.
        """
        sampler, decoder = build(config["sampler"]), decoder_of(self, config["autoencoder"], str(self.log_dir))
        if whole_set and self.latents is not None and decoder is None:
            raise UserError(
                "autoencoder = None: the network makes latents, which must be decoded; e.g. autoencoder=flux2"
            )
        return Generator(self, sampler, config["seed"], config["precision"], self.guide_of(sampler), decoder)

    def data(self, config: dict[str, Any] | None = None) -> ShardDataModule:
        """The data of the run's config, or of another: `compose("data=digits")["data"]`.

        Raises:
            UserError: if the run is from another log folder and no config is given, or the data do not fit the network.
        """
        data: ShardDataModule = build(data_of(self, config, str(self.log_dir)))
        return data


def load_run(
    path: str | Path = "last", weights: Literal["ema", "raw"] = "ema", log_dir: str | Path | None = None
) -> Run:
    """A trained network from the checkpoint of a run.

    Args:
        path: of a checkpoint, a run's folder (its last checkpoint) or a file written by `convert.py`; `last` for the
            newest run.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        log_dir: folder with all runs; the project's `logs` if None.

    Raises:
        UserError: if there is no checkpoint, or it is damaged.
    """
    logs = Path(log_dir or LOG_DIR)
    return Run(find_checkpoint(str(path), str(logs)), weights, logs)


def compose(*overrides: str) -> dict[str, Any]:
    """The checked config of `python src/train.py …` with these overrides, as plain dicts.

    `build(config["data"])` builds its data, `build(config["model"])()` its network.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    register_resolvers(RESOLVERS)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        cfg: DictConfig = hydra.compose("train.yaml", plain_overrides(overrides))
    if OmegaConf.is_interpolation(cfg.paths, "output_dir"):  # set by Hydra, in a command only
        cfg.paths.output_dir = str(Path(cfg.paths.log_dir) / cfg.task_name / "runs" / new_name())
    return settings.checked(cfg)
