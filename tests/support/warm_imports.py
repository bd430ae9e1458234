"""What scripts import, imported before they are forked; see `warm.py`."""

import deepspeed  # noqa: F401
import lightning.pytorch  # noqa: F401
import torch
import webdataset  # noqa: F401
from torch.utils import tensorboard  # noqa: F401

import mvsplit.data.datamodule
import mvsplit.training.module
import mvsplit.training.strategies
import mvsplit.utils.entry  # noqa: F401

torch.set_num_threads(1)
