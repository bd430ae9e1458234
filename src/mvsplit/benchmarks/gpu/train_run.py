"""`src/train.py` with the callbacks of `probes.py`: `python -m mvsplit.benchmarks.gpu.train_run key=value …`.

With `MVSPLIT_GLOO` in the environment, processes communicate over gloo: NCCL does not let them share one GPU.
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import os

from lightning.pytorch import strategies

import train
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import config, entry

if __name__ == "__main__":
    config.PACKAGES += ("mvsplit.benchmarks.gpu.probes.",)  # type: ignore[assignment]
    if "MVSPLIT_GLOO" in os.environ:
        for name in ("DDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
            getattr(strategies, name)._get_process_group_backend = lambda self: "gloo"
    entry.run(train.main, "train.yaml", settings.checked, RESOLVERS)
