"""The LightningModule: network, objective and sampler joined to the trainer.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from mvsplit.flow.objective import Flow, velocity_loss
from mvsplit.flow.sampler import Sampler, sample_noise
from mvsplit.flow.times import time_shift
from mvsplit.training.checkpoints import check_fits, set_micro_batches
from mvsplit.training.optim import AdamW
from mvsplit.training.shards import held_optimizer, held_weights, load_optimizer, load_weights, weight_shapes
from mvsplit.training.strategies import shard_network
from mvsplit.utils.errors import UserError
from mvsplit.utils.rng import Seed, Stream, normal, step_seed

Batch = dict[str, Tensor]


def condition_of(batch: Batch) -> Tensor:
    """What the network is told about each sample: the batch's `condition` if it has one, else its class."""
    return batch.get("condition", batch["label"])


class FlowModule(L.LightningModule):
    """Trains a velocity network by flow matching.

    Args:
        network: makes the network; called when the trainer's strategy is ready for parameters.
        flow: the objective. optim: optimiser and schedule. sampler: how pictures are drawn.
        seed: of initial weights, training draws, validation noise and pictures.
        time_bins: equal bins of t in which the loss is also logged.
        val_times: validation sample i is judged at the (i mod val_times)-th of these evenly spaced times (before
            the time shift), with noise fixed by its number: two checkpoints differ by their weights alone.
    """

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
        super().__init__()
        self.make_network = network
        self.flow, self.optim, self.sampler, self.seed = flow, optim, sampler, seed
        self.time_bins, self.val_times = time_bins, val_times
        self.network: Any = None
        self._load_optimizer: Callable[[Any], None] | None = None
        self.mean_loss = nn.ModuleList(MeanMetric() for _ in range(time_bins + 1))  # all times, then each bin

    def configure_model(self) -> None:
        """Build the network, with weights that depend on the seed alone."""
        if self.network is None:
            device = self.trainer.strategy.root_device if self._trainer is not None else self.device
            # Only this process's: else it would make a context on every GPU of the machine, and a warning.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                self.network = self.make_network()
            shard_network(self, self.network)

    def configure_optimizers(self) -> Any:
        # max_steps, not estimated_stepping_batches: asking for that sets up the data and drops its restored state.
        optimizer, scheduler = self.optim.build(self.network.parameters(), self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        if self._load_optimizer is not None:
            self._load_optimizer(self.trainer.optimizers[0])
            self._load_optimizer = None
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        self.optim.reapply(self.trainer.optimizers[0], scheduler, self.trainer.max_steps)

    # Every strategy saves and loads weights and optimiser here, each process what it holds: see shards.py.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]
        tensors = checkpoint.setdefault("tensors", {})
        tensors["weights"] = held_weights(self)
        if checkpoint.pop("optimizer_states", None) is not None:
            checkpoint["optimizer"], tensors["optimizer"] = held_optimizer(self, self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data, tensors = self.trainer.datamodule, checkpoint["tensors"]
        if self.trainer.training:
            if data is not None and type(data).__qualname__ not in checkpoint:
                raise UserError("ckpt_path: the checkpoint does not tell which data it was trained on, nor how far")
            if "optimizer" not in checkpoint:
                raise UserError("ckpt_path: the checkpoint holds weights alone; it cannot be gone on from")
            set_micro_batches(checkpoint, self.trainer.accumulate_grad_batches)
            # Once the strategy has made it.
            settings, states = checkpoint["optimizer"], tensors("optimizer")
            self._load_optimizer = lambda optimizer: load_optimizer(self, optimizer, settings, states)
        weights = tensors("weights")
        check_fits(weights.shapes, weight_shapes(self))
        load_weights(self, weights)
        checkpoint["state_dict"], checkpoint["optimizer_states"] = self.state_dict(), []  # nothing is left to load

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # For dropout layers of forks: the global generator too is a function of the place in the stream.
        torch.manual_seed(step_seed(self.seed, int(batch["position"][0])))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0 = batch["image"]
        x1, t, mask = self.flow.draw(self.seed, batch["position"], x0)
        condition = self.network.drop(condition_of(batch), mask)
        losses = velocity_loss(self.network, x0, x1, t, condition)  # (B,)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x0), sync_dist=self.trainer.world_size > 1)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            self._log_bins(losses.detach(), t)
        return loss

    def _log_bins(self, losses: Tensor, t: Tensor) -> None:
        bins = self.bin_of(t)
        for i in bins.unique().tolist():
            chosen = losses[bins == i]
            self.log(f"train/{self.bin_name(i)}", chosen.mean(), batch_size=len(chosen))

    def bin_of(self, t: Tensor) -> Tensor:
        """Number of the time bin: (B,) → (B,) int64."""
        return (t * self.time_bins).long().clamp(max=self.time_bins - 1)

    def bin_name(self, i: int) -> str:
        return f"loss_t_{i / self.time_bins:.2f}-{(i + 1) / self.time_bins:.2f}"

    def validation_times(self, index: Tensor) -> Tensor:
        """The fixed times at which validation samples of these numbers are judged: (B,) → (B,)."""
        t = (index % self.val_times + 0.5) / self.val_times
        return time_shift(t.float(), self.flow.time_shift)

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
        bins = self.bin_of(t)
        for i, metric in enumerate(self.mean_loss):
            assert isinstance(metric, MeanMetric)
            weight = batch["weight"] * (bins == i - 1) if i else batch["weight"]
            metric.update(losses, weight)
            if i == 0 or bool(metric.weight > 0) or self.trainer.world_size > 1:
                name = self.bin_name(i - 1) if i else "loss"
                self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=i == 0)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, "test")

    def sample(self, condition: Tensor, index: Tensor) -> Tensor:
        """Pictures number `index` (B,) for `condition` (B,): (B, C, height, width) in the data's units.

        Both lie where the network is.
        """
        noise = sample_noise(self.seed, index, self.network.input_shape)
        return self.sampler.sample(self.network, condition, noise, self.flow.time_shift)
