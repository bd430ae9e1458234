"""Measure: `python src/bench.py data|depth|gpu|memory|precision|stability [key=value …]`; `configs/bench_*.yaml`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import train
from mvsplit.benchmarks import data, depth, memory, precision, stability
from mvsplit.benchmarks.gpu import frame as gpu
from mvsplit.training import run
from mvsplit.utils import entry
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.errors import UserError


def train_here(overrides: list[str], folder: Path) -> dict[str, float]:
    """The final metrics of a small real training run with this output folder."""
    cfg = compose("train.yaml", overrides)
    cfg.paths.output_dir = str(folder)
    return train.train(cfg)[0]


def bench_data(cfg: DictConfig) -> dict[str, Any]:
    """Measure reading; the figures are shown, kept as `bench_data.json` in the run folder, and returned."""
    config = to_plain(cfg)
    check_config(config, data.Config)
    return data.measure(config, Path(config["paths"]["output_dir"]), train_here)


def bench_depth(cfg: DictConfig) -> dict[str, Any]:
    """Measure what depth costs; the figures are shown, kept as `bench_depth.json` in the run folder, and returned."""
    config = to_plain(cfg)
    check_config(config, depth.Config)
    return depth.measure(config, Path(config["paths"]["output_dir"]))


def bench_gpu(cfg: DictConfig) -> None:
    """Try everything on this machine's GPU, as far as it is not done; exits with 1 if something failed."""
    config = to_plain(cfg)
    check_config(config, gpu.Config)
    if not gpu.measure(config, Path(config["paths"]["output_dir"])):
        sys.exit(1)


def bench_memory(cfg: DictConfig) -> dict[str, Any]:
    """Plan the memory of a training run; the figures are shown, kept as `bench_memory.json`, and returned."""
    config = to_plain(cfg)
    check_config(config, memory.Config)
    run.check_together(config)
    own = {field.name for field in fields(memory.Config)} - {field.name for field in fields(run.TrainConfig)}
    hydra = HydraConfig.get()
    check_experiment(hydra)
    overrides = train_overrides(hydra, own | {"logger"})
    return memory.report(config, overrides, Path(config["paths"]["output_dir"]))


def bench_precision(cfg: DictConfig) -> dict[str, Any]:
    """Measure the errors of bf16; the figures are shown, kept as `bench_precision.json`, and returned."""
    config = to_plain(cfg)
    check_config(config, precision.Config)
    precision.Config.check(config["width"], config["num_heads"], config["device"])
    return precision.measure(config, Path(config["paths"]["output_dir"]))


def bench_stability(cfg: DictConfig) -> dict[str, Any]:
    """Measure what watching costs; the figures are shown, kept as `bench_stability.json`, and returned."""
    config = to_plain(cfg)
    check_config(config, stability.Config)
    folder = Path(config["paths"]["output_dir"])
    steps = [f"trainer.max_steps={config['steps']}", f"trainer.val_check_interval={config['steps']}"]
    chosen = compose("train.yaml", [*config["overrides"], *steps, f"seed={config['seed']}"])
    chosen.paths = cfg.paths
    training = to_plain(chosen)
    check_config(training, run.TrainConfig)
    run.check_together(training)
    return stability.measure(config, training, folder)


def check_experiment(hydra: Any) -> None:
    """Raise `UserError` if groups of `bench_memory.yaml` would silently take the place of an experiment's."""
    given = {override.partition("=")[0] for override in hydra.overrides.task}
    missing = [f"{group}=…" for group in ("data", "model", "trainer") if group not in given]
    if hydra.runtime.choices.get("experiment") and missing:
        raise UserError(
            f"experiment = {hydra.runtime.choices['experiment']}: the benchmark's own defaults would replace the"
            f" experiment's groups; give {' '.join(missing)} as well"
        )


def train_overrides(hydra: Any, own: set[str]) -> list[str]:
    """What leads from `train.yaml` to the training config of this command, without the benchmark's own keys."""
    groups = {group: hydra.runtime.choices[group] for group in ("data", "model", "trainer")}
    given = [o for o in hydra.overrides.task if o.lstrip("+~").partition("=")[0].partition(".")[0] not in own]
    return [f"{group}={choice}" for group, choice in groups.items() if f"{group}={choice}" not in given] + given


BENCHMARKS = {
    "data": bench_data,
    "depth": bench_depth,
    "gpu": bench_gpu,
    "memory": bench_memory,
    "precision": bench_precision,
    "stability": bench_stability,
}


def split_command(argv: list[str]) -> tuple[str, list[str]]:
    """The benchmark that a command names, and the rest of the command.

    Raises:
        UserError: if it names none, or none of ours.
    """
    name = next((arg for arg in argv[1:] if "=" not in arg and not arg.startswith("-")), None)
    if name not in BENCHMARKS:
        given = f"'{name}' is none" if name else "none is named"
        raise UserError(f"benchmark: {given}; allowed are {', '.join(BENCHMARKS)}, as in `python src/bench.py data`")
    rest = list(argv)
    rest.remove(name)
    return name, rest


if __name__ == "__main__":
    with entry.told():
        benchmark, sys.argv = split_command(sys.argv)
    entry.run(BENCHMARKS[benchmark], f"bench_{benchmark}.yaml", planning=benchmark == "memory")
