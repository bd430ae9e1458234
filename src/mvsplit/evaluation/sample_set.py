"""A set of samples on disk: drawn batch by batch, by any number of processes, in any order, then exported.

    settings.json                     all that the samples depend on; of prompts, a hash
    prompts.json                      the prompts, if the labels are numbers of prompts
    parts/part-000012.safetensors     a batch: `images` uint8 (B, C, height, width), `labels` int64 (B,)
    samples.npz | png/ | shards/      the exports

A batch is one file, whole or absent, so an interruption costs no more than the batches under way.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.io import encode_png

from mvsplit.data.shard_writer import write_shard
from mvsplit.evaluation.npz_files import write_npz
from mvsplit.utils.console import progress
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import remove_partial, whole_file
from mvsplit.utils.flat import dotted
from mvsplit.utils.images import save_png
from mvsplit.utils.limits import parse_json, read_small
from mvsplit.utils.rng import Stream, uniform

SHARD_SIZE = 1000
"""Samples in an exported shard."""
ExportFormat = Literal["png", "npz", "shards"]


def choose_labels(seed: int, index: Tensor, classes: list[int], choice: Literal["equal", "random"]) -> Tensor:
    """Classes of the samples with these numbers: (B,) → (B,) int64.

    Args:
        seed: of random ones.
        index: numbers.
        classes: to choose from.
        choice: `equal`: in turn, so that all are equally frequent; `random`: drawn evenly.
    """
    table = torch.tensor(classes)
    if choice == "equal":
        return table[index % len(classes)]
    draws = uniform(seed, Stream.SAMPLE_LABEL, index)[:, 0]
    return table[(draws * len(classes)).long()]


class SampleSet:
    """A set of samples in a folder.

    Args:
        folder: of the set.
        settings: all that the samples depend on, as plain values; with `num_samples` and `batch_size`.
        prompts: that the labels are numbers of; None if they are classes.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], prompts: list[str] | None = None) -> None:
        self.folder, self.settings, self.prompts = folder, json.loads(json.dumps(settings)), prompts
        self.num_samples, self.batch_size = int(settings["num_samples"]), int(settings["batch_size"])
        self.num_batches = -(-self.num_samples // self.batch_size)

    @staticmethod
    def name(settings: dict[str, Any]) -> str:
        """A folder name that is the same for the same settings only."""
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, record the settings, and keep other jobs out.

        Raises:
            UserError: if another job draws there, or the folder contains something else.
        """
        self._check_folder()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=0):
                for folder in (self.folder, *(self.folder / name for name in ("parts", "png", "shards"))):
                    remove_partial(folder)
                with whole_file(self.folder / "settings.json") as file:
                    file.write(json.dumps(self.settings, indent=1).encode())
                if self.prompts is not None:
                    with whole_file(self.folder / "prompts.json") as file:
                        file.write(json.dumps(self.prompts, indent=1, ensure_ascii=False).encode())
                yield
        except Timeout:
            raise UserError(f"output = {self.folder}: another process is drawing these samples") from None

    def _check_folder(self) -> None:
        place = self.folder / "settings.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output = {self.folder}: must be a folder")
        if not place.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise UserError(f"output = {self.folder}: contains other files; choose another folder")
            return
        known = parse_json(read_small(place), str(place))
        if not isinstance(known, dict):
            raise UserError(f"{place}: damaged; remove it if the samples in {self.folder} are of this command")
        old, new = dotted(known), dotted(self.settings)
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                raise UserError(
                    f"output = {self.folder}: contains samples with {key} = {old.get(key)}, not {new.get(key)};"
                    " choose another folder"
                )

    def numbers(self, batch: int) -> Tensor:
        """Numbers of a batch's samples: (B,) int64."""
        return torch.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_samples))

    def _part(self, batch: int) -> Path:
        return self.folder / "parts" / f"part-{batch:06d}.safetensors"

    def has(self, batch: int) -> bool:
        return self._part(batch).is_file()

    def write(self, batch: int, images: Tensor, labels: Tensor) -> None:
        self._part(batch).parent.mkdir(parents=True, exist_ok=True)
        tensors = {"images": images.contiguous(), "labels": labels.contiguous()}
        content = safetensors.torch.save(tensors, {"part_of": self._place_of(batch)})
        with whole_file(self._part(batch)) as file:
            file.write(content)

    def _place_of(self, batch: int) -> str:
        """What a part records, so that one of another set, or of another place, is noticed."""
        return f"{self.name(self.settings)} {batch}"

    def read(self, batch: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, height, width) uint8 and labels (B,) of a batch.

        Raises:
            UserError: if its file is damaged.
        """
        path = self._part(batch)
        try:
            with safe_open(path, "pt") as part:
                if (part.metadata() or {}).get("part_of") != self._place_of(batch):
                    raise ValueError("it belongs to another place or another set")
                expected = [len(self.numbers(batch)), *self.settings["image_shape"]]
                if (found := part.get_slice("images").get_shape()) != expected:
                    raise ValueError(f"images of {found}, not {expected}")
                images, labels = part.get_tensor("images"), part.get_tensor("labels")
            if images.dtype != torch.uint8:
                raise ValueError(f"images are {images.dtype}")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(f"labels are {labels.dtype}, {tuple(labels.shape)}")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it, and the same command draws it again") from None
        return images, labels

    def __len__(self) -> int:
        return self.num_samples

    def batches(self) -> Iterator[Tensor]:
        """All images (B, C, height, width) uint8, in order, a batch at a time."""
        for batch in range(self.num_batches):
            yield self.read(batch)[0]

    def export(self, form: ExportFormat) -> Path:
        """Write the whole set in another form beside the parts, and return its place. Repeating it is harmless."""
        with progress(f"writing {form}", self.num_samples) as advance:
            if form == "npz":
                return self._export_npz(advance)
            folder = self.folder / form
            folder.mkdir(exist_ok=True)
            return self._export_png(folder, advance) if form == "png" else self._export_shards(folder, advance)

    def _export_npz(self, advance: Any) -> Path:
        path, labels = self.folder / "samples.npz", torch.empty(self.num_samples, dtype=torch.int64)

        def images() -> Iterator[Tensor]:  # fills in the labels, which are written after the last image
            for batch in range(self.num_batches):
                part, labels[self.numbers(batch)] = self.read(batch)
                yield part
                advance(len(part))

        write_npz(path, self.num_samples, self.settings["image_shape"], images(), labels)
        return path

    @property
    def kind(self) -> str:
        """What a label is, in the names of files."""
        return "class" if self.prompts is None else "prompt"

    def _prompt(self, label: int) -> str | None:
        return None if self.prompts is None else self.prompts[label]

    def _export_png(self, folder: Path, advance: Any) -> Path:
        for batch in range(self.num_batches):
            images, labels = self.read(batch)
            for number, label, image in zip(self.numbers(batch).tolist(), labels.tolist(), images, strict=True):
                save_png(image, folder / f"{number:06d}_{self.kind}_{label}.png", self._prompt(label))
            advance(len(images))
        return folder

    def _export_shards(self, folder: Path, advance: Any) -> Path:
        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            for batch in range(self.num_batches):
                images, labels = self.read(batch)
                for number, label, image in zip(self.numbers(batch).tolist(), labels.tolist(), images, strict=True):
                    members = {"png": encode_png(image).numpy().tobytes(), "cls": str(label).encode()}
                    if (prompt := self._prompt(label)) is not None:
                        members["txt"] = prompt.encode()
                    yield f"{number:08d}", members
                advance(len(images))

        every = samples()
        for first in range(0, self.num_samples, SHARD_SIZE):
            count = min(SHARD_SIZE, self.num_samples - first)
            shard = (next(every) for _ in range(count))
            write_shard(folder / f"samples-{first // SHARD_SIZE:06d}.tar", shard)
        return folder
