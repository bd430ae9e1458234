"""Draw samples from a saved run: a few in this process, or a whole set on all devices of a trainer.

Shapes: B batch; samples (B, C, height, width) as the network makes them, images uint8.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mvsplit import __version__
from mvsplit.data.latent_space import LatentDecoder
from mvsplit.evaluation.prompts import Prompts, check_encoder
from mvsplit.evaluation.sample_set import SampleSet, choose_labels
from mvsplit.evaluation.weight_files import weights_sha256
from mvsplit.flow.graph_replay import GraphReplay
from mvsplit.flow.sampler import Sampler, sample_noise
from mvsplit.models.compiled import compile_if_repaid
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.console import progress, track
from mvsplit.utils.devices import on_gpus
from mvsplit.utils.errors import UserError
from mvsplit.utils.images import to_uint8

Precision = Literal["float32", "bfloat16"]


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_conditions(saved: SavedRun, classes: Sequence[int] | None, prompts: object, advice: str = "") -> None:
    """Raises `UserError` for classes that the network was not trained on, or prompts where it needs classes.

    `advice` ends the line for missing prompts.
    """
    captions = getattr(saved.network, "embedding_width", None) is not None
    if captions and classes is not None:
        raise UserError(f"classes = {list(classes)}: the network was trained on captions, not classes; use prompts=[…]")
    if captions and prompts is None:
        need = "prompts = null: the network was trained on captions; use prompts=[…] or prompts=file.txt"
        raise UserError(need + advice)
    if not captions and prompts is not None:
        raise UserError("prompts: the network was trained on classes, not captions; use classes=[…]")
    if captions or classes is None:
        return
    num_classes = saved.config["data"]["num_classes"]
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"classes = {label}: must be in 0 … {num_classes - 1}, the classes of the network")


class Generator(torch.nn.Module):
    """A saved network with its sampler: sample i depends on the seed, i and its class, not on its batch.

    (To the last bit it may depend on the batch's size, as matrix products do.)

    Args:
        saved: the run.
        sampler: solver and guidance.
        seed: of the noise.
        precision: of the weights; the solver's steps are float32.
        guide: the run that `sampler.guide` names.
        decoder: of latents; None leaves samples as they are.
        prompts: of a network that was trained on captions. They take the place of classes: label i is prompt i.
        image_size: [height, width] of the network's output; None is the size that it was trained on.

    Raises:
        UserError: if the guide makes other samples than the network, or the prompts' encoder is another one, or the
            network cannot draw this size.
    """

    def __init__(
        self,
        saved: SavedRun,
        sampler: Sampler,
        seed: int,
        precision: Precision = "float32",
        guide: SavedRun | None = None,
        decoder: LatentDecoder | None = None,
        prompts: Prompts | None = None,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if prompts is not None:
            check_encoder(saved, prompts.encoder)
        if guide is not None and (guide.config["data"] != saved.config["data"] or guide.latents != saved.latents):
            raise UserError(f"sampler.guide = {guide.path}: trained on other data than {saved.path}")
        dtype = getattr(torch, precision)
        self.saved, self.guided_by = saved, guide
        self.network = saved.network.to(dtype)
        self.guide: Any = guide.network.to(dtype) if guide is not None else None
        self._replayed = GraphReplay(self.network)
        self._guide_replayed = GraphReplay(self.guide) if self.guide is not None else None
        self.sampler, self.seed, self.time_shift, self.decoder = sampler, seed, saved.flow.time_shift, decoder
        self.prompts = prompts
        self.shape = (self.network.input_shape[0], *(image_size or self.network.input_shape[1:]))
        self._check_shape()

    def _check_shape(self) -> None:
        """The network must be able to draw the size: one that says nothing about it draws the one it was trained on."""
        if self.shape == tuple(self.network.input_shape):
            return
        if not hasattr(self.network, "grid"):
            name, own = type(self.network).__name__, list(self.network.input_shape[1:])
            raise UserError(f"image_size = {list(self.shape[1:])}: {name} draws only {own}")
        try:
            self.network.grid(torch.empty(1, *self.shape, device="meta"))
        except UserError as error:
            raise UserError(f"image_size = {list(self.shape[1:])}: {error}") from None

    def place(self, device: torch.device) -> None:
        """Move what is not moved with the network: the decoder and the text encoder."""
        for part in (self.decoder, self.prompts):
            if part is not None:
                part.to(device)

    def expect(self, count: int, batch_size: int) -> bool:
        """Prepare for this many samples in batches; whether the network's blocks are compiled for them."""
        passes = -(-count // batch_size) * self.sampler.calls
        size = min(count, batch_size) * (2 if self.sampler.doubles else 1)
        if self.guide is not None:
            compile_if_repaid(self.guide, passes, size, training=False)
        return compile_if_repaid(self.network, passes, size, training=False)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of its images."""
        return self.shape if self.decoder is None else self.decoder.image_shape(self.shape)

    def draw(self, index: Tensor, labels: Tensor) -> Tensor:
        """Samples number `index` (B,) of the classes or prompts `labels` (B,), on the network's device; not decoded."""
        noise = sample_noise(self.seed, index, self.shape)
        condition, null = labels, None
        if self.prompts is not None:
            condition, null = self.prompts.conditions(labels)
        return self.sampler.sample(self._replayed, condition, noise, self.time_shift, self._guide_replayed, null)

    def samples(self, index: Tensor, labels: Tensor) -> Tensor:
        """The same, decoded if there is a decoder."""
        drawn = self.draw(index, labels)
        return drawn if self.decoder is None else self.decoder(drawn)


def draw(generator: Generator, chosen: Sequence[int], batch_size: int) -> Tensor:
    """A sample of each class or prompt: (B, C, height, width) on the CPU. Few enough to keep all in memory."""
    device = best_device()
    generator.to(device)
    generator.place(device)
    generator.expect(len(chosen), batch_size)
    labels, index = torch.tensor(chosen, device=device), torch.arange(len(chosen), device=device)
    batches = list(zip(labels.split(batch_size), index.split(batch_size), strict=True))
    return torch.cat([generator.samples(i, label).cpu() for label, i in track(batches, "sampling")])


def weights_digest(saved: SavedRun) -> str:
    """Equal for equal weights, whichever strategy saved them and whether or not they were converted."""
    return weights_sha256(saved.network.state_dict())[:16]


def settings_of(generator: Generator, chosen: dict[str, Any]) -> dict[str, Any]:
    """All that the samples depend on: to be reported with every number.

    Args:
        generator: of the samples.
        chosen: `num_samples`, `batch_size`, `seed`, `labels`, `classes`, `weights`, `precision`, `device`,
            `compiled`.
    """
    saved, guide, sampler, decoder = generator.saved, generator.guided_by, generator.sampler, generator.decoder
    solver = asdict(sampler) | {"time_shift": sampler.time_shift or saved.flow.time_shift}
    solver["guide"] = None if guide is None else {"step": guide.step, "weights_sha256": weights_digest(guide)}
    network = {"step": saved.step, "weights_sha256": weights_digest(saved)}
    autoencoder = None if decoder is None else decoder.autoencoder.identity() | {"path": None}
    versions = {"mvsplit": __version__, "torch": torch.__version__.partition("+")[0]}
    shape = {"image_shape": list(generator.image_shape)}
    about = {"network": network, "sampler": solver, "autoencoder": autoencoder, "versions": versions}
    if generator.prompts is not None:
        about["prompts"] = generator.prompts.identity()
    return {**chosen, **shape, **about}


class SetDrawing(L.LightningModule):
    """Draws the batches of a set that are missing, each process every so many; Lightning's `predict` drives it."""

    def __init__(self, generator: Generator, samples: SampleSet, classes: list[int]) -> None:
        super().__init__()
        self.generator, self.samples, self.classes = generator, samples, classes
        self.advance: Callable[[int], None] = lambda count: None

    def setup(self, stage: str) -> None:
        self._threads = torch.get_num_threads()
        if self.trainer.strategy.root_device.type == "cpu":
            torch.set_num_threads(1)  # sums must not depend on how many processes share the cores

    def teardown(self, stage: str) -> None:
        torch.set_num_threads(self._threads)

    def predict_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        missing = [batch for batch in range(rank, self.samples.num_batches, world) if not self.samples.has(batch)]
        return DataLoader(missing, batch_size=None)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        self.generator.place(self.device)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        index = self.samples.numbers(int(batch))
        settings = self.samples.settings
        labels = choose_labels(settings["seed"], index, self.classes, settings["labels"])
        images = to_uint8(self.generator.samples(index.to(self.device), labels.to(self.device))).cpu()
        self.samples.write(int(batch), images, labels)
        self.advance(len(index) * self.trainer.world_size)


def complete_set(generator: Generator, config: dict[str, Any], watch: Any) -> SampleSet | None:
    """Draw what is missing of a set, on all devices of `config["trainer"]`.

    Args:
        generator: the same in all processes.
        config: of the command: `num_samples`, `seed`, `labels`, … (`sample.yaml`).
        watch: a callback and context manager that ends all processes when one is lost.

    Returns:
        The set, in the process that continues with it; None in the others.

    Raises:
        UserError: for unknown classes, or if the folder contains something else.
    """
    devices = {key: config["trainer"][key] for key in ("accelerator", "devices", "num_nodes")}
    prompts = generator.prompts
    check_conditions(generator.saved, config["classes"], prompts)
    known = generator.saved.config["data"]["num_classes"] if prompts is None else len(prompts.texts)
    classes = config["classes"] or list(range(known))
    chosen = {key: config[key] for key in ("num_samples", "batch_size", "seed", "labels", "weights", "precision")}
    chosen |= {"classes": config["classes"], "device": "GPU" if on_gpus(devices["accelerator"]) else "CPU"}
    # By the whole set: neither the number of processes nor what is already drawn may change the samples.
    chosen["compiled"] = generator.expect(config["num_samples"], config["batch_size"])
    settings = settings_of(generator, chosen)
    folder = config["output"] or Path(config["paths"]["log_dir"], "samples", SampleSet.name(settings))
    samples = SampleSet(Path(folder), settings, None if prompts is None else prompts.texts)
    watch.advice = "the same command continues"
    trainer = L.Trainer(
        **devices,
        strategy="auto",  # each process has the whole network: nothing is sharded
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module, first = SetDrawing(generator, samples, classes), trainer.is_global_zero
    with samples.locked() if first else nullcontext(), watch:
        done = min(samples.num_samples, samples.batch_size * sum(map(samples.has, range(samples.num_batches))))
        shown = progress("sampling", samples.num_samples, done) if first else nullcontext(module.advance)
        with shown as module.advance:
            trainer.predict(module, return_predictions=False)
        trainer.strategy.barrier("samples")
    return samples if first else None
