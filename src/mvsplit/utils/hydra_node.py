"""Check Hydra's own node (`hydra: …`) in every config that Hydra composes, before Hydra acts on it.

Any config file can set that node, and Hydra builds objects, opens log files and sets environment variables as it says,
all before our check of the rest. So the node may hold only what `ALLOWED` lists; a fork that launches or sweeps with
another plugin adds its keys there.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf
from pydantic import StringConstraints

from mvsplit.utils.config import check_value
from mvsplit.utils.errors import UserError

FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^$/]*$")]
"""No interpolation, and no `ext://…`, which Python's logging would import."""

ALLOWED: dict[str, Any] = {
    r"launcher\._target_": Literal["hydra._internal.core_plugins.basic_launcher.BasicLauncher"],
    r"sweeper\._target_": Literal["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"],
    r"sweeper\.max_batch_size": int,
    r"sweeper\.params\..+": Any,  # command lines of jobs, whose configs are checked in their turn
    r"output_subdir": Literal[".hydra"],
    r"\w+_logging\.(version|disable_existing_loggers)": int | bool,
    r"\w+_logging\.formatters\.\w+\.(format|datefmt)": Text,
    r"\w+_logging\.handlers\.\w+\.class": Literal["logging.StreamHandler", "logging.FileHandler"],
    r"\w+_logging\.handlers\.\w+\.(formatter|level)": Text | int,
    r"\w+_logging\.handlers\.\w+\.stream": Literal["ext://sys.stdout", "ext://sys.stderr"],
    r"\w+_logging\.handlers\.\w+\.filename": Literal[
        "${hydra.runtime.output_dir}/${task_name}.log", "${hydra.runtime.output_dir}/${hydra.job.name}.log"
    ],
    r"\w+_logging\.(root|loggers\.[\w.]+)\.(level|propagate)": Text | int | bool,
    r"\w+_logging\.(root|loggers\.[\w.]+)\.handlers": list[Text],
    r"job\.name": FileName,
    r"job\.chdir": bool,
    # What Hydra writes down or prints.
    r"(mode|verbose|searchpath|job\.(id|num|config_name|override_dirname)|job\.config\..+)": Any,
    r"(overrides|runtime|help|hydra_help)\..+": Any,
}
"""Keys below `hydra` and their values, before interpolation. Whatever is null or empty is allowed too."""

FOLDERS = {
    "hydra.run.dir": (
        "${run_dir:${paths.log_dir},${task_name},${oc.select:ckpt_path},${hydra.overrides.task}}",
        "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}",  # Hydra's own default
    ),
    "hydra.sweep.dir": (
        "${sweep_dir:${paths.log_dir},${task_name},${oc.select:ckpt_path},${hydra.overrides.task}}",
        "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    ),
    "hydra.sweep.subdir": ("${hydra.job.num}",),
    "paths.output_dir": ("${hydra:runtime.output_dir}",),
}
"""New folders of a run. Others, in which something may lie already, only the user chooses, on the command line."""


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's composer of configs, for the command line as for each job of a sweep, with the check behind it."""

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        config = super().load_configuration(*args, **kwargs)
        check_hydra_node(config)
        return config

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Any], repo: Any) -> None:
        # While composing: a search path of Python modules imports them.
        primary = repo.load_config(config_path=config_name) if config_name is not None else None
        paths = [OmegaConf.select(primary.config, "hydra.searchpath")] if primary is not None else []
        paths += [o.value() for o in parsed_overrides if o.get_key_element() == "hydra.searchpath"]
        for path in (str(entry) for entries in paths for entry in entries or ()):
            if "://" in path.removeprefix("file://"):
                raise UserError(f"hydra.searchpath = {path}: allowed are folders")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


@contextmanager
def checked() -> Iterator[None]:
    """Have Hydra compose with `CheckedLoader`."""
    hydra._internal.hydra.ConfigLoaderImpl = CheckedLoader  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hydra._internal.hydra.ConfigLoaderImpl = ConfigLoaderImpl  # type: ignore[attr-defined]


def check_hydra_node(config: DictConfig) -> None:
    """Check what a composed config tells Hydra to do.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    if "task_name" in config:  # names the log file and a folder
        check_value("task_name", config.task_name, FileName)
    leaves = list(_leaves("", OmegaConf.to_container(config, resolve=False)))  # a key with dots can look like another
    typed = {argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:]}
    for key, usual in FOLDERS.items():
        if key in typed or key.partition(".")[0] not in config:
            continue
        for value in [value for name, value in leaves if name == key] or [None]:
            if value not in usual:
                raise UserError(f"{key} = {value}: another folder can only be given on the command line, {key}=…")
    for key, value in leaves:
        if key.partition(".")[0] == "hydra" and key not in FOLDERS:
            hint = next((hint for name, hint in ALLOWED.items() if re.fullmatch(rf"hydra\.{name}", key)), None)
            if hint is None:
                raise UserError(f"{key} = {value}: not one of Hydra's keys that {__name__} allows")
            check_value(key, value, hint)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), child)
    elif value is not None and value != []:
        yield path, value
