"""The LightningModule of classification, the worked example of another task than diffusion.

Shapes: B batch, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvsplit.training.network_module import Batch, Mean, NetworkModule, nan_to_infinity, require_finite
from mvsplit.training.optim import AdamW
from mvsplit.utils.config import Seed
from mvsplit.utils.errors import UserError


class ClassifierModule(NetworkModule):
    """Trains a network to predict the class of an image, by cross-entropy.

    Args:
        network: builds a network called as `network(image)` that returns logits (B, K), such as `models/vit.py`.
        optim: optimiser and schedule.
        seed: of initial weights.
    """

    needs = ("num_classes",)
    network_example = "class ViT in src/mvsplit/models/vit.py"

    def __init__(self, network: Callable[[], nn.Module], optim: AdamW, seed: Seed = 0) -> None:
        super().__init__(network, optim, seed)
        self.mean_loss, self.accuracy = Mean(), Mean()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each sample, and whether its class has the largest logit: (B,), (B,) bool.

        Raises:
            UserError: if the network returns another shape.
        """
        logits, label = self.network(batch["image"]), batch["label"]
        if logits.shape != (len(label), self.network.num_classes):
            raise UserError(
                f"model: returned shape {tuple(logits.shape)}, expected {(len(label), self.network.num_classes)}"
            )
        return F.cross_entropy(logits, label, reduction="none"), logits.argmax(1) == label

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.losses(batch)[0].mean()
        self.log_training(loss, len(batch["label"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, stage: str = "val") -> None:
        losses, right = self.losses(batch)
        values = {"loss": (self.mean_loss, nan_to_infinity(losses)), "accuracy": (self.accuracy, right.float())}
        for name, (metric, value) in values.items():
            metric.update(torch.where(batch["weight"] > 0, value, 0.0), batch["weight"])
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self, stage: str = "val") -> None:
        require_finite(self.mean_loss, stage)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, "test")

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end("test")
