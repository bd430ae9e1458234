"""FID and its relatives during training, on samples of the averaged weights."""

import time
from typing import Annotated, Any

import torch
from annotated_types import Ge
from lightning import Callback, Trainer
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from mvsplit.callbacks.drawn_conditions import draws, has_captions, of_captions
from mvsplit.data.autoencoders import Autoencoder
from mvsplit.data.latent_space import LatentDecoder
from mvsplit.evaluation.feature_networks import FeatureNetwork
from mvsplit.evaluation.measuring import chosen_network, chosen_reference
from mvsplit.evaluation.quality import METRICS, Quality
from mvsplit.utils.console import info_once
from mvsplit.utils.errors import AgreedError
from mvsplit.utils.images import to_uint8


class SampleMetrics(Callback):
    """Draws samples at some validations and logs `sample/fid`, `sample/is`, `sample/precision` and so on.

    `sample/seconds` is the time that drawing took, in seconds per sample of a process. The samples are always the same
    ones, as they improve. All ranks draw; rank 0 compares. `best` can follow any of the metrics:
    `callbacks.checkpoint.monitor=sample/fid`.

    Args:
        every_n_steps: optimiser steps between two measurements, at the validations that follow.
        num_samples: classes in turn, or the validation set's captions: then batches are padded by `data.text`, and
            with `longest` the samples depend on `batch_size`. Values of few samples are larger, and comparable only
            with as many.
        num_classes: number of classes of the data.
        batch_size: samples drawn at once, by each rank.
        features: the network whose features are compared; null trains a classifier, for small sets of images.
        reference: see `eval.yaml`; null is the training set.
        autoencoder: that encoded the latents, or null.

    Raises:
        UserError: before the first step, if there is no such network or reference.
    """

    sometimes_logs = tuple(f"sample/{name}" for name in METRICS)
    """Metrics that a validation may lack, for `callbacks.checkpoint.monitor`."""

    def __init__(
        self,
        num_classes: NonNegativeInt,
        every_n_steps: PositiveInt = 1000,
        num_samples: Annotated[int, Ge(2)] = 500,
        batch_size: PositiveInt = 100,
        features: FeatureNetwork | None = None,
        reference: str | None = None,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        self.num_classes, self.every_n_steps = num_classes, every_n_steps
        self.num_samples, self.batch_size = num_samples, batch_size
        self.features, self.reference, self.autoencoder = features, reference, autoencoder
        self._fresh: Quality | None = None  # on rank 0
        self._decoder: LatentDecoder | None = None
        self._measured_at = 0

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self._prepare(trainer, module)
        if trainer.max_steps < self.every_n_steps and trainer.is_global_zero:
            info_once(
                f"callbacks.metrics.every_n_steps = {self.every_n_steps}: only the final weights are measured, after"
                f" trainer.max_steps = {trainer.max_steps}; `best` cannot follow them"
            )

    def on_test_start(self, trainer: Trainer, module: Any) -> None:
        self._prepare(trainer, module)

    def _prepare(self, trainer: Trainer, module: Any) -> None:
        """Load network and reference on rank 0: seconds for digits, minutes for ImageNet, once."""
        data: Any = trainer.datamodule
        if not draws(trainer, module, "metrics") or self._fresh is not None:
            return
        space = data.space
        if space is not None and self.autoencoder is None:
            raise AgreedError("callbacks.metrics: latents must be decoded; give autoencoder=…")
        if self.features is None and not self.num_classes:
            raise AgreedError(
                "callbacks.metrics.features = null: trains a classifier, and the set has no classes; use"
                " features@callbacks.metrics.features=inception or dinov2"
            )
        if self.features is None:
            data.validation_index()  # on all ranks: a collective call for remote sets
        if trainer.is_global_zero:
            if space is not None and self.autoencoder is not None:
                self._decoder = LatentDecoder(space, self.autoencoder).to(trainer.strategy.root_device)
            network = chosen_network(self.features, data).to(trainer.strategy.root_device)
            size = tuple(data.format.shape)
            if self._decoder is not None:
                size = self._decoder.image_shape(size)
            self._fresh = Quality(
                network, chosen_reference(self.reference, network, data, size, data.storage.cache_dir)
            )

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        due = trainer.global_step // self.every_n_steps > self._measured_at // self.every_n_steps
        if due and not trainer.sanity_checking:
            self._measure(trainer, module)

    def on_test_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step != self._measured_at:  # the final weights, if they were not measured yet
            self._measure(trainer, module)

    def _measure(self, trainer: Trainer, module: Any) -> None:
        if trainer.fast_dev_run or not draws(trainer, module, "metrics"):
            return
        began = time.monotonic()
        images, metrics = self._draw(trainer, module), dict[str, float]()
        seconds = time.monotonic() - began  # all images are in host memory: nothing is still being computed
        if self._fresh is not None:
            quality = Quality(self._fresh.network, self._fresh.reference)
            for number, batch in enumerate(images):
                index = torch.arange(len(batch)) + number * self.batch_size
                quality.update(batch, None if has_captions(trainer) else self._labels(index))
            metrics = quality.metrics() | {"seconds": seconds * trainer.world_size / self.num_samples}
        self._measured_at = trainer.global_step
        for name, value in trainer.strategy.broadcast(metrics).items():
            # Equal on all ranks; reduced only because Lightning would warn otherwise.
            several = trainer.world_size > 1
            module.log(f"sample/{name}", value, on_epoch=True, batch_size=self.num_samples, sync_dist=several)

    def _labels(self, index: Tensor) -> Tensor:
        return index % self.num_classes

    def _draw(self, trainer: Trainer, module: Any) -> list[Tensor]:
        """Batches of images in order, on rank 0; sharded strategies need all ranks in every call of the network."""
        device, rank, world = trainer.strategy.root_device, trainer.global_rank, trainer.world_size
        rounds = -(-self.num_samples // (self.batch_size * world))
        images: list[Tensor] = []
        for number in range(rounds):
            index = (number * world + rank) * self.batch_size + torch.arange(self.batch_size, device=device)
            if has_captions(trainer):
                condition, null, _ = of_captions(trainer, index.tolist())
                drawn = module.sample(condition, index, null=null)
            else:
                drawn = module.sample(self._labels(index), index)
            gathered = trainer.strategy.all_gather(drawn)
            if not trainer.is_global_zero:
                continue
            for samples in gathered.split(1) if world > 1 else [gathered[None]]:
                left = self.num_samples - sum(map(len, images))
                if left > 0:
                    kept = samples[0][:left]
                    images.append(to_uint8(kept if self._decoder is None else self._decoder(kept)).cpu())
        return images

    def state_dict(self) -> dict[str, Any]:
        return {"measured_at": self._measured_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._measured_at = state["measured_at"]
