"""`src/train.py` with the callbacks of `callbacks.py`: `python -m mvsplit.benchmarks.gpu.run key=value …`.

With `MVSPLIT_GLOO` in the environment, processes that share one GPU talk over gloo: NCCL refuses that.
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import os
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy

import train
from mvsplit.utils import config, entry

if __name__ == "__main__":
    config.PACKAGES += ("mvsplit.benchmarks.gpu.callbacks.",)  # type: ignore[assignment]
    if "MVSPLIT_GLOO" in os.environ:
        strategies: tuple[Any, ...] = (DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
        for strategy in strategies:
            strategy._get_process_group_backend = lambda self: "gloo"
    entry.run(train.main, "train.yaml")
