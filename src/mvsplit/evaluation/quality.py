"""How close samples are to a reference: FID, sFID, inception score, precision, recall and KID, from batches of images.

Shapes: B batch, C channels.
"""

import torch
from torch import Tensor

from mvsplit.evaluation.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mvsplit.evaluation.feature_networks import FeatureNetwork
from mvsplit.evaluation.references import MAX_FEATURES, Reference
from mvsplit.utils.errors import UserError

NEIGHBOURS = 3
METRICS = ("fid", "sfid", "is", "is_std", "precision", "recall", "kid", "kid_std", "recognised")
"""All that `Quality` may compute."""


class Quality:
    """Compares samples with a reference; memory does not grow beyond `max_features` samples.

    FID and sFID are of all samples; the others of the first `max_features`, which are all in the usual protocol.

    Args:
        network: whose features are compared, the reference's.
        reference: real images or their statistics.
        max_features: samples whose pooled features are kept.
        seed: of KID's subsets and the inception score's splits.
    """

    def __init__(
        self, network: FeatureNetwork, reference: Reference, max_features: int = MAX_FEATURES, seed: int = 0
    ) -> None:
        self.network, self.reference, self.max_features, self.seed = network, reference, max_features, seed
        self.pooled, self.spatial = Moments(), Moments()
        self._features: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self._recognised = self._labelled = 0

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return self.pooled.count

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add samples, uint8 (B, C, height, width), and if they are known the classes that they were drawn as, (B,).

        Raises:
            UserError: if they are not of the size of the reference's images.
        """
        if self.reference.shape is not None and images.shape[1:] != self.reference.shape:
            found, needed = (" × ".join(map(str, shape)) for shape in (images.shape[1:], self.reference.shape))
            raise UserError(f"samples: {found} (channels, height, width), must be {needed} as the reference's images")
        room = max(0, self.max_features - self.count)
        found = self.network(images.to(self.network.device))
        self.pooled.update(found.pooled)
        if found.spatial is not None and self.reference.spatial is not None:
            self.spatial.update(found.spatial)
        if labels is not None and found.probabilities is not None and self.network.knows_labels:
            self._recognised += int((found.probabilities.argmax(1).cpu() == labels).sum())
            self._labelled += len(labels)
        if room:
            self._features.append(found.pooled[:room].cpu())
            if found.probabilities is not None:
                self._probabilities.append(found.probabilities[:room].cpu())

    def metrics(self) -> dict[str, float]:
        """Those of fid, sfid, is, is_std, precision, recall, kid, kid_std and recognised that can be computed.

        The inception score takes class probabilities; precision to kid_std the features of real images and more than
        three samples; the share that is recognised as its class, labels and a network that knows the classes.
        """
        found: dict[str, float] = {}
        if self.count < 2:
            return found
        found["fid"] = frechet_distance(self.pooled.gaussian(), self.reference.pooled)
        if self.spatial.count and self.reference.spatial is not None:
            found["sfid"] = frechet_distance(self.spatial.gaussian(), self.reference.spatial)
        if self._probabilities:
            found["is"], found["is_std"] = inception_score(torch.cat(self._probabilities), seed=self.seed)
        samples, real = torch.cat(self._features), self.reference.features
        if real is not None and min(len(real), len(samples)) > NEIGHBOURS:
            device = self.network.device  # some 10¹³ operations for 50,000 samples
            real, samples = real.to(device), samples.to(device)
            found["precision"], found["recall"] = precision_recall(real, samples, NEIGHBOURS)
            found["kid"], found["kid_std"] = kernel_distance(real, samples, seed=self.seed)
        if self._labelled:
            found["recognised"] = self._recognised / self._labelled
        return found
