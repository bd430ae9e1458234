"""What the LightningModules of all tasks share: network, optimiser, gradient norm, clipping and checkpoints.

A task is a subclass with its steps, chosen by `module=…` in the config: `module.py` is diffusion, `classifier.py` is
classification.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from mvsplit.models.compiled import compile_if_repaid
from mvsplit.training.checkpoints import check_fits, keep_own_checkpoints, set_micro_batches
from mvsplit.training.gradients import clip_gradients, gradient_norm, gradient_norms
from mvsplit.training.in_backward import StepsInBackward
from mvsplit.training.local_state import load_optimizer, load_weights, local_optimizer, local_weights, weight_shapes
from mvsplit.training.optim import AdamW, check_same_kind
from mvsplit.training.strategies import shard_network, takes_step
from mvsplit.utils.config import Seed
from mvsplit.utils.errors import AgreedError, UserError
from mvsplit.utils.rng import step_seed

Batch = dict[str, Tensor]


class Mean(MeanMetric):
    """A weighted mean whose sums stay in float32 when the module that holds it becomes bfloat16.

    In bfloat16 a sum soon stops growing: the terms are less than half of its last digit.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda value: fn(value).float(), exclude_state)


def nan_to_infinity(losses: Tensor) -> Tensor:
    """Losses for a `Mean`, which drops NaN but keeps infinity."""
    return losses.nan_to_num(nan=math.inf, posinf=math.inf)


def require_finite(mean: nn.Module, stage: str) -> None:
    """Refuse a mean loss over no samples, or one that is not finite.

    Raises:
        AgreedError: on all ranks.
    """
    assert isinstance(mean, Mean)
    loss = float(mean.compute())
    if not math.isfinite(loss):
        why = "none of the samples could be read" if math.isnan(loss) else "a sample's loss is not finite"
        raise AgreedError(f"{stage}/loss = {loss}: {why}")


class NetworkModule(L.LightningModule):
    """Trains a network; subclasses define the steps.

    Args:
        network: builds the network; called when the trainer's strategy is ready for parameters.
        optim: optimiser and schedule.
        seed: of initial weights and of all that is drawn in training.

    Attributes:
        needs: attributes that the task needs of a network.
        network_example: where to read what such a network is.
    """

    needs: tuple[str, ...] = ()
    network_example = ""

    def __init__(self, network: Callable[[], nn.Module], optim: AdamW, seed: Seed = 0) -> None:
        super().__init__()
        self.make_network, self.optim, self.seed = network, optim, seed
        self.network: Any = None
        self._load_optimizer: Callable[[Any], None] | None = None
        self._gradient_norm: Tensor | None = None
        self._decided_compiling = False
        self._in_backward: StepsInBackward | None = None

    def configure_model(self) -> None:
        """Build the network, with weights that depend only on the seed."""
        if self.network is None:
            device = self.trainer.strategy.root_device if self._trainer is not None else self.device
            # Only this process's device: otherwise it would open a context on every GPU, with a warning.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                self.network = self.make_network()
            for needed in self.needs:
                if not hasattr(self.network, needed):
                    raise AgreedError(
                        f"model: {type(self.network).__name__} has no {needed}; see {self.network_example}"
                    )
            shard_network(self, self.network)

    def configure_optimizers(self) -> Any:
        # max_steps, not estimated_stepping_batches: the latter sets up the data and drops its restored state.
        optimizer, scheduler = self.optim.build(self.network, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        if self._load_optimizer is not None:
            self._load_optimizer(self.trainer.optimizers[0])
            self._load_optimizer = None
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        self.optim.reapply(self.trainer.optimizers[0], scheduler, self.trainer.max_steps)
        if self.optim.in_backward:
            self._in_backward = StepsInBackward(self.trainer.optimizers[0])

    def on_train_end(self) -> None:
        if self._in_backward is not None:
            self._in_backward.remove()

    # Every strategy saves and loads weights and optimiser here, each process its local state: see local_state.py.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]
        tensors = checkpoint.setdefault("tensors", {})
        tensors["weights"] = local_weights(self)
        if checkpoint.pop("optimizer_states", None) is not None:
            checkpoint["optimizer"], tensors["optimizer"] = local_optimizer(self, self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_own_checkpoints(checkpoint, self.trainer)
        data, tensors = self.trainer.datamodule, checkpoint["tensors"]
        if self.trainer.training:
            if data is not None and type(data).__qualname__ not in checkpoint:
                raise UserError("ckpt_path: the checkpoint contains no data state")
            if "optimizer" not in checkpoint:
                raise UserError("ckpt_path: the checkpoint contains only weights; a run cannot resume from it")
            set_micro_batches(checkpoint, self.trainer.accumulate_grad_batches)
            # Called when the strategy has built it.
            settings, states = checkpoint["optimizer"], tensors("optimizer")

            def load(optimizer: Any) -> None:
                check_same_kind(optimizer, settings, states)
                load_optimizer(self, optimizer, settings, states)

            self._load_optimizer = load
        weights = tensors("weights")
        check_fits(weights.shapes, weight_shapes(self))
        load_weights(self, weights)
        checkpoint["state_dict"], checkpoint["optimizer_states"] = self.state_dict(), []  # nothing left to load

    def gradient_norm(self) -> Tensor:
        """Norm of the step's gradient after its last backward pass. Computed once, a collective call."""
        if self._in_backward is not None:
            return self._in_backward.gradient_norm()
        if self._gradient_norm is None:
            groups = self.trainer.optimizers[0].param_groups
            self._gradient_norm = gradient_norm(self, (p for group in groups for p in group["params"]))
        return self._gradient_norm

    def gradient_norms(self, family: Callable[[str], str]) -> dict[str, float]:
        """Norms of the step's gradient by family of parameters, likewise."""
        if self._in_backward is not None:
            return self._in_backward.gradient_norms(self, family)
        return gradient_norms(self, family)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if not takes_step(self.trainer):
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_gradients(self, self.gradient_norm(), gradient_clip_val)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._gradient_norm = None
        if not self._decided_compiling:
            self._decided_compiling = True
            # All steps of the run, not those that are left: a resumed run computes the same numbers.
            passes = self.trainer.max_steps * self.trainer.accumulate_grad_batches
            compile_if_repaid(self.network, passes, len(batch["position"]), training=True)
        if self._in_backward is not None:
            self._in_backward.clear()
        # For forks with dropout: the global generator is also a function of the position in the stream.
        torch.manual_seed(step_seed(self.seed, int(batch["position"][0])))
        # The step at which Lightning logs: after a resume that follows a validation it would count one step twice.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def log_training(self, loss: Tensor, samples: int) -> bool:
        """Log the loss of a micro-batch and, at the trainer's cadence, the learning rate; whether that was due."""
        self.log("train/loss", loss, prog_bar=True, batch_size=samples, sync_dist=self.trainer.world_size > 1)
        due: bool = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        if due:
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return due
