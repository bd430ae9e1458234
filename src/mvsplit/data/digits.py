"""The embedded data set: scikit-learn's handwritten digits (1,797 grey images of 8 × 8, ten classes, no download).

Written as ordinary shards and read like any other data set.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torchvision.io import encode_png

from mvsplit.data.shard_writer import write_shards

NUM_VAL = 297
"""Images held out for validation; 1,500 remain for training."""


def write_digits(folder: Path) -> None:
    """Write `train-*.tar` and `val-*.tar` into the folder; the split is the same on every machine."""
    digits = load_digits()
    images = torch.from_numpy(digits.data).reshape(-1, 1, 8, 8)  # 0 … 16
    images = (images * (255 / 16)).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    for name, chosen in (("val", order[:NUM_VAL]), ("train", order[NUM_VAL:])):
        samples = ((encode_png(images[i]).numpy().tobytes(), "png", int(digits.target[i])) for i in chosen)
        write_shards(folder, name, samples, shard_size=500)
