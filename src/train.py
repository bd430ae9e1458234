"""Train: `python src/train.py [experiment=NAME] [key=value …]`. Every config key is explained in `configs/`."""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

from typing import Any

from omegaconf import DictConfig

from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import entry, sweeps
from mvsplit.utils.config import build, build_each
from mvsplit.utils.errors import UserError

# Modules that need PyTorch are imported below, after the config is checked: mistakes are reported at once.


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Build what the config says, train it, test it.

    Returns:
        The final metrics, and the objects: see `assemble`.

    Raises:
        UserError: for anything that the user can fix.
    """
    config = settings.checked(cfg)
    from mvsplit.training import session

    with session.opened(config) as ckpt_path:
        objects = assemble(config)
        return session.run(objects, ckpt_path), objects


def assemble(config: dict[str, Any]) -> dict[str, Any]:
    """The objects of a run: `config` (plain dict), `datamodule`, `module`, `callbacks`, `loggers`, `trainer`."""
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from mvsplit.training.checkpoint_io import FolderCheckpoints

    objects = {"config": config, "datamodule": build(config["data"]), "module": build(config["module"])}
    callbacks, loggers = build_each(config["callbacks"]), build_each(config["logger"])
    built = {
        "callbacks": callbacks,
        "logger": loggers or False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),  # ours, or none
        "plugins": [FolderCheckpoints()],
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
    }
    return objects | {"callbacks": callbacks, "loggers": loggers, "trainer": build(config["trainer"] | built)}


def main(cfg: DictConfig) -> float | None:
    """Hydra's entry point.

    Returns:
        The optimised metric, for sweepers. A run stopped by a signal exits with that signal's status.
    """
    metrics, objects = train(cfg)
    from mvsplit.training import session

    session.exit_if_stopped(objects["callbacks"])
    name = cfg.get("optimized_metric")
    sweeps.record(metrics, name, cfg.get("optimized_direction"))
    if name is None:
        return None
    if name not in metrics:
        raise UserError(f"optimized_metric = {name}: must be one of {', '.join(sorted(metrics))}")
    return metrics[name]


if __name__ == "__main__":
    entry.run(main, "train.yaml", settings.checked, RESOLVERS)
