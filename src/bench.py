"""Benchmarks: `python src/bench.py data|depth|gpu|kernels|memory|precision|sampling|save|stability|step [key=value …]`.

Keys are explained in `configs/bench_*.yaml`; `python src/bench.py data --help` shows those of `data`.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import importlib
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

import train
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import entry
from mvsplit.utils.config import to_checked
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT


def train_here(overrides: list[str], folder: Path) -> dict[str, float]:
    """Run a small training with this output folder and return its final metrics."""
    cfg = compose("train.yaml", overrides)
    cfg.paths.output_dir = str(folder)
    return train.train(cfg)[0]


def check(name: str, cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
    """A benchmark's module, imported once the command line is read, and its config as plain dicts.

    Raises:
        UserError: for a wrong value, or values that do not fit together.
    """
    module = importlib.import_module(f"mvsplit.benchmarks.{BENCHMARKS[name]}")
    config = to_checked(cfg, module.Config)
    if name == "memory":
        settings.check_together(config)
        module.check_sizes(config)
    elif name == "precision":
        module.Config.check(config["width"], config["num_heads"], config["device"])
    elif name in ("kernels", "sampling", "step"):
        module.check_values(config)
    elif name in ("save", "stability"):
        benchmark_run(cfg, config)
    return module, config


def bench(name: str, cfg: DictConfig) -> Any:
    """Measure, print the figures, save them as `bench_<name>.json` in the run folder, and return them."""
    module, config = check(name, cfg)
    folder = Path(config["paths"]["output_dir"])
    if name == "data":
        return module.measure(config, folder, train_here)
    if name == "memory":
        own = {field.name for field in fields(module.Config)} - {field.name for field in fields(settings.TrainConfig)}
        return module.report(config, train_overrides(HydraConfig.get(), own | {"logger"}), folder)
    if name in ("save", "stability"):
        return module.measure(config, benchmark_run(cfg, config), folder)
    figures = module.measure(config, folder)
    if name == "gpu" and not figures:
        sys.exit(1)  # something failed
    return figures


def benchmark_run(cfg: DictConfig, config: dict[str, Any]) -> dict[str, Any]:
    """The checked config of the training run that a benchmark measures."""
    count = config["steps"] if "steps" in config else (2 * config["saves"] + 1) * config["steps_between"]
    steps = [f"trainer.max_steps={count}", f"trainer.val_check_interval={count}"]
    chosen = compose("train.yaml", [*config["overrides"], *steps, f"seed={config['seed']}"])
    chosen.paths = cfg.paths
    return settings.checked(chosen)


def experiments_groups(argv: list[str]) -> list[str]:
    """The groups that a planned experiment chooses, as overrides: the benchmark's own would replace them."""
    experiments = [arg for arg in argv if arg.startswith("experiment=")]
    if len(experiments) != 1 or "," in experiments[0]:
        return []
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
            choices = compose("train.yaml", experiments, return_hydra_config=True).hydra.runtime.choices
    except HydraException:
        return []  # reported when the whole command is composed
    given = {arg.partition("=")[0] for arg in argv}
    return [f"{group}={choices[group]}" for group in PLANNED_GROUPS if group not in given]


def train_overrides(hydra: Any, own: set[str]) -> list[str]:
    """The overrides of `train.yaml` that compose this command's training config, without the benchmark's own keys."""
    groups = {group: hydra.runtime.choices[group] for group in PLANNED_GROUPS}
    given = [o for o in hydra.overrides.task if o.lstrip("+~").partition("=")[0].partition(".")[0] not in own]
    return [f"{group}={choice}" for group, choice in groups.items() if f"{group}={choice}" not in given] + given


BENCHMARKS = {
    "data": "data",
    "depth": "depth",
    "gpu": "gpu.frame",
    "kernels": "kernel_cost",
    "memory": "memory",
    "precision": "precision",
    "sampling": "sampling_cost",
    "save": "saving",
    "stability": "monitor_cost",
    "step": "step_cost",
}
"""Benchmark → its module in `mvsplit.benchmarks`."""


PLANNED_GROUPS = ("data", "model", "trainer")
"""Groups that `bench_memory.yaml` chooses in place of those of `train.yaml`."""


def split_command(argv: list[str]) -> tuple[str, list[str]]:
    """The benchmark that a command names, and the remaining arguments.

    Raises:
        UserError: if it names no benchmark, or an unknown one.
    """
    name = next((arg for arg in argv[1:] if "=" not in arg and not arg.startswith("-")), None)
    if name not in BENCHMARKS:
        given = f" = {name}: unknown" if name else ": missing"
        raise UserError(f"benchmark{given}; allowed: {', '.join(BENCHMARKS)}, as in `python src/bench.py data`")
    rest = list(argv)
    rest.remove(name)
    return name, rest


if __name__ == "__main__":
    with entry.report_user_errors():
        if sys.argv[1:] in (["-h"], ["--help"]):
            sys.exit(print(__doc__))
        benchmark, sys.argv = split_command(sys.argv)
        if benchmark == "memory":
            sys.argv += experiments_groups(sys.argv)
    run, checked = partial(bench, benchmark), partial(check, benchmark)
    entry.run(run, f"bench_{benchmark}.yaml", checked, RESOLVERS, planning=benchmark == "memory")
