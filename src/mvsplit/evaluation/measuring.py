"""What `src/eval.py` and the metrics callback compare samples by: network, reference, and the numbers to report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.faults import FaultPolicy
from mvsplit.data.formats import Images
from mvsplit.data.index import ShardIndex
from mvsplit.data.indexing import load_index
from mvsplit.data.reader import ShardReader
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.storage import Storage
from mvsplit.data.transforms import CentreCrop
from mvsplit.evaluation.feature_networks import FeatureNetwork
from mvsplit.evaluation.image_files import open_images
from mvsplit.evaluation.quality import Quality
from mvsplit.evaluation.references import Reference
from mvsplit.evaluation.trained_classifier import MAX_SAMPLES, TrainedClassifier
from mvsplit.utils.console import progress
from mvsplit.utils.errors import UserError

COLUMNS = {
    "fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Precision", "recall": "Recall", "kid": "KID",
    "recognised": "Recognised",
}  # fmt: skip
"""Metrics of the table for a paper, in the usual order."""


class ReaderImages:
    """The images of a set of shards, as validation sees them.

    Raises:
        UserError: if a sample is damaged and the reader's policy does not tolerate it.
    """

    def __init__(self, reader: ShardReader) -> None:
        assert isinstance(reader.form, Images)
        channels, height, width = reader.form.shape
        self.reader, self.shape = reader, (channels, height, width)
        self.fingerprint = f"{reader.index.fingerprint} {vars(reader.form.val_transform)}"

    def __len__(self) -> int:
        return len(self.reader)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for first in range(0, len(self.reader), batch_size):
            numbers = range(first, min(first + batch_size, len(self.reader)))
            samples = self.reader.__getitems__([(number, number) for number in numbers])
            self.reader.policy.enforce([f for sample in samples for f in sample["findings"] if f.kind != "retried"])
            yield torch.stack([sample["image"] for sample in samples if sample["weight"]])


def why_not_trained(data: ShardDataModule | None) -> str | None:
    """Why no classifier can be trained on this set; None if one can."""
    if data is None:
        return "no data are given"
    index = data.indices.get("train")
    if not isinstance(data.format, Images) or not isinstance(index, ShardIndex):
        return "the classifier needs images that are all indexed (data.window=0)"
    few = len(index) <= MAX_SAMPLES
    return None if few else f"the classifier takes at most {MAX_SAMPLES} of {len(index)} training images"


def chosen_network(given: FeatureNetwork | None, data: ShardDataModule | None) -> FeatureNetwork:
    """The network whose features are compared: the given one, or a classifier of the set's own images.

    Raises:
        UserError: if there is neither.
    """
    if given is not None:
        return given
    if why_not := why_not_trained(data):
        other = "data=… (e.g. data=digits), " if data is None else ""
        raise UserError(f"features = None: {why_not}; use {other}features=inception or features=dinov2")
    assert data is not None
    return TrainedClassifier.fit(data.reader("train"), data.num_classes, data.reader("val"))


def chosen_reference(
    path: str | None,
    network: FeatureNetwork,
    data: ShardDataModule | None,
    size: tuple[int, ...],
    cache_dir: Path,
) -> Reference:
    """What samples are compared with, see `reference` in `eval.yaml`.

    Args:
        path: of a .npz file, a folder of images or a folder of shards; None is the training set.
        network: whose features are compared.
        data: the set.
        size: (C, height, width) of the samples, to which shards are cropped.
        cache_dir: where the index of shards is stored.

    Raises:
        UserError: if it cannot be read, or is missing.
    """
    if path is not None and list(Path(path).glob("*.tar")):
        return _of_shards(Path(path), network, size, Storage(str(cache_dir)))
    if path is not None:
        return Reference.load(path, network)
    if data is None or not isinstance(data.format, Images) or not isinstance(data.indices.get("train"), ShardIndex):
        raise UserError(
            "reference = None: the training set is not indexed images; give a .npz, or a folder of images or shards"
        )
    beside = None if data.shards["train"].remote else Path(data.folder, "train")
    return Reference.of(ReaderImages(data.reader("train")), network, beside=beside)


def _of_shards(folder: Path, network: FeatureNetwork, size: tuple[int, ...], storage: Storage) -> Reference:
    channels, *image_size = size
    form = Images(list(image_size), channels, CentreCrop(list(image_size)))
    pattern = "train-*.tar" if list(folder.glob("train-*.tar")) else "*.tar"
    index = load_index(ShardSet(storage, str(folder), pattern, form))
    reader = ShardReader(index, storage, form, FaultPolicy(), False)
    return Reference.of(ReaderImages(reader), network, beside=folder / "shards")


def floor(quality: Quality, data: ShardDataModule | None) -> dict[str, float]:
    """The same metrics of real held-out images, as many as there are: what no samples can be expected to beat.

    Empty unless the set consists of images of the reference's size, and few enough not to double the work.
    """
    if data is None or not isinstance(data.format, Images) or quality.reference.shape not in (None, data.format.shape):
        return {}
    if len(data.validation_index()) > MAX_SAMPLES:
        return {}
    quality = Quality(quality.network, quality.reference)
    for images in ReaderImages(data.reader("val")).batches(64):
        quality.update(images)
    return {f"real_{name}": value for name, value in quality.metrics().items()}


def measure_files(path: str, quality: Quality) -> dict[str, Any]:
    """Add the images at a path; returns what identifies them."""
    images = open_images(path)
    with progress("measuring", len(images)) as advance:
        for batch in images.batches(64):
            quality.update(batch)
            advance(len(batch))
    return {"path": path, "sha256": images.fingerprint, "num_samples": len(images)}


def paper_table(metrics: dict[str, float]) -> str:
    """A table in Markdown, of the metrics and of real images if they were measured."""
    rows = {"": {name: metrics[name] for name in COLUMNS if name in metrics}}
    real = {name: metrics[f"real_{name}"] for name in COLUMNS if f"real_{name}" in metrics}
    rows |= {"real": real} if real else {}
    names = [name for name in COLUMNS if name in rows[""]]
    lines = [f"| | {' | '.join(COLUMNS[name] for name in names)} |", f"|---|{'---|' * len(names)}"]
    for title, values in rows.items():
        cells = (f"{values[name]:.4g}" if name in values else "" for name in names)
        lines.append(f"| {title or 'samples'} | {' | '.join(cells)} |")
    return "\n".join(lines)
