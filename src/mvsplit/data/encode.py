"""Write a set anew: as pictures of one size, or as an autoencoder's latents; shards with an index and a manifest.

Shard k holds source samples [k·S, (k + 1)·S). Its bytes are a function of source and settings alone, so any process
may make any shard, in any order, and one that is there need not be made again. In the hidden folder `.encode` of the
output lie the settings, and per shard its index and a record, written after it: a shard without them is made anew.
Index and manifest of the whole set appear at the end.
"""

import io
import json
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import safetensors.torch
import torch
from annotated_types import Ge, Le, Len
from filelock import FileLock, Timeout
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from mvsplit.data.autoencoders import Autoencoder
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.faults import Finding
from mvsplit.data.formats import Format, Images, Latents, Manifest
from mvsplit.data.index import merge, own_index, read_index, split, write_index
from mvsplit.data.reader import ShardReader
from mvsplit.data.scan import Columns, Shard, scan_tar
from mvsplit.data.shards import write_shard
from mvsplit.utils.config import build
from mvsplit.utils.console import progress, say
from mvsplit.utils.errors import UserError
from mvsplit.utils.processes import serve_parent

VERSION = 1
Set = Literal["train", "val"]
Task = tuple[Set, int]
"""A set and the number of one of its shards."""
Tell = Callable[[Set, int, list[Finding]], None]
"""Told of each batch: set, source samples read, what was wrong with them."""


@dataclass
class Settings:
    """What to write and how; the keys of `encode.yaml`, explained there."""

    output: str
    kind: Literal["images", "latents"]
    splits: Annotated[list[Set], Len(1)]
    shard_size: PositiveInt
    image_format: Literal["png", "jpg", "webp"]
    quality: Annotated[int, Ge(1), Le(100)]
    flip: bool
    batch_size: PositiveInt
    num_processes: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu"]


