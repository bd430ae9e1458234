"""The LightningModule of diffusion: network, objective and sampler joined to the trainer.

What it shares with the modules of other tasks is in `network_module.py`.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.flow.objective import Flow, drop_condition, velocity_loss
from mvsplit.flow.sampler import Sampler, sample_noise
from mvsplit.flow.times import time_shift
from mvsplit.training.network_module import Batch, Mean, NetworkModule, nan_to_infinity, require_finite
from mvsplit.training.optim import AdamW
from mvsplit.utils.config import Seed
from mvsplit.utils.errors import AgreedError
from mvsplit.utils.rng import Stream, normal


def condition_of(batch: Batch) -> Tensor:
    """The network's condition for each sample: the batch's `condition` if it has one, else its class."""
    return batch["condition"] if "condition" in batch else batch["label"]


def check_trainable(network: nn.Module, data: Any) -> None:
    """Check that the data have what the network is conditioned on.

    Raises:
        AgreedError: one line with the key.
    """
    if not isinstance(data, ShardDataModule):
        return
    needed, stored = getattr(network, "embedding_width", None), data.text.width if data.text else None
    rows: int | None = getattr(getattr(network, "context", None), "null_class", None)
    if needed is not None and stored is None:
        raise AgreedError(
            "data.text = null: the network is conditioned on captions; use longest or fixed, with a set of"
            " src/encode.py kind=text"
        )
    if needed is None and stored is not None:
        raise AgreedError("model.context: is conditioned on classes, not on captions; use data.text=null")
    if needed != stored:
        raise AgreedError(
            f"model.context.embedding_width = {needed}: the states of the set's captions have the width {stored}"
        )
    if needed is None and not data.num_classes:
        raise AgreedError("data.num_classes = 0: the network is conditioned on classes")
    if rows is not None and rows < data.num_classes:
        raise AgreedError(f"model.context: has {rows} classes; must be at least data.num_classes = {data.num_classes}")


class FlowModule(NetworkModule):
    """Trains a velocity network by flow matching.

    Args:
        network: builds the network; called when the trainer's strategy is ready for parameters.
        flow: the objective.
        optim: optimiser and schedule.
        sampler: solver of the samples.
        seed: of initial weights, training draws, validation noise and samples.
        time_bins: equal bins of t for which the loss is also logged.
        val_times: validation sample i is evaluated at the (i mod val_times)-th of these evenly spaced times (before
            the time shift), with noise fixed by its number: two checkpoints differ only by their weights.
    """

    needs = ("input_shape", "drop")
    network_example = "class Network in src/mvsplit/flow/objective.py"

    def __init__(
        self,
        network: Callable[[], nn.Module],
        flow: Flow,
        optim: AdamW,
        sampler: Sampler,
        seed: Seed = 0,
        time_bins: PositiveInt = 4,
        val_times: PositiveInt = 8,
    ) -> None:
        super().__init__(network, optim, seed)
        self.flow, self.sampler = flow, sampler
        self.time_bins, self.val_times = time_bins, val_times
        self.mean_loss = nn.ModuleList(Mean() for _ in range(time_bins + 1))  # all times, then each bin

    def configure_model(self) -> None:
        super().configure_model()
        if self._trainer is not None:
            check_trainable(self.network, self.trainer.datamodule)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0 = batch["image"]
        x1, t, mask = self.flow.draw(self.seed, batch["position"], x0)
        condition = drop_condition(self.network, condition_of(batch), mask, batch.get("null_condition"))
        losses = velocity_loss(self.network, x0, x1, t, condition)  # (B,)
        loss = losses.mean()
        if self.log_training(loss, len(x0)) and not self.trainer.fit_loop._should_accumulate():
            self._log_bins(losses.detach(), t)
        return loss

    def _log_bins(self, losses: Tensor, t: Tensor) -> None:
        bins = self.bin_of(t)
        means = {f"train/{self.bin_name(i)}": float(losses[bins == i].mean()) for i in bins.unique().tolist()}
        for logger in self.loggers:  # self.log would repeat old values of bins that are empty in this step
            logger.log_metrics(means, self.global_step)

    def bin_of(self, t: Tensor) -> Tensor:
        """Number of the time bin: (B,) → (B,) int64."""
        return (t * self.time_bins).long().clamp(max=self.time_bins - 1)

    def bin_name(self, i: int) -> str:
        return f"loss_t_{i / self.time_bins:.2f}-{(i + 1) / self.time_bins:.2f}"

    def validation_times(self, index: Tensor) -> Tensor:
        """The fixed times of the validation samples with these numbers: (B,) → (B,)."""
        t = ((index % self.val_times).float() + 0.5) / self.val_times  # integers would become the default type
        return time_shift(t, self.flow.time_shift)

    def validation_inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, x1, t and condition of each sample: its fixed noise and time."""
        x0, index = batch["image"], batch["index"]
        x1 = normal(self.seed, Stream.VAL_NOISE, index, x0.shape[1:]).to(x0.dtype)
        return x0, x1, self.validation_times(index), condition_of(batch)

    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each sample at its fixed time and noise, and the times: (B,), (B,)."""
        x0, x1, t, condition = self.validation_inputs(batch)
        return velocity_loss(self.network, x0, x1, t, condition), t

    def validation_step(self, batch: Batch, batch_idx: int, stage: str = "val") -> None:
        losses, t = self.validation_losses(batch)
        losses = nan_to_infinity(losses)
        bins = self.bin_of(t)
        for i, metric in enumerate(self.mean_loss):
            assert isinstance(metric, Mean)
            weight = batch["weight"] * (bins == i - 1) if i else batch["weight"]
            metric.update(torch.where(weight > 0, losses, 0.0), weight)
            if i == 0 or bool(metric.weight > 0) or self.trainer.world_size > 1:
                name = self.bin_name(i - 1) if i else "loss"
                self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=i == 0)

    def on_validation_epoch_end(self, stage: str = "val") -> None:
        require_finite(self.mean_loss[0], stage)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, "test")

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end("test")

    def sample(self, condition: Tensor, index: Tensor, null: Tensor | None = None) -> Tensor:
        """Samples number `index` (B,) for B conditions: (B, C, height, width) in the data's units.

        All are on the network's device. `null` is the null condition of embeddings.
        """
        noise = sample_noise(self.seed, index, self.network.input_shape)
        return self.sampler.sample(self.network, condition, noise, self.flow.time_shift, null=null)
