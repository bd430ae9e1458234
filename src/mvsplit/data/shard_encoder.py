"""Encode one shard of a new set; in worker processes of `data/encode.py` if there are several.

A shard's bytes are a function of source and settings alone, so any process may encode any shard, in any order.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from mvsplit.data.autoencoders import Autoencoder
from mvsplit.data.encode_settings import Settings, Split
from mvsplit.data.faults import Finding
from mvsplit.data.formats import Format, Latents
from mvsplit.data.index import merge, write_index
from mvsplit.data.reader import ShardReader
from mvsplit.data.shard_writer import write_shard
from mvsplit.data.tar_scan import scan_tar
from mvsplit.data.tars import NO_CLASS
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.data.text_encoding import copied_with_states
from mvsplit.utils.config import build
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file
from mvsplit.utils.processes import serve_parent

Report = Callable[[Split, int, list[Finding]], None]
"""Called with a split, how many more of its source samples were read, and what was wrong with them."""


class ShardTask(NamedTuple):
    """One shard to encode: its split, and its number there."""

    split: Split
    number: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


@dataclass
class ShardRecord:
    """What is stored of a shard besides its index.

    Attributes:
        shape: of its samples, [C, height, width]; empty if they are copies.
        left_out: damaged source samples by kind.
        count: of latents, values per channel.
        total: of latents, Σ mean per channel.
        squares: of latents, Σ (mean² + std²) per channel: the squares of what is drawn from them.
    """

    shape: list[int] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    count: int = 0
    total: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EncodePlan:
    """All that a process needs to encode any shard; `encoder` is a config, of an autoencoder or a text encoder."""

    settings: Settings
    readers: dict[Split, ShardReader]
    encoder: dict[str, Any]

    @property
    def hidden(self) -> Path:
        return Path(self.settings.output, ".encode")

    def tasks(self, split: Split) -> list[ShardTask]:
        return [ShardTask(split, k) for k in range(-(-len(self.readers[split]) // self.settings.shard_size))]

    def samples(self, task: ShardTask) -> range:
        """Source samples of a shard."""
        size = self.settings.shard_size
        return range(task.number * size, min((task.number + 1) * size, len(self.readers[task.split])))


def device_of(settings: Settings, number: int = 0) -> torch.device:
    """Where the encoder of a process is; GPUs are assigned in turn."""
    gpus = torch.cuda.device_count() if settings.kind != "images" and settings.accelerator != "cpu" else 0
    return torch.device("cuda", number % gpus) if gpus else torch.device("cpu")


class ShardEncoder:
    """Encodes shards in one process.

    Args:
        number: of the process.
        encoder: built already, else built here if needed.
    """

    def __init__(self, plan: EncodePlan, number: int = 0, encoder: Autoencoder | TextEncoder | None = None) -> None:
        torch.set_num_threads(1)  # sums must not depend on how many processes share the cores
        torch.backends.cudnn.deterministic = True
        self.plan = plan
        kind = plan.settings.kind
        self.device = device_of(plan.settings, number)
        built: Any = (encoder or build(plan.encoder)).to(self.device) if kind != "images" else None
        self.autoencoder: Autoencoder | None = built if kind == "latents" else None
        self.text_encoder: TextEncoder | None = built if kind == "text" else None

    def encode(self, task: ShardTask, report: Report) -> None:
        """Write one shard, its index and its record, in this order.

        Raises:
            UserError: if a source sample is damaged and that is fatal, or none can be read.
        """
        output, hidden, record = self.plan.settings.output, self.plan.hidden, ShardRecord()
        write_shard(Path(output, task.name), self._samples(task, record, report))
        reader = self.plan.readers[task.split]
        form: Format = Latents([1, 1], 1) if self.autoencoder is not None else reader.form
        shard, columns = scan_tar(reader.storage, output, task.name, form)
        for finding in shard.findings:  # it is empty, or what was read back is not what was written
            raise UserError(finding.message)
        # Without its time: the index is valid wherever the shards are copied to.
        write_index(hidden / f"{task.name}.safetensors", merge(output, [(replace(shard, stamp_ns=0), columns)]))
        write_json(hidden / f"{task.name}.json", asdict(record))

    def _samples(self, task: ShardTask, record: ShardRecord, report: Report) -> Iterator[tuple[str, dict[str, bytes]]]:
        numbers, batch_size = self.plan.samples(task), self.plan.settings.batch_size
        reader = self.plan.readers[task.split]
        for first in range(0, len(numbers), batch_size):
            chosen = numbers[first : first + batch_size]
            if self.text_encoder is not None:
                copies, found = copied_with_states(reader, chosen, self.text_encoder)
                self._count(reader, found, record)
                yield from ((f"{task.split}{number:08d}", members) for number, members in copies)
                report(task.split, len(chosen), found)
                continue
            samples = reader.__getitems__([(number, number) for number in chosen])
            found = [f for sample in samples for f in sample["findings"] if f.kind != "retried"]
            self._count(reader, found, record)
            whole = [sample for sample in samples if sample["weight"]]
            if whole:
                images = torch.stack([sample["image"] for sample in whole])
                contents = self._images(images, record) if self.autoencoder is None else self._latents(images, record)
                for sample, members in zip(whole, contents, strict=True):
                    if sample.get("label", NO_CLASS) != NO_CLASS:
                        members["cls"] = str(sample["label"]).encode()
                    if "caption" in sample:
                        members["txt"] = sample["caption"].encode()
                    yield f"{task.split}{sample['index']:08d}", members
            report(task.split, len(chosen), found)

    def _count(self, reader: ShardReader, found: list[Finding], record: ShardRecord) -> None:
        reader.policy.enforce(found)
        for finding in found:
            record.left_out[finding.kind] = record.left_out.get(finding.kind, 0) + 1

    def _images(self, images: Tensor, record: ShardRecord) -> list[dict[str, bytes]]:
        """(B, channels, height, width) uint8 → an image file of each."""
        suffix, quality = self.plan.settings.image_format, self.plan.settings.quality
        options = {
            "png": {"compress_level": 1},  # the default takes five times as long to save a sixth
            "jpg": {"quality": quality, "subsampling": 0},
            "webp": {"quality": quality},
        }[suffix]
        record.shape = list(images.shape[1:])
        members: list[dict[str, bytes]] = []
        for pixels in images:
            array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
            file = io.BytesIO()
            Image.fromarray(array).save(file, {"jpg": "jpeg"}.get(suffix, suffix), **options)
            members.append({suffix: file.getvalue()})
        return members

    @torch.inference_mode()
    def _latents(self, images: Tensor, record: ShardRecord) -> list[dict[str, bytes]]:
        """(B, channels, height, width) uint8 → members of each; the record's sums grow."""
        assert self.autoencoder is not None
        form = next(iter(self.plan.readers.values())).form
        pixels: Tensor = form.finish({"image": images.to(self.device)}, train=False)["image"]
        members: list[dict[str, bytes]] = [{} for _ in images]
        for suffix, views in (("safetensors", pixels), ("flipped.safetensors", pixels.flip(-1))):
            if suffix != "safetensors" and not self.plan.settings.flip:
                break
            mean, std = (part.to("cpu", torch.bfloat16) for part in self.autoencoder.encode(views))
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise UserError("autoencoder: its latents are not finite; autoencoder.dtype=float32 may help")
            parts = {"mean": mean, "std": std}
            if self.plan.settings.posterior == "mean":
                parts, std = {"mean": mean}, torch.zeros_like(std)
            for i, member in enumerate(members):
                member[suffix] = safetensors.torch.save({name: part[i].contiguous() for name, part in parts.items()})
            record.shape = list(mean.shape[1:])
            mean, std = mean.double(), std.double()  # as they were rounded
            sums = torch.stack([mean.sum((0, 2, 3)), (mean**2 + std**2).sum((0, 2, 3))])
            if record.count:
                sums += torch.tensor([record.total, record.squares], dtype=torch.float64)
            record.total, record.squares = sums.tolist()
            record.count += mean.numel() // mean.shape[1]
        return members


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=indent).encode())


_worker: list[Any] = []
"""The plan and the number of this process; then its encoder."""


def start_worker(plan: EncodePlan, numbers: Any) -> None:
    """Initialise a worker process; `numbers` is a queue with a number for each."""
    serve_parent()
    _worker[:] = [plan, numbers.get()]


def encode_in_worker(task: ShardTask) -> list[tuple[Split, int, list[Finding]]]:
    """Encode one shard; returns what to report."""
    if len(_worker) == 2:  # here, where errors reach the main process
        _worker[:] = [ShardEncoder(*_worker)]
    reports: list[tuple[Split, int, list[Finding]]] = []
    _worker[0].encode(task, lambda *read: reports.append(read))
    return reports
