"""Sets too large to index: shards are read from front to back, and samples shuffled in webdataset's buffer.

The costs are logged at the start of a run (`COSTS`): no checksums, no counts, an order that depends on the number
of ranks and workers, and a resume that begins at a shard's start.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mvsplit.data.faults import DataFault, Finding, reason_of
from mvsplit.data.formats import Batch
from mvsplit.data.order import StreamOrder
from mvsplit.data.reader import MAX_SUBSTITUTES, Sample
from mvsplit.data.tars import ShardFindings, TarSamples, parse_json, read
from mvsplit.data.training_sources import TrainingSource
from mvsplit.utils.console import info

COSTS = (
    "data.reader=webdataset: the order of samples depends on the number of ranks and workers; a resume begins at a"
    " shard's start and may repeat or omit samples"
)


class StreamedSource(TrainingSource):
    """Shards streamed by webdataset.

    Args:
        samples_per_shard: about how many each contains; positions the stream after a resume.
        buffer: samples that each reader shuffles in.
    """

    numbered = False

    def __init__(self, *common: Any, samples_per_shard: int, buffer: int) -> None:
        super().__init__(*common)
        self.samples_per_shard, self.buffer, self.indexed_at_start = samples_per_shard, buffer, False

    def loader(self, trainer: Any, micro_batch: int, first_step: Callable[[], int], options: dict[str, Any]) -> Any:
        if trainer.is_global_zero:
            info(COSTS)
        stream = WebDatasetStream(
            self, trainer.global_rank, trainer.world_size, lambda: trainer.global_step * self.batch_size
        )
        loader = DataLoader(stream, batch_size=micro_batch, **options)
        return StreamedBatches(loader, trainer, self.batch_size, first_step)

    def fingerprint(self) -> str:
        return f"webdataset {self.shards.folder} {self.shards.pattern}"


class StreamedBatches:
    """A stream's batches with their places; as many as the run has left."""

    def __init__(self, loader: DataLoader, trainer: Any, batch_size: int, first_step: Callable[[], int]) -> None:
        self.loader, self.trainer, self.batch_size, self.first_step = loader, trainer, batch_size, first_step

    def __len__(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        trainer, batches = self.trainer, iter(self.loader)
        for step in range(self.first_step(), trainer.max_steps):
            for micro in range(trainer.accumulate_grad_batches):
                batch = next(batches)
                size = len(batch["label"])
                first = step * self.batch_size + (micro * trainer.world_size + trainer.global_rank) * size
                yield batch | {"position": torch.arange(first, first + size)}


class RawSample(NamedTuple):
    """A sample's shard and key (for messages), its class, and the bytes of the format's parts and of its caption."""

    where: str
    label: int
    parts: dict[str, bytes]


class WebDatasetStream(IterableDataset[Sample]):
    """An endless stream of samples for one rank; each of its workers reads shards of its own.

    Shard number i of the endless order (a permutation per epoch, by seed) belongs to reader i mod R of the R readers
    of all ranks, so that none ever runs dry before the others.

    Args:
        first_sample: called at the start; returns the number of samples read before, by all readers.
    """

    def __init__(self, source: StreamedSource, rank: int, world_size: int, first_sample: Callable[[], int]) -> None:
        self.source, self.rank, self.world_size, self.first_sample = source, rank, world_size, first_sample
        self.form, self.policy = source.shards.form, source.policy
        self.locations = source.shards.storage.expand(source.shards.folder, source.shards.pattern)
        self._findings: list[Finding] = []
        self._barren = 0  # shards since the last sample

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.world_size * workers
        per_shard, buffer = self.source.samples_per_shard, self.source.buffer
        done = self.first_sample() // (per_shard * readers)  # whole shards, by each reader
        order = StreamOrder(len(self.locations), self.source.seed)
        samples = self._samples(self.locations[order.take(n, 1)[0]] for n in count(reader + done * readers, readers))
        chance = random.Random(f"{self.source.seed} {done} {reader}")
        failed, place = 0, done * per_shard * readers + reader
        for sample in wds.filters.shuffle(buffer, initial=buffer, rng=chance)(samples):
            try:
                decoded = self._decoded(sample, place)
                failed, place = 0, place + readers
            except DataFault as fault:
                failed += 1
                last = self.policy.action == "fatal" or failed > MAX_SUBSTITUTES
                self._findings.append(Finding(fault.kind, str(fault), hopeless=last))
                if not last:
                    continue
                decoded = self._blank()
            findings, self._findings = self._findings, []
            yield decoded | {"findings": findings}
        reason = self._findings[-1].message if self._findings else f"{self.locations[0]}: contains no samples"
        hopeless = Finding("missing_shard", f"{reason}; no shard has readable samples", hopeless=True)
        yield self._blank() | {"findings": [*self._findings[-1:], hopeless]}

    def _blank(self) -> Sample:
        return dict(self.form.blank()) | {"label": 0, "index": -1, "weight": 0.0, "caption": ""}

    def _samples(self, shards: Iterable[str]) -> Iterator[RawSample]:
        """Samples shard by shard: the next shard may begin with the key that the last one ended with."""
        for location in shards:
            self._barren += 1
            if self._barren > len(self.locations) + 1:
                return  # a whole epoch without a sample
            found = ShardFindings(location)
            try:
                with self.source.shards.storage.local(location).open("rb") as file:
                    for key, parts, label in TarSamples(file, self.form.members, found):
                        self._report(found)
                        self._barren = 0
                        contents = {part: read(file, *place) for part, place in parts.items()}
                        yield RawSample(f"{location}: sample '{key}'", label, contents)
            except DataFault as fault:
                found.append(Finding(fault.kind, str(fault)))
            except FileNotFoundError:
                found.add("missing_shard", "shard does not exist")
            except OSError as error:
                found.add("truncated", error.strerror or str(error))
            self._report(found)

    def _report(self, found: ShardFindings) -> None:
        """Let the next sample carry what was found."""
        self._findings += found
        found.clear()

    def _decoded(self, sample: RawSample, place: int) -> Sample:
        part = self.form.choose([place], train=True)[0]
        if part not in sample.parts:
            raise DataFault("missing_member", f"{sample.where} lacks its {' or '.join(self.form.members[part])}")
        if sample.label >= (allowed := self.source.num_classes):
            raise DataFault("bad_member", f"{sample.where} has class {sample.label}, but data.num_classes = {allowed}")
        try:
            tensors = self.form.decode(sample.parts[part], place, train=True)
        except Exception as error:
            raise DataFault("undecodable", f"{sample.where} cannot be decoded ({reason_of(error)})") from None
        caption = sample.parts.get("txt", b"").decode(errors="replace")
        if "json" in sample.parts:
            caption = str(parse_json(sample.parts["json"])["caption"])
        return dict(tensors) | {"label": sample.label, "index": -1, "weight": 1.0, "caption": caption}