@dataclass
class Record:
    """What is kept of a shard besides its index.

    Attributes:
        shape: of its samples, [C, height, width]. left_out: damaged source samples by kind. count: values per channel,
            total, squares: of latents, per channel: Σ mean and Σ (mean² + std²), so those of what is drawn from them.
    """

    shape: list[int] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    count: int = 0
    total: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What a process needs to make any shard. `autoencoder`: its config."""

    settings: Settings
    readers: dict[Set, ShardReader]
    autoencoder: dict[str, Any]

    def tasks(self, name: Set) -> list[Task]:
        return [(name, k) for k in range(-(-len(self.readers[name]) // self.settings.shard_size))]


def encode_sets(data: ShardDataModule, autoencoder: dict[str, Any], settings: Settings) -> dict[Set, Manifest]:
    """Make the shards that are missing, then index and manifest of each set.

    Args:
        data: the source. autoencoder: a config that was checked; built only for `kind=latents`.

    Returns:
        The manifests.

    Raises:
        UserError: if the source cannot be read, or the output holds something else.
    """
    if not isinstance(data.format, Images) or data.streams:
        raise UserError("data: pictures behind an index are needed: data/format=images data.reader=index")
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator = gpu: this machine has none; allowed are cpu and auto")
    settings = replace(settings, output=str(Path(settings.output).absolute()))
    built: Autoencoder | None = build(autoencoder) if settings.kind == "latents" else None
    hidden = _hidden(settings)
    hidden.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(hidden / "lock", timeout=0):  # released with the process, however it ends
            data.provide()
            data.indices |= {name: data.load(name) for name in settings.splits}
            job = Job(settings, {name: data.reader(name) for name in settings.splits}, autoencoder)
            identity = _identity(settings, data, built)
            _agree(job, identity)
            _make_missing(job, built)
            return {name: _finish(job, name, data, identity) for name in settings.splits}
    except Timeout:
        raise UserError(f"output = {settings.output}: another process writes there") from None


def _hidden(settings: Settings) -> Path:
    return Path(settings.output, ".encode")


def _shard_name(task: Task) -> str:
    return f"{task[0]}-{task[1]:06d}.tar"


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        json.dump(content, file, indent=indent)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# -------------------------------------------------------------- going on


def _identity(settings: Settings, data: ShardDataModule, autoencoder: Autoencoder | None) -> dict[str, Any]:
    """What the bytes of a shard depend on, besides the source."""
    assert isinstance(data.format, Images)
    transform = data.format.val_transform
    about: dict[str, Any] = {
        "kind": settings.kind,
        "shard_size": settings.shard_size,
        "data.image_size": data.image_size,
        "data.channels": data.channels,
        "data.format.val_transform": {"name": type(transform).__name__, **getattr(transform, "__dict__", {})},
    }
    if autoencoder is not None:
        more = {"flip": settings.flip, "batch_size": settings.batch_size, "autoencoder": autoencoder.identity()}
    else:
        more = {"image_format": settings.image_format}
        more |= {"quality": settings.quality} if settings.image_format != "png" else {}
    return json.loads(json.dumps(about | more, default=lambda value: type(value).__name__))


def _agree(job: Job, identity: dict[str, Any]) -> None:
    """Check that what lies in the output is of these settings and this source, and write both down.

    Raises:
        UserError: naming what differs.
    """
    output, place = Path(job.settings.output), _hidden(job.settings) / "settings.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        content = json.loads(place.read_text())
        if all(isinstance(content[key], dict) for key in ("settings", "sources")):
            known = content
    refused = f"output = {output}: another folder is needed, this one holds shards"
    for name in job.settings.splits:
        if f"source of {name}" not in known.get("sources", {}) and list(output.glob(f"{name}-*.tar")):
            raise UserError(f"{refused} of unknown origin for {name}")
    sources = {f"source of {name}": reader.index.fingerprint for name, reader in job.readers.items()}
    old, new = _flat(known.get("settings", identity) | known.get("sources", {})), _flat(identity | sources)
    for key in sorted(old.keys() | new.keys()):
        # Another set's source may be missing here, and this one's there.
        if old.get(key) != new.get(key) and not (key.startswith("source of") and None in (old.get(key), new.get(key))):
            raise UserError(f"{refused} with {key} = {old.get(key)}, not {new.get(key)}")
    for partial in [*output.glob("*.partial"), *place.parent.glob("*.partial")]:
        partial.unlink(missing_ok=True)  # what a killed process left
    _write_json(place, {"settings": identity, "sources": known.get("sources", {}) | sources})


def _flat(content: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


def _kept(job: Job, task: Task) -> tuple[Shard, Columns, Record] | None:
    """What is known of a shard that is there and whole."""
    name = _shard_name(task)
    index = read_index(_hidden(job.settings) / f"{name}.safetensors", job.settings.output)
    try:
        record = Record(**json.loads((_hidden(job.settings) / f"{name}.json").read_text()))
        size = Path(job.settings.output, name).stat().st_size
        if index is None or [(shard.name, shard.size) for shard in index.shards] != [(name, size)]:
            return None
        if not isinstance(record.left_out, dict) or len(record.shape) != 3:
            return None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return (*next(split(index)), record)


def _make_missing(job: Job, autoencoder: Autoencoder | None) -> None:
    """Make what is not there, with as many processes as wanted, and tell how far it is."""
    tasks = [task for name in job.settings.splits for task in job.tasks(name)]
    kept = {task: _kept(job, task) for task in tasks}
    missing = [task for task in tasks if kept[task] is None]
    damaged = Counter[Set]()
    for (name, _), content in kept.items():
        damaged[name] += sum(content[2].left_out.values()) if content else 0
    total = sum(len(reader) for reader in job.readers.values())
    left = sum(len(_numbers(job, task)) for task in missing)
    if 0 < len(missing) < len(tasks):
        say(f"{len(tasks) - len(missing)} of {len(tasks)} shards are there already")
    with progress("encoding", total, total - left) as advance:

        def tell(name: Set, samples: int, found: list[Finding]) -> None:
            advance(samples)
            damaged[name] += len(found)
            reader = job.readers[name]
            if found and damaged[name] > reader.policy.max_rate * len(reader):
                raise UserError(
                    f"data.faults.max_rate = {reader.policy.max_rate}: {damaged[name]} of the {len(reader)} samples in"
                    f" {reader.index.folder} are damaged so far; the last: {found[-1].message}"
                )

        if min(job.settings.num_processes, len(missing)) > 1:
            _share_out(job, missing, tell)
        elif missing:
            threads = torch.get_num_threads()
            try:
                maker = Maker(job, 0, autoencoder)
                for task in missing:
                    maker.make(task, tell)
            finally:
                torch.set_num_threads(threads)


def _numbers(job: Job, task: Task) -> range:
    """Source samples of a shard."""
    size = job.settings.shard_size
    return range(task[1] * size, min((task[1] + 1) * size, len(job.readers[task[0]])))


# ------------------------------------------------------------- one shard


class Maker:
    """Makes shards in one process.

    Args:
        number: of the process; GPUs are dealt out in turn.
    """

    def __init__(self, job: Job, number: int, autoencoder: Autoencoder | None = None) -> None:
        torch.set_num_threads(1)  # sums must not depend on how many processes share the cores
        torch.backends.cudnn.deterministic = True
        self.job = job
        latents = job.settings.kind == "latents"
        gpus = torch.cuda.device_count() if latents and job.settings.accelerator != "cpu" else 0
        self.device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
        self.autoencoder: Autoencoder | None = None
        if latents:
            self.autoencoder = (autoencoder or build(job.autoencoder)).to(self.device)

    def make(self, task: Task, tell: Tell) -> None:
        """Write one shard, its index and its record, in this order.

        Raises:
            UserError: if a source sample is damaged and that is fatal, or none can be read.
        """
        settings, name, record = self.job.settings, _shard_name(task), Record()
        write_shard(Path(settings.output, name), self._samples(task, record, tell))
        reader = self.job.readers[task[0]]
        form: Format = Latents([1, 1], 1) if self.autoencoder is not None else reader.form
        shard, columns = scan_tar(reader.storage, settings.output, name, form)
        for finding in shard.findings:  # an empty one, or what was read back is not what was written
            raise UserError(finding.message)
        # Without its time: the index holds wherever the shards are copied to.
        written = merge(settings.output, [(replace(shard, stamp_ns=0), columns)])
        write_index(_hidden(settings) / f"{name}.safetensors", written)
        _write_json(_hidden(settings) / f"{name}.json", asdict(record))

    def _samples(self, task: Task, record: Record, tell: Tell) -> Iterator[tuple[str, dict[str, bytes]]]:
        name, numbers, batch_size = task[0], _numbers(self.job, task), self.job.settings.batch_size
        reader = self.job.readers[name]
        for first in range(0, len(numbers), batch_size):
            chosen = numbers[first : first + batch_size]
            samples = reader.__getitems__([(number, number) for number in chosen])
            found = [f for sample in samples for f in sample["findings"] if f.kind != "retried"]
            reader.policy.judge(found, 0, 0)
            for finding in found:
                record.left_out[finding.kind] = record.left_out.get(finding.kind, 0) + 1
            whole = [sample for sample in samples if sample["weight"]]
            if whole:
                images = torch.stack([sample["image"] for sample in whole])
                contents = self._pictures(images, record) if self.autoencoder is None else self._latents(images, record)
                for sample, members in zip(whole, contents, strict=True):
                    members["cls"] = str(sample["label"]).encode()
                    if "caption" in sample:
                        members["txt"] = sample["caption"].encode()
                    yield f"{name}{sample['index']:08d}", members
            tell(name, len(chosen), found)

    def _pictures(self, images: Tensor, record: Record) -> list[dict[str, bytes]]:
        settings = self.job.settings
        record.shape = list(images.shape[1:])
        return [{settings.image_format: _picture(i, settings.image_format, settings.quality)} for i in images]

    @torch.inference_mode()
    def _latents(self, images: Tensor, record: Record) -> list[dict[str, bytes]]:
        """(B, channels, height, width) uint8 → members of each; the record's sums grow."""
        assert self.autoencoder is not None
        form = next(iter(self.job.readers.values())).form
        pixels: Tensor = form.finish({"image": images.to(self.device)}, train=False)["image"]
        members: list[dict[str, bytes]] = [{} for _ in images]
        for suffix, views in (("safetensors", pixels), ("flipped.safetensors", pixels.flip(-1))):
            if suffix != "safetensors" and not self.job.settings.flip:
                break
            mean, std = (part.to("cpu", torch.bfloat16) for part in self.autoencoder.encode(views))
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise UserError("autoencoder: its latents are not finite; autoencoder.dtype=float32 may help")
            for i, member in enumerate(members):
                member[suffix] = safetensors.torch.save({"mean": mean[i].contiguous(), "std": std[i].contiguous()})
            record.shape = list(mean.shape[1:])
            mean, std = mean.double(), std.double()  # as they were rounded
            sums = torch.stack([mean.sum((0, 2, 3)), (mean**2 + std**2).sum((0, 2, 3))])
            if record.count:
                sums += torch.tensor([record.total, record.squares], dtype=torch.float64)
            record.total, record.squares = sums.tolist()
            record.count += mean.numel() // mean.shape[1]
        return members


