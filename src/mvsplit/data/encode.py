"""Re-encode a set as images of one size or latents, or with states of its captions: shards, index and manifest.

Shard k contains the source samples [k·S, (k + 1)·S). The hidden folder `.encode` of the output stores the settings, and
for each shard its index and a record, written after it: a shard without them is encoded again, the others are kept.
Index and manifest of the whole set appear at the end.
"""

import json
import multiprocessing
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mvsplit.data.autoencoders import Autoencoder
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.encode_settings import Settings, Split
from mvsplit.data.faults import Finding
from mvsplit.data.formats import Images, Manifest
from mvsplit.data.index import Part, merge, read_index, split, write_index
from mvsplit.data.shard_encoder import (
    EncodePlan,
    Report,
    ShardEncoder,
    ShardRecord,
    ShardTask,
    device_of,
    encode_in_worker,
    start_worker,
    write_json,
)
from mvsplit.data.shard_set import own_index
from mvsplit.data.tars import NO_CLASS
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.data.text_encoding import KEPT, check_captions, text_manifest, write_null, write_table
from mvsplit.utils.config import build
from mvsplit.utils.console import info, progress
from mvsplit.utils.errors import UserError
from mvsplit.utils.flat import dotted

VERSION = 1
PREPROCESSING = ("image_size", "channels", "format.val_transform")
PARTIAL = re.compile(
    r"((train|val)(-\d{6}\.tar(\.safetensors|\.json)?|\.index\.safetensors|\.manifest\.json)|settings\.json|null\.safetensors)\.\d+\.partial"
)
"""Names of files that are being written here: nothing else is ever removed."""


def encode_table(encoder: dict[str, Any], settings: Settings) -> list[int]:
    """Write the states of the captions in `settings.captions` in one file, and return the table's shape.

    Raises:
        UserError: if there is no such file, or the output exists.
    """
    _check_accelerator(settings)
    return write_table(build(encoder).to(device_of(settings)), settings)


def encode_sets(data: ShardDataModule, encoder: dict[str, Any], settings: Settings) -> dict[Split, Manifest]:
    """Encode the source's shards that are missing, then write index and manifest of each set, and return the manifests.

    Args:
        encoder: a checked config, of an autoencoder (`kind=latents`) or a text encoder (`kind=text`).

    Raises:
        UserError: if the source cannot be read, or the output contains something else.
    """
    if settings.kind == "text" and (data.layout != "shards" or not data.source.numbered):
        raise UserError("data: must be indexed shards (data.layout=shards data.reader=index)")
    if settings.kind != "text" and (not isinstance(data.format, Images) or not data.source.numbered):
        raise UserError("data: must be indexed images (data/format=images data.reader=index)")
    _check_accelerator(settings)
    settings = replace(settings, output=str(Path(settings.output).absolute()))
    built: Autoencoder | TextEncoder | None = build(encoder) if settings.kind != "images" else None
    own = built.normalisation() if isinstance(built, Autoencoder) else None
    if settings.normalisation == "autoencoder" and isinstance(built, Autoencoder) and own is None:
        raise UserError(f"normalisation = autoencoder: {type(built).__name__} has none; use set")
    plan = EncodePlan(settings, {}, encoder)
    plan.hidden.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.hidden / "lock", timeout=0):  # released with the process, however it ends
            data.provide()
            data.indices |= {name: data.load(name) for name in settings.splits}
            plan.readers.update({name: data.reader(name) for name in settings.splits})
            identity = _identity(settings, data, built)
            if isinstance(built, TextEncoder):
                check_captions(plan.readers, built)
            _check_output(plan, identity)
            _encode_missing(plan, built)
            if isinstance(built, TextEncoder):
                write_null(Path(settings.output), built.to(device_of(settings)))
            return {name: _finish(plan, name, data, identity, own) for name in settings.splits}
    except Timeout:
        raise UserError(f"output = {settings.output}: another process is writing there") from None


def _check_accelerator(settings: Settings) -> None:
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator = gpu: this machine has no GPU; use cpu or auto")


