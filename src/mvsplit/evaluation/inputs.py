"""The data, the autoencoder and the module that a saved run is evaluated with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvsplit.data.latent_space import LatentDecoder
from mvsplit.flow.sampler import Sampler
from mvsplit.training.module import FlowModule
from mvsplit.training.optim import AdamW
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.config import build, check_config
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import is_hub_folder


@dataclass
class OwnData:
    """The part of a local run's config that is used."""

    data: dict[str, Any]


def data_of(saved: SavedRun, given: dict[str, Any] | None, log_dir: str) -> dict[str, Any]:
    """The config of the data for an evaluation: `given`, or the run's own if it is in this log folder.

    A config from elsewhere could choose what is read, fetched, written and sent as a token on this machine.

    Raises:
        UserError: if there is no config, or it does not fit the network.
    """
    if given is None:
        if not is_own(saved, log_dir):
            raise UserError(
                f"data = None: {saved.path} is not a run of this log folder ({log_dir}), so its data are not used;"
                " choose data=digits or another config in configs/data"
            )
        given = saved.run_config.get("data")
        check_config({"data": given}, OwnData)
        assert given is not None
    for key, trained in saved.config["data"].items():
        if given.get(key) != trained:
            raise UserError(
                f"data.{key} = {given.get(key)}: the network in {saved.path} was trained with {trained}; choose its"
                f" training data, or data.{key}={str(trained).replace(' ', '')}"
            )
    return given


@dataclass
class OwnAutoencoder:
    """Likewise."""

    autoencoder: dict[str, Any] | None


def is_own(saved: SavedRun, log_dir: str) -> bool:
    """Whether it is a run of this log folder, whose config was made by commands on this machine."""
    if saved.path.is_file() or is_hub_folder(saved.path):
        return False
    return saved.path.is_relative_to(Path(log_dir).resolve())


def decoder_of(saved: SavedRun, given: dict[str, Any] | None, log_dir: str) -> LatentDecoder | None:
    """The decoder of a run's samples; None if they are images, or no autoencoder is given.

    Args:
        saved: the run.
        given: a checked config of the autoencoder; None is the run's own, if it is in this log folder.
        log_dir: folder with all runs.

    Raises:
        UserError: if it is not the autoencoder that encoded the latents.
    """
    if saved.latents is None:
        if given is not None:
            raise UserError("autoencoder: the network was trained on images, not latents; use null")
        return None
    if given is None and is_own(saved, log_dir):
        given = saved.run_config.get("autoencoder")
        check_config({"autoencoder": given}, OwnAutoencoder)
    return None if given is None else LatentDecoder(saved.latents, build(given))


def validating_module(saved: SavedRun) -> FlowModule:
    """The run's `FlowModule` with the saved network, for its validation loss."""
    module = FlowModule(lambda: saved.network, saved.flow, AdamW(), Sampler(), **saved.config["module"])
    module.network = saved.network
    return module
