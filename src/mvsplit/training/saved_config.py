"""The part of a saved run's config that users of its weights may read: network, flow, and the shape of a sample.

A saved config may come from anywhere, so it never decides where data are, what is written or which secrets are read.
"""

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, Len
from pydantic import NonNegativeInt, PositiveInt

from mvsplit.utils.config import Seed, check_config
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import parse_yaml

BUILT = {"model": ("mvsplit.models.",), "flow": ("mvsplit.flow.",)}
"""Groups that are built, and packages whose classes they may name; a fork adds the package of its own network here."""


@dataclass
class SampleShape:
    """Keys of `data`."""

    image_size: Annotated[list[PositiveInt], Len(2, 2)]
    channels: PositiveInt
    num_classes: NonNegativeInt  # 0: samples have no class


@dataclass
class Validation:
    """Keys of `module`."""

    seed: Seed
    time_bins: Annotated[int, Ge(1), Le(1000)]
    val_times: PositiveInt


@dataclass
class SavedConfig:
    """The part of a run's config that describes its weights."""

    model: dict[str, Any]
    flow: dict[str, Any]
    data: SampleShape
    module: Validation


def parse_config(text: bytes | str, where: str) -> dict[str, Any]:
    """A run's whole config, unchecked."""
    config = parse_yaml(text, where)
    if not isinstance(config, dict):
        raise UserError(f"{where}: not the config of a run")
    return config


def portable(config: dict[str, Any], schema: type = SavedConfig) -> dict[str, Any]:
    """The part of a run's config that describes its weights; missing keys stay missing."""
    part = {}
    for key, hint in typing.get_type_hints(schema).items():
        if key in config:
            value = config[key]
            part[key] = (
                portable(value, hint) if isinstance(value, dict) and hint in (SampleShape, Validation) else value
            )
    return part


def check_generates(config: dict[str, Any], path: Path) -> None:
    """Check that a run's network was trained to generate samples (`module=flow`).

    Args:
        config: of the run, unchecked; perhaps only its portable part.
        path: of the checkpoint.

    Raises:
        UserError: if it was trained for another task.
    """
    module = config.get("module")
    if isinstance(module, dict) and "seed" in module and not module.keys() & {"time_bins", "val_times"}:
        raise UserError(
            f"ckpt_path = {path}: not trained with module=flow, so it cannot be sampled or evaluated here;"
            " to test it, repeat its own command with train=false ckpt_path=…"
        )


def check_saved_config(config: dict[str, Any]) -> None:
    """Check that part.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    for group, packages in BUILT.items():
        for path, target in _targets(group, config.get(group)):
            if not str(target).startswith(packages):
                allowed = ", ".join(package.removesuffix(".") for package in packages)
                raise UserError(f"{path}._target_ = {target}: must be a class of {allowed} in a saved config")
    check_config(config, SavedConfig)


def _targets(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value["_target_"]
        for key, child in value.items():
            yield from _targets(f"{path}.{key}", child)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _targets(f"{path}.{number}", child)