def _identity(settings: Settings, data: ShardDataModule, encoder: Autoencoder | TextEncoder | None) -> dict[str, Any]:
    """What the bytes of a shard depend on, besides the source."""
    if isinstance(encoder, TextEncoder):
        text = {"batch_size": settings.batch_size, "text_encoder": encoder.identity()}
        return {"kind": settings.kind, "shard_size": settings.shard_size, **text}
    assert isinstance(data.format, Images)
    transform = data.format.val_transform
    about: dict[str, Any] = {
        "kind": settings.kind,
        "shard_size": settings.shard_size,
        "data.image_size": data.image_size,
        "data.channels": data.channels,
        "data.format.val_transform": {"name": type(transform).__name__, **getattr(transform, "__dict__", {})},
    }
    if encoder is not None:
        more = {"flip": settings.flip, "batch_size": settings.batch_size, "autoencoder": encoder.identity()}
        more |= {"posterior": "mean"} if settings.posterior == "mean" else {}  # earlier sets do not record it
    else:
        more = {"image_format": settings.image_format}
        more |= {"quality": settings.quality} if settings.image_format != "png" else {}
    return json.loads(json.dumps(about | more, default=lambda value: type(value).__name__))


def _check_output(plan: EncodePlan, identity: dict[str, Any]) -> None:
    """Record settings and source; raise `UserError`, naming what differs, if the output contains other shards."""
    output, place = Path(plan.settings.output), plan.hidden / "settings.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        content = json.loads(place.read_text())
        if all(isinstance(content[key], dict) for key in ("settings", "sources")):
            known = content
    refused = f"output = {output}: choose another folder; this one contains shards"
    for name in plan.settings.splits:
        if f"source of {name}" not in known.get("sources", {}) and list(output.glob(f"{name}-*.tar")):
            raise UserError(f"{refused} of unknown origin for {name}")
    sources = {f"source of {name}": reader.index.fingerprint for name, reader in plan.readers.items()}
    old, new = dotted(known.get("settings", identity) | known.get("sources", {})), dotted(identity | sources)
    for key in sorted(old.keys() | new.keys()):
        # The record and this run may cover different splits.
        if old.get(key) != new.get(key) and not (key.startswith("source of") and None in (old.get(key), new.get(key))):
            raise UserError(f"{refused} with {key} = {old.get(key)}, not {new.get(key)}")
    for partial in (*output.iterdir(), *place.parent.iterdir()):
        if known and PARTIAL.fullmatch(partial.name):  # left by a killed process
            partial.unlink(missing_ok=True)
    write_json(place, {"settings": identity, "sources": known.get("sources", {}) | sources})


def _kept(plan: EncodePlan, task: ShardTask) -> tuple[Part, ShardRecord] | None:
    """The index and record of a shard that exists and is complete."""
    index = read_index(plan.hidden / f"{task.name}.safetensors", plan.settings.output)
    try:
        record = ShardRecord(**json.loads((plan.hidden / f"{task.name}.json").read_text()))
        size = Path(plan.settings.output, task.name).stat().st_size
        if index is None or [(shard.name, shard.size) for shard in index.shards] != [(task.name, size)]:
            return None
        if not isinstance(record.left_out, dict) or len(record.shape) != (0 if plan.settings.kind == "text" else 3):
            return None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return next(split(index)), record


def _encode_missing(plan: EncodePlan, built: Autoencoder | TextEncoder | None) -> None:
    """Encode the shards that do not exist, in `num_processes` processes, and show the progress."""
    kept = {task: _kept(plan, task) for name in plan.settings.splits for task in plan.tasks(name)}
    missing = [task for task, content in kept.items() if content is None]
    damaged = Counter[Split]()
    for task, content in kept.items():
        damaged[task.split] += sum(content[1].left_out.values()) if content else 0
    total = sum(len(reader) for reader in plan.readers.values())
    left = sum(len(plan.samples(task)) for task in missing)
    if 0 < len(missing) < len(kept):
        info(f"{len(kept) - len(missing)} of {len(kept)} shards already exist")
    with progress("encoding", total, total - left) as advance:

        def report(name: Split, samples: int, found: list[Finding]) -> None:
            advance(samples)
            damaged[name] += len(found)
            reader = plan.readers[name]
            among = f"the {len(reader)} samples in {reader.index.folder}"
            reader.policy.enforce(found, damaged[name], len(reader), among)

        if min(plan.settings.num_processes, len(missing)) > 1:
            _encode_in_processes(plan, missing, report)
        elif missing:
            threads = torch.get_num_threads()
            try:
                encoder = ShardEncoder(plan, encoder=built)
                for task in missing:
                    encoder.encode(task, report)
            finally:
                torch.set_num_threads(threads)


