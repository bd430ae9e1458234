"""For notebooks and your own scripts: `from mvsplit import build, compose, load`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mvsplit.data.autoencoders import Autoencoder
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.folders import RESOLVERS
from mvsplit.data.latent_space import LatentDecoder
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.evaluation.generation import Generator, Precision, check_conditions, draw
from mvsplit.evaluation.inputs import data_of, decoder_of
from mvsplit.evaluation.prompts import Prompts, read_prompts
from mvsplit.flow.sampler import Sampler
from mvsplit.training import settings
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.config import build as build
from mvsplit.utils.entry import plain_overrides
from mvsplit.utils.errors import UserError
from mvsplit.utils.resolvers import register_resolvers
from mvsplit.utils.run_dirs import PROJECT_ROOT, find_checkpoint, new_name

LOG_DIR = PROJECT_ROOT / "logs"
Weights = Literal["ema", "raw"]


class Run(SavedRun):
    """A trained network to sample from, and the data that it was trained on.

    Args:
        path: see `load`.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        precision: of the weights.
        log_dir: folder with this project's own runs.
    """

    def __init__(self, path: Path, weights: Weights, precision: Precision, log_dir: Path) -> None:
        super().__init__(path, weights, precision)
        self.weights, self.precision, self.log_dir = weights, precision, log_dir

    def sample(
        self,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | str | None = None,
        count: int = 1,
        seed: int = 0,
        sampler: Sampler | None = None,
        batch_size: int = 64,
        text_encoder: TextEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        image_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw `count` images of each class or prompt, in rounds over all of them.

        Args:
            classes: class numbers, for a network that was trained on classes.
            prompts: for a network that was trained on captions: a list, or the path of a file with one per line.
            count: images per class or prompt.
            seed: of the noise.
            sampler: Euler with 25 steps and guidance 2 if None.
            batch_size: images drawn at once. Prompts are padded to the longest of a batch, which changes the images.
            text_encoder: of the prompts: the one that encoded the captions.
            autoencoder: decodes latents; None leaves them as they are.
            image_size: [height, width] of what the network draws, pixels or latent cells; None is as it was trained.

        Returns:
            (count · number of classes or prompts, C, height, width) on the CPU: latents, or images from −1 (black) to 1
            (white) or slightly beyond.

        Raises:
            UserError: if the network was not trained on one of the classes, or text encoder, autoencoder or size do not
                fit it.
        """
        check_conditions(self, classes, prompts)
        sampler = sampler or Sampler()
        asked = None
        if prompts is not None:
            if text_encoder is None:
                raise UserError("text_encoder = None: prompts need the text encoder of the captions")
            asked = Prompts(read_prompts(prompts), text_encoder)
        decoder = None
        if autoencoder is not None:
            if self.latents is None:
                raise UserError("autoencoder: the network was trained on images, not latents; use None")
            decoder = LatentDecoder(self.latents, autoencoder)
        generator = Generator(self, sampler, seed, self.precision, self.guide_of(sampler), decoder, asked, image_size)
        chosen = range(len(asked.texts)) if asked is not None else classes or ()
        return draw(generator, list(chosen) * count, batch_size)

    def guide_of(self, sampler: Sampler) -> "Run | None":
        """The run that the sampler names as a guide, if it names one.

        Raises:
            UserError: if it cannot be loaded.
        """
        try:
            if sampler.guide is None:
                return None
            return load(sampler.guide, self.weights, self.precision, self.log_dir)
        except UserError as error:
            raise UserError(str(error).replace("ckpt_path", "sampler.guide", 1)) from None

    def generator(self, config: dict[str, Any], whole_set: bool) -> Generator:
        """The network with the sampler, guide, precision and decoder that a command's config names.

        Args:
            config: of `sample.yaml` or `eval.yaml`, checked.
            whole_set: latents must be decoded; otherwise they may be shown as colours.

        Raises:
            UserError: if guide, autoencoder, text encoder or prompts cannot be loaded, or do not fit.
        """
        sampler, decoder = build(config["sampler"]), decoder_of(self, config["autoencoder"], str(self.log_dir))
        if whole_set and self.latents is not None and decoder is None:
            raise UserError(
                "autoencoder = None: the network makes latents, which must be decoded; e.g. autoencoder=flux2"
            )
        prompts = None
        if config.get("prompts") is not None:
            prompts = Prompts(read_prompts(config["prompts"]), build(config["text_encoder"]))
        guide, size = self.guide_of(sampler), config.get("image_size")
        return Generator(self, sampler, config["seed"], config["precision"], guide, decoder, prompts, size)

    def data(self, config: dict[str, Any] | None = None) -> ShardDataModule:
        """The data of the run's config, or of another: `compose("data=digits")["data"]`.

        Raises:
            UserError: if the run is from another log folder and no config is given, or the data do not fit the network.
        """
        data: ShardDataModule = build(data_of(self, config, str(self.log_dir)))
        return data


def load(
    path: str | Path = "last",
    weights: Weights = "ema",
    precision: Precision = "float32",
    log_dir: str | Path | None = None,
) -> Run:
    """A trained network.

    Args:
        path: of a checkpoint, a run's folder (its last checkpoint), a file or a hub folder written by `convert.py`;
            `last` for the newest run.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        precision: of the weights in memory: bfloat16 takes half as much.
        log_dir: folder with all runs; the project's `logs` if None.

    Raises:
        UserError: if there is no checkpoint, or it is damaged.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision = {precision}: allowed: {', '.join(get_args(Precision))}")
    logs = Path(log_dir or LOG_DIR)
    return Run(find_checkpoint(str(path), str(logs)), weights, precision, logs)


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
