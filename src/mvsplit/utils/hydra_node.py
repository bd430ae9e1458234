"""Check Hydra's own node (`hydra: …`) in every config that Hydra composes, before Hydra acts on it.

Any config file can set that node. From it Hydra builds objects, opens log files and sets environment variables, all
before our check of the rest. So the node may hold only the keys in `ALLOWED` and those in the allow-list
(`allowed.py`), which is where another launcher or sweeper is added.
"""

import copy
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import hydra._internal.hydra
import omegaconf._utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import PositiveInt, StringConstraints

from mvsplit.utils import run_dirs
from mvsplit.utils.allowed import MORE, OwnersList, owners_list
from mvsplit.utils.config import check_value
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import bounded, check_interpolations

FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^$/]*$")]
"""No interpolation, and no `ext://…`, which Python's logging would import."""
Word = Annotated[str, StringConstraints(pattern=r"^[\w.,:=&|*+-]*$")]
"""One word: it is written into the header of a shell script for sbatch."""

SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher."
OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"

ALLOWED: dict[str, Any] = {
    r"launcher\._target_": Literal[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    ],
    # Jobs are pickled there, for submitit's own worker: always in the sweep's own folder.
    r"launcher\.submitit_folder": Literal["${hydra.sweep.dir}/.submitit/%j"],
    r"launcher\.name": Literal["${hydra.job.name}"],
    r"launcher\.((cpus|gpus)_per_(task|node|gpu)|tasks_per_node|nodes|mem_gb|timeout_min)": PositiveInt,
    r"launcher\.(signal_delay_s|max_num_timeout|array_parallelism)": int,
    r"launcher\.(partition|qos|constraint|exclude|gres|mem_per_[cg]pu|account|comment)": Word,
    r"launcher\.stderr_to_stdout": bool,
    r"sweeper\._target_": Literal[
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    ],
    r"sweeper\.(max_batch_size|n_trials|n_jobs)": PositiveInt,
    r"sweeper\.max_failure_rate": float,
    r"sweeper\.direction": Literal["minimize", "maximize", "${optimized_direction}"],
    r"sweeper\.sampler\._target_": Literal["optuna.samplers.TPESampler", "optuna.samplers.RandomSampler"],
    r"sweeper\.sampler\.(seed|n_startup_trials|n_ei_candidates)": int | Literal["${seed}"],
    r"sweeper\.sampler\.(consider_\w+|multivariate|warn_independent_sampling)": bool,
    r"sweeper\.sampler\.prior_weight": float,
    r"sweeper\.params\..+": Any,  # overrides of the jobs, whose configs are checked in turn
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
    # What Hydra records or prints.
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
    "hydra.sweep.subdir": (
        "${job_dir:${paths.log_dir},${task_name},${oc.select:ckpt_path},${hydra.overrides.task},${hydra.job.num}}",
        "${hydra.job.num}",
    ),
    "paths.output_dir": ("${hydra:runtime.output_dir}",),
}
"""Folders that Hydra makes for each run. Any other may hold files, and can only be given on the command line."""

