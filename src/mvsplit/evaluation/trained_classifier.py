"""A feature network for small sets: a convolutional classifier of their own images, trained on the spot.

Distances in its features can be compared with each other wherever its identity is the same, and with nothing published.

Shapes: B batch, C channels, K classes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.data.reader import ShardReader
from mvsplit.evaluation.feature_networks import FeatureNetwork, Features
from mvsplit.evaluation.weight_files import weights_sha256
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import permutation

MAX_SAMPLES = 20_000
"""Maximum number of images that it is trained on."""
MAX_BYTES = 1 << 30
"""Maximum size of their pixels in memory."""
STEPS, BATCH, RATE, DECAY = 400, 64, 1e-2, 1e-1
SEED = 0
WIDTHS, POOLED, GRID = (16, 32), 64, 4
"""Channels of the two convolutions, features of the last hidden layer, and side of the maps before it."""
SPATIAL_CHANNELS = 7
WEIGHT_STEP = 2.0**-16
"""Weights are rounded to its multiples. Processors sum in other orders: in float64 their weights differ by 10⁻¹⁴."""


class TrainedClassifier(FeatureNetwork):
    """Two convolutions and two linear layers, about 35,000 weights for grey images.

    Pooled features are the last hidden layer's 64; spatial ones are the first 7 channels of the second convolution's
    map, averaged to 4 × 4.

    Args:
        shape: (C, height, width) of the images, each side at least 4.
        num_classes: K.

    Attributes:
        accuracy: on held-out images.
    """

    num_features, knows_labels = POOLED, True
    num_spatial = SPATIAL_CHANNELS * GRID**2

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.shape, self.num_classes, self.accuracy = shape, num_classes, 0.0
        exact = torch.float64  # `fit` makes it float32
        self.first = nn.Conv2d(shape[0], WIDTHS[0], 3, padding=1, dtype=exact)
        self.second = nn.Conv2d(WIDTHS[0], WIDTHS[1], 3, padding=1, dtype=exact)
        self.hidden = nn.Linear(WIDTHS[1] * GRID**2, POOLED, dtype=exact)
        self.last = nn.Linear(POOLED, num_classes, dtype=exact)

    @classmethod
    def fit(cls, train: ShardReader, num_classes: int, val: ShardReader) -> "TrainedClassifier":
        """Train it: with the same images always to the same weights, with any processor and number of threads.

        It takes some seconds for images of 8 × 8, and time that grows with the number of pixels.

        Args:
            train: images of all classes, as validation sees them.
            num_classes: K.
            val: held-out images, for `accuracy`.

        Raises:
            UserError: if there are too many images, or none that can be read.
        """
        images, labels = load(train)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            one_thread(),
        ):
            torch.manual_seed(SEED)
            network = cls((images.shape[1], images.shape[2], images.shape[3]), num_classes)
            network._train(images, labels)
            network._finish(images)
        images, labels = load(val)
        with one_thread():
            found = torch.cat([network(part).probabilities.argmax(1) for part in images.split(BATCH)])
        network.accuracy = float((found == labels).double().mean())
        return network

    def _train(self, images: Tensor, labels: Tensor) -> None:
        optimiser = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY, foreach=False)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
        for chosen in _batches(len(images)):
            loss = F.cross_entropy(self._logits(self._hidden(self._map(images[chosen]))), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()

    @torch.no_grad()
    def _finish(self, images: Tensor) -> None:
        """Round the weights, and scale them so that features of the images are of order 1: KID takes their cubes."""
        self.requires_grad_(False).eval()
        for parameter in self.parameters():
            parameter.copy_((parameter / WEIGHT_STEP).round() * WEIGHT_STEP)
        self.float()
        squares = torch.cat([self(part).pooled.double().square().mean(1) for part in images.split(BATCH)])
        factor = 2.0 ** -round(math.log2(float(squares.mean().sqrt().clamp(2**-10, 2**10))))
        self.hidden.weight.mul_(factor)  # the next layer undoes it: nothing else changes, not even by rounding
        self.hidden.bias.mul_(factor)
        self.last.weight.div_(factor)

    def _map(self, images: Tensor) -> Tensor:
        """(B, C, height, width) uint8 → (B, 32, 4, 4)."""
        x = images.to(self.first.weight.dtype) / 127.5 - 1
        x = self.second(self.first(x).relu()).relu()
        return F.adaptive_avg_pool2d(x, GRID)

    def _hidden(self, maps: Tensor) -> Tensor:
        return self.hidden(maps.flatten(1)).relu()

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.last(hidden)

    def features(self, images: Tensor) -> Features:
        if images.shape[1:] != self.shape:
            raise UserError(f"images of {list(images.shape[1:])}: the classifier was trained on {list(self.shape)}")
        maps = self._map(images)
        hidden = self._hidden(maps)
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(hidden, spatial, self._logits(hidden).softmax(1))

    def identity(self) -> dict[str, Any]:
        return {"name": "TrainedClassifier", "sha256": weights_sha256(self.state_dict())}


def load(reader: ShardReader) -> tuple[Tensor, Tensor]:
    """All readable images (N, C, height, width) uint8 of a set, and their classes (N,).

    Raises:
        UserError: if they are too many, or none can be read.
    """
    if len(reader) > MAX_SAMPLES:
        raise UserError(f"data: the classifier takes at most {MAX_SAMPLES} of {len(reader)} images")
    images, labels = [], []
    for number in range(len(reader)):
        sample = reader[0, number]
        if number == 0 and (size := len(reader) * sample["image"].numel()) > MAX_BYTES:
            raise UserError(f"data: {len(reader)} images of {size} bytes; the classifier takes at most {MAX_BYTES}")
        if sample["weight"]:  # else it is damaged
            images.append(sample["image"])
            labels.append(sample["label"])
    if not images:
        raise UserError("data: no image for the classifier can be read")
    return torch.stack(images), torch.tensor(labels)


def _batches(count: int) -> Iterator[Tensor]:
    """Sample numbers of each training step; each pass has its own order."""
    size, done = min(BATCH, count), 0
    per_pass = count // size
    while done < STEPS:
        order = permutation(SEED, done // per_pass, count)
        for chosen in order[: per_pass * size].split(size)[: STEPS - done]:
            done += 1
            yield chosen


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums depend on how they are divided among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