def _encode_in_processes(plan: EncodePlan, tasks: list[ShardTask], report: Report) -> None:
    """Encode shards in several processes; if one fails or dies, all end.

    Forked by a server that has imported what they need but used neither threads nor GPUs: safe with both, and quick.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvsplit.data.encode", "mvsplit.utils.entry"])
    count = min(plan.settings.num_processes, len(tasks))
    numbers, others = context.SimpleQueue(), set(multiprocessing.active_children())
    for number in range(count):
        numbers.put(number)
    with ProcessPoolExecutor(count, context, start_worker, (plan, numbers)) as pool:
        try:
            for done in as_completed([pool.submit(encode_in_worker, task) for task in tasks]):
                for read in done.result():
                    report(*read)
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:  # the pool would let them finish
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError("num_processes: a worker process was killed, perhaps because memory ran out") from None
            raise


def _finish(
    plan: EncodePlan,
    name: Split,
    data: ShardDataModule,
    identity: dict[str, Any],
    own: tuple[list[float], list[float]] | None,
) -> Manifest:
    """Write index and manifest of a set whose shards all exist; `own` is the autoencoder's normalisation."""
    settings, reader = plan.settings, plan.readers[name]
    parts, records = list[Part](), list[ShardRecord]()
    for task in plan.tasks(name):
        if (kept := _kept(plan, task)) is None:
            raise UserError(f"{settings.output}/{task.name}: was removed or changed during encoding; start again")
        parts.append(kept[0])
        records.append(kept[1])
    index = merge(settings.output, parts)
    left_out = sum((Counter(record.left_out) for record in records), Counter(f.kind for f in reader.index.findings))
    labels = torch.from_numpy(index.columns["label"])
    counts = torch.bincount(labels[labels != NO_CLASS], minlength=data.num_classes)
    manifest: Manifest = {
        "version": VERSION,
        "kind": settings.kind,
        "split": name,
        "samples": len(index),
        "shape": records[0].shape,
        "left_out": dict(sorted(left_out.items())),
        "source": {
            "folder": data.folder,
            "pattern": data.shards[name].pattern,
            "samples": len(reader),
            "fingerprint": reader.index.fingerprint,
        },
        "preprocessing": {key: identity.get(f"data.{key}") for key in PREPROCESSING},
        "encoder": identity.get("autoencoder"),
        "settings": {key: identity[key] for key in identity if not key.startswith(("data.", "autoencoder", "text_"))},
    }
    if settings.kind == "text":
        more = text_manifest(data.shards[name].manifest, data.format.kind, identity["text_encoder"])
        manifest = {key: value for key, value in manifest.items() if key not in KEPT} | more
    if settings.kind == "latents":
        manifest |= _statistics(records) | {"posterior": settings.posterior}
        mean, std = manifest["channel_mean"], manifest["channel_std"]
        if settings.normalisation == "autoencoder":
            assert own is not None
            mean, std = own
        manifest["normalisation"] = {"by": settings.normalisation, "mean": mean, "std": std}
    manifest |= {
        "classes": counts.tolist(),
        "shards": [{key: vars(shard)[key] for key in ("name", "size", "sha256", "samples")} for shard in index.shards],
    }
    write_index(Path(settings.output, own_index(f"{name}-*.tar")), index)
    write_json(Path(settings.output, f"{name}.manifest.json"), manifest, indent=1)
    return manifest


def _statistics(records: list[ShardRecord]) -> dict[str, list[float]]:
    """Per channel, mean and standard deviation of what is drawn from the latents: Var = E[std²] + Var[mean].

    A channel that never varies has the standard deviation 1, to divide by.
    """
    sums = torch.zeros(2, len(records[0].total), dtype=torch.float64)
    for record in records:
        sums += torch.tensor([record.total, record.squares], dtype=torch.float64)
    mean, square = sums / sum(record.count for record in records)
    std = (square - mean**2).clamp_min(0).sqrt()
    return {"channel_mean": mean.tolist(), "channel_std": torch.where(std > 0, std, 1.0).tolist()}
