"""The networks whose features FID and its relatives compare.

Shapes: B batch, D pooled features, S spatial features, K classes; images (B, 3 or 1, height, width) uint8.
"""

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvsplit.evaluation.weight_files import check_shapes, downloaded, load_weights
from mvsplit.utils.errors import UserError

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7
"""ADM keeps so many of the 192 channels of its layer: 7 · 17 · 17 = 2023 features, about as many as pooled ones."""


class Features(NamedTuple):
    """What a network finds in a batch of images; float32, on the network's device.

    Attributes:
        pooled: (B, D), for FID, KID, precision and recall.
        spatial: (B, S), for sFID; None if the network has none.
        probabilities: (B, K) of the classes, for the inception score; None if it has none.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


class FeatureNetwork(nn.Module, ABC):
    """A fixed network, always in evaluation mode and in float32, without gradients.

    On a GPU, convolutions may use TF32, as PyTorch's default is; the process decides (`torch.backends.cudnn`).

    Attributes:
        num_features: D.
        num_spatial: S; 0 if it has no spatial features.
        knows_labels: its classes are those that samples are drawn as.
    """

    num_features: int
    num_spatial: int = 0
    knows_labels: bool = False

    @abstractmethod
    def features(self, images: Tensor) -> Features:
        """Of uint8 images (B, C, height, width) that `forward` has checked."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that the features depend on, as plain values: name, sha256 of the weights, versions."""

    def forward(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert images.shape[1] in (1, 3), images.shape
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.features(images)

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Nothing: a trainer that switches all its modules to training must not change the features."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def in_colour(images: Tensor) -> Tensor:
    """Grey images as three equal channels: (B, 1 or 3, height, width) → (B, 3, height, width)."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class Inception(FeatureNetwork):
    """The Inception of 2015 that published FIDs are based on, as torch-fidelity (extra `eval`) converts it.

    With the resize of the original's TensorFlow, without antialiasing. Spatial features are ADM's `mixed_6/conv:0`:
    TensorFlow counts its blocks mixed, mixed_1 … mixed_10, so that is the 1 × 1 convolution of `Mixed_6d`, after its
    ReLU. Class probabilities are, as in ADM, those without the last layer's bias.

    Args:
        weights: path of the release's file, of pytorch-fid's with the same names, or of the same tensors as
            safetensors; None downloads the release's.
        sha256: that the file must have.

    Raises:
        UserError: if torch-fidelity is not installed or the weights cannot be loaded.
    """

    num_features = 2048
    num_spatial = SPATIAL_CHANNELS * 17 * 17

    def __init__(self, weights: str | None = None, sha256: str | None = None) -> None:
        super().__init__()
        try:
            import torch_fidelity
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError("features: Inception needs another package: pip install -e '.[eval]'") from None
        path = Path(weights) if weights is not None else downloaded(INCEPTION_URL, "6726825d")
        tensors, self.sha256 = load_weights(path, sha256)
        self.version = str(torch_fidelity.__version__)

        # Random weights first, to learn names and shapes: the library takes nothing but a file, which it would
        # unpickle; so it gets one that was written here. Its initialisation must not change the caller's numbers.
        with torch.random.fork_rng(devices=[]):
            names = ["2048", "logits_unbiased"]
            self.network = _network(FeatureExtractorInceptionV3, names, tensors, path)
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.requires_grad_(False).eval()

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)

    def features(self, images: Tensor) -> Features:
        pooled, logits = self.network(in_colour(images))
        assert self.spatial is not None
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)  # in the order of ADM's mu_s: row, column, channel
        self.spatial = None
        return Features(pooled, spatial, logits.softmax(1))

    def identity(self) -> dict[str, Any]:
        return {"name": "Inception", "sha256": self.sha256, "torch_fidelity": self.version}


def _network(kind: Any, names: list[str], tensors: dict[str, Tensor], path: Path) -> Any:
    """The library's network with these weights."""

    class Empty(kind):
        """The library's network without weights."""

        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

    def file(content: dict[str, Tensor]) -> io.BytesIO:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        buffer.seek(0)
        return buffer

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Empty("inception", names, file({})).state_dict().items()}
    counters = {name: torch.tensor(0) for name in shapes if name.endswith(".num_batches_tracked")}
    # Counters do not matter to a network that is not trained, and old files lack them.
    weights = {name: tensor for name, tensor in tensors.items() if name not in counters}
    check_shapes(weights, {name: shape for name, shape in shapes.items() if name not in counters}, path, "Inception")
    return kind("inception", names, file(weights | counters))