def _picture(pixels: Tensor, image_format: str, quality: int) -> bytes:
    """(channels, height, width) uint8 → an encoded picture."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    options = {
        "png": {"compress_level": 1},  # the default takes five times as long for a sixth less
        "jpg": {"quality": quality, "subsampling": 0},
        "webp": {"quality": quality},
    }[image_format]
    file = io.BytesIO()
    Image.fromarray(array).save(file, {"jpg": "jpeg"}.get(image_format, image_format), **options)
    return file.getvalue()


# ------------------------------------------------------------- processes


def _share_out(job: Job, tasks: list[Task], tell: Tell) -> None:
    """Make shards in several processes; whatever ends one of them ends all.

    Forked by a server that has imported what they need but used neither threads nor GPUs: safe with both, and quick.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvsplit.data.encode", "mvsplit.utils.entry"])
    processes = {}
    waiting = tasks[::-1]
    try:
        for number in range(min(job.settings.num_processes, len(tasks))):
            connection, theirs = context.Pipe()
            processes[connection] = context.Process(target=_serve, args=(theirs, job, number), daemon=True)
            processes[connection].start()
            theirs.close()
        busy = list(processes)
        while busy:
            for connection in cast(list[Connection], wait(busy)):
                try:
                    message = connection.recv()
                except (EOFError, ConnectionError):
                    processes[connection].join()
                    status = processes[connection].exitcode
                    raise UserError(f"num_processes: a process was ended from outside (status {status})") from None
                if isinstance(message, BaseException):
                    raise message
                if message is not None:
                    tell(*message)
                elif waiting:
                    connection.send(waiting.pop())
                else:
                    connection.send(None)
                    busy.remove(connection)
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _serve(connection: Connection, job: Job, number: int) -> None:
    """A process: ask for shards and make them, until there are none or the main process is gone."""
    serve_parent()
    try:
        maker = Maker(job, number)
        connection.send(None)
        while (task := connection.recv()) is not None:
            maker.make(task, lambda *told: connection.send(told))
            connection.send(None)
    except (UserError, OSError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"in a process of its own:\n{traceback.format_exc()}"))