WRITTEN = re.compile(
    r"(callbacks|logger)\.\w+\.(folder|dirpath|filename|save_dir|root_dir|log_dir|name|version)|trainer\.default_root_dir"
)
"""Where callbacks and loggers write, and remove files: inside the run's own folder."""


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's config loader, for the command line and for each job of a sweep, followed by our checks.

    Args:
        check_job: called with the config of each job, before any folder is made; None if no job will run.
        prepare: sets up a process that submitit starts, which unpickles this object, for composing configs.
    """

    def __init__(
        self, config_search_path: Any, check_job: Callable[[DictConfig], object] | None, prepare: Callable[[], object]
    ) -> None:
        super().__init__(config_search_path)
        self.check_job, self.prepare = check_job, prepare

    def __getstate__(self) -> dict[str, Any]:
        return {"loader": self.__dict__, "argv": sys.argv, "sweeps": run_dirs.sweeps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state["loader"]
        sys.argv = state["argv"]
        run_dirs.sweeps |= state["sweeps"]
        self.prepare()

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        config = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        check_hydra_node(config)
        # Not for `compose`, nor when Hydra only needs the mode.
        if self.check_job is not None and from_shell and validate_sweep_overrides:
            if run_mode == RunMode.RUN:
                check_before_run(config, self.check_job)
            else:
                prepare_launcher(config)
                check, self.check_job = self.check_job, None  # compose all jobs first, which is quick
                jobs = [self.load_sweep_config(config, job) for job in self._first_jobs(config)]
                self.check_job = check
                for job in jobs:
                    check_before_run(job, check)
        return config

    def _first_jobs(self, config: DictConfig) -> list[list[str]]:
        """Overrides of each job, or of one example if the sweeper chooses jobs by the results of earlier ones."""
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        sweep = OverridesParser.create(config_loader=self).parse_overrides([*params, *config.hydra.overrides.task])
        if config.hydra.sweeper._target_ == OPTUNA:
            _quieten_optuna()
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            given = {one.get_key_element(): one for one in sweep}  # the command line replaces the file's
            return [[f"{key}={_first_value(one)}" for key, one in given.items()]]
        return [list(job) for job in BasicSweeper.split_arguments(sweep, None)[0]]

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        if config_name is None and not overrides:  # Hydra would copy all its sources for each of --help's 170 groups
            return self.repository.get_group_options(group_name, results_filter)
        return super().get_group_options(group_name, results_filter, config_name, overrides)

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Any], repo: Any) -> None:
        # While composing: a search path of Python modules imports them.
        primary = repo.load_config(config_path=config_name) if config_name is not None else None
        paths = [OmegaConf.select(primary.config, "hydra.searchpath")] if primary is not None else []
        paths += [o.value() for o in parsed_overrides if o.get_key_element() == "hydra.searchpath"]
        for path in (str(entry) for entries in paths for entry in entries or ()):
            if "://" in path.removeprefix("file://"):
                raise UserError(f"hydra.searchpath = {path}: must be a folder")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


def _first_value(override: Any) -> str:
    if override.is_interval_sweep():
        return str(override.value().start)
    return str(next(override.sweep_string_iterator()) if override.is_sweep_override() else override.get_value_string())


def _quieten_optuna() -> None:
    """Silence Optuna's own log: Hydra's sweeper and our table report the same."""
    with warnings.catch_warnings(action="ignore"):  # of its database library, which is not used
        import optuna
    optuna.logging.set_verbosity(logging.WARNING)


def prepare_launcher(config: DictConfig) -> None:
    """Check that jobs can be launched here, and let the processes that submitit starts import the project.

    Raises:
        UserError: if SLURM is needed and missing.
    """
    kind = config.hydra.launcher._target_.removeprefix(SUBMITIT)
    if kind == "SlurmLauncher" and shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher = submitit_slurm: this machine has no srun; hydra/launcher=submitit_local runs the same"
            " jobs as local processes"
        )
    if kind != config.hydra.launcher._target_:
        paths = [str(run_dirs.PROJECT_ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@contextmanager
def checked(check_job: Callable[[DictConfig], object] | None, prepare: Callable[[], object]) -> Iterator[None]:
    """Make Hydra compose with `CheckedLoader`, from YAML within the limits of `utils/limits.py`."""
    again, yaml_loader = BasicSweeper.validate_batch_is_legal, omegaconf._utils.get_yaml_loader
    loader: Any = partial(CheckedLoader, check_job=check_job, prepare=prepare)
    hydra._internal.hydra.ConfigLoaderImpl = loader  # type: ignore[attr-defined]
    BasicSweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]
    omegaconf._utils.get_yaml_loader = lambda: bounded(yaml_loader())
    try:
        yield
    finally:
        omegaconf._utils.get_yaml_loader = yaml_loader
        hydra._internal.hydra.ConfigLoaderImpl = ConfigLoaderImpl  # type: ignore[attr-defined]
        BasicSweeper.validate_batch_is_legal = again  # type: ignore[method-assign]


def check_before_run(config: DictConfig, check_job: Callable[[DictConfig], object]) -> None:
    """Check the config of a job, as far as it is known before its folder is chosen and made."""
    config = copy.deepcopy(config)
    devices = config.get("trainer", {}).get("devices", 1)
    if devices != 1 and config.hydra.launcher._target_ == f"{SUBMITIT}LocalLauncher":
        raise UserError(f"trainer.devices = {devices}: must be 1; hydra/launcher=submitit_local runs a process per job")
    before = HydraConfig.instance().cfg
    with open_dict(config):
        config.hydra.runtime.output_dir = "<folder of the run>"
        config.hydra.job.num, config.hydra.job.id = 0, "0"
        HydraConfig.instance().set_config(config)  # for `${hydra:…}`
        del config["hydra"]
    try:
        check_job(config)
    finally:
        HydraConfig.instance().cfg = before


def check_hydra_node(config: DictConfig) -> None:
    """Check the node that a composed config holds for Hydra, and its folders.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    if "task_name" in config:  # names the log file and a folder
        check_value("task_name", config.task_name, FileName)
    leaves = list(_leaves("", OmegaConf.to_container(config, resolve=False)))  # a key with dots can look like another
    check_interpolations(leaves)
    typed = {argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:]}
    owners = owners_list()
    for key, usual in FOLDERS.items():
        if key in typed or key.partition(".")[0] not in config:
            continue
        for value in [value for name, value in leaves if name == key] or [None]:
            if value not in usual:
                raise UserError(f"{key} = {value}: only the command line can set another folder: {key}=…")
    for key, value in leaves:
        if WRITTEN.fullmatch(key) and key not in typed and not _is_in_run_folder(key, str(value)):
            raise UserError(f"{key} = {value}: only the command line can set another folder: {key}=…")
        if key.partition(".")[0] == "hydra" and key not in FOLDERS:
            check_value(key, value, _type_of(key.removeprefix("hydra."), value, owners))


def _type_of(key: str, value: Any, owners: OwnersList) -> Any:
    shipped = next((hint for pattern, hint in ALLOWED.items() if re.fullmatch(pattern, key)), None)
    owned = owners.hydra_type(key)
    if shipped is None and owned is None:
        raise UserError(f"hydra.{key} = {value}: not one of the Hydra keys that {__name__} allows; {MORE}")
    return owned if shipped is None else shipped if owned is None else shipped | owned


def _is_in_run_folder(key: str, value: str) -> bool:
    inside = value if key.endswith((".name", ".version", ".filename")) else value.removeprefix("${paths.output_dir}")
    outside = inside == value and value.startswith(("/", "~"))
    return not (outside or ".." in inside or "$" in inside)  # an interpolation could hide dots


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), child)
    elif value is not None and value != []:
        yield path, value
