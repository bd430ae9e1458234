"""A real run on two processes whose guard is given forged statistics; each rank writes down what it held.

python guard_worker.py FOLDER key=value …
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from integration.test_guard import Record, prepare  # noqa: E402

from mvsplit.callbacks.monitor import StepMonitor  # noqa: E402
from mvsplit.data.folders import RESOLVERS  # noqa: E402
from mvsplit.utils.config import build, to_plain  # noqa: E402
from mvsplit.utils.resolvers import register_resolvers  # noqa: E402
from mvsplit.utils.run_dirs import PROJECT_ROOT  # noqa: E402


class Keep(Record):
    """Lets the guard skip in the first three steps, and roll back after them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        monitor = next(c for c in trainer.callbacks if isinstance(c, StepMonitor))
        if trainer.global_step == 3:
            assert monitor.guard is not None
            monitor.guard.action = "rollback"
            monitor.detector.went_back()  # a recovery takes longer

    def on_train_end(self, trainer: Any, module: Any) -> None:
        torch.save({"before": self.before, "after": self.after}, self.folder / f"guard_rank_{trainer.global_rank}.pt")


def main(folder: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    register_resolvers(RESOLVERS)
    small = ["model=tiny", "data.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_steps=8",
             "trainer.accumulate_grad_batches=2", "optim.warmup_steps=2", "optim.schedule=constant",
             "callbacks.monitor.guard.action=skip", "callbacks.monitor.guard.margin=2"]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        config = to_plain(compose("train.yaml", overrides=[f"paths.output_dir={folder}", *small, *overrides]))
    callbacks = [build(config["callbacks"][name]) for name in ("ema", "monitor")]
    settings = {"callbacks": prepare(callbacks, (2, 5), Keep(folder)), "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "limit_val_batches": 0}  # fmt: skip
    build(config["trainer"] | settings).fit(build(config["module"]), datamodule=build(config["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