# ------------------------------------------------------- the whole set


def _finish(job: Job, name: Set, data: ShardDataModule, identity: dict[str, Any]) -> Manifest:
    """Write index and manifest of a set whose shards are all there."""
    settings, reader = job.settings, job.readers[name]
    parts = []
    for task in job.tasks(name):
        if (kept := _kept(job, task)) is None:
            raise UserError(f"{settings.output}/{_shard_name(task)}: has gone or changed meanwhile; start again")
        parts.append(kept)
    index = merge(settings.output, [(shard, columns) for shard, columns, _ in parts])
    records = [record for _, _, record in parts]
    left_out = sum((Counter(record.left_out) for record in records), Counter(f.kind for f in reader.index.findings))
    counts = torch.bincount(torch.from_numpy(index.columns["label"]), minlength=data.num_classes)
    manifest: Manifest = {
        "version": VERSION,
        "kind": settings.kind,
        "split": name,
        "samples": len(index),
        "shape": records[0].shape,
        "left_out": dict(sorted(left_out.items())),
        "source": {
            "folder": data.folder,
            "pattern": data.patterns[name],
            "samples": len(reader),
            "fingerprint": reader.index.fingerprint,
        },
        "preprocessing": {key: identity[f"data.{key}"] for key in ("image_size", "channels", "format.val_transform")},
        "encoder": identity.get("autoencoder"),
        "settings": {key: value for key, value in identity.items() if not key.startswith(("data.", "autoencoder"))},
    }
    if settings.kind == "latents":
        manifest |= _statistics(records)
    manifest |= {
        "classes": counts.tolist(),
        "shards": [{key: vars(shard)[key] for key in ("name", "size", "sha256", "samples")} for shard in index.shards],
    }
    write_index(Path(settings.output, own_index(f"{name}-*.tar")), index)
    _write_json(Path(settings.output, f"{name}.manifest.json"), manifest, indent=1)
    return manifest


def _statistics(records: list[Record]) -> dict[str, list[float]]:
    """Per channel, mean and standard deviation of what is drawn from the latents: Var = E[std²] + Var[mean].

    A channel that never varies has the standard deviation 1, to divide by.
    """
    count = sum(record.count for record in records)
    total, squares = torch.zeros(2, len(records[0].total), dtype=torch.float64)
    for record in records:
        total += torch.tensor(record.total, dtype=torch.float64)
        squares += torch.tensor(record.squares, dtype=torch.float64)
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt()
    return {"channel_mean": mean.tolist(), "channel_std": torch.where(std > 0, std, 1.0).tolist()}
