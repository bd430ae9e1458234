"""Are drawn pictures recognised as what was asked for? For data sets small enough to train a classifier on at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor

from mvsplit.data.reader import ShardReader
from mvsplit.utils.images import to_uint8

MAX_SAMPLES = 20_000
"""Real pictures that the classifier is trained on at the most."""


@dataclass
class Recogniser:
    """A support-vector classifier of real pictures, and how well it does on real ones it has not seen.

    Attributes:
        accuracy: share of the held-out real pictures that it gets right: what the share of recognised drawn ones
            must be read against.
    """

    classifier: SVC
    accuracy: float

    @classmethod
    def fit(cls, train: ShardReader, val: ShardReader) -> "Recogniser":
        classifier = SVC(C=10.0).fit(*_pixels(train))
        return cls(classifier, float(classifier.score(*_pixels(val))))

    def share(self, pictures: Tensor, classes: Sequence[int]) -> float:
        """Share of pictures (B, C, height, width) in [−1, 1] recognised as their class, B of them."""
        # Through 8 bits, as the real ones came: a classifier must not tell them apart by that.
        flat = to_uint8(pictures).flatten(1).numpy() / 127.5 - 1
        return float((self.classifier.predict(flat) == np.asarray(classes)).mean())


def _pixels(reader: ShardReader) -> tuple[NDArray, NDArray]:
    samples = [reader[0, number] for number in range(len(reader))]
    images = np.stack([sample["image"].flatten().numpy() / 127.5 - 1 for sample in samples])
    return images, np.array([sample["label"] for sample in samples])
