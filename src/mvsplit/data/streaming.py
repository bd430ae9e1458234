"""Sets too large to index: shards are read from front to back, and samples shuffled in webdataset's buffer.

The costs are logged at the start of a run (`COSTS`): no checksums, no counts, an order that depends on the number
of ranks and workers, and a resume that begins at a shard's start.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mvsplit.data.faults import DataFault, Finding, reason_of
from mvsplit.data.formats import Batch
from mvsplit.data.order import StreamOrder
from mvsplit.data.reader import MAX_SUBSTITUTES, Sample
from mvsplit.data.tars import ShardFindings, TarSamples, parse_caption, read
from mvsplit.data.training_sources import IndexedSource, TrainingSource, WindowedSource
from mvsplit.utils.console import info

COSTS = (
    "data.reader=webdataset: the order of samples depends on the number of ranks and workers; a resume begins at a"
    " shard's start and may repeat or omit samples"
)

Reader = Literal["index", "webdataset"]


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


def training_source(reader: Reader, common: Any, samples_per_shard: int, buffer: int) -> TrainingSource:
    """The source that `data.reader` and `data.window` choose; `common` are the arguments of all sources."""
    if reader == "webdataset":
        return StreamedSource(*common, samples_per_shard=samples_per_shard, buffer=buffer)
    *_, window = common
    return (WindowedSource if window else IndexedSource)(*common)


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
                size = len(batch["weight"])
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
        sample = dict(self.form.blank()) | (self.form.text.blank() if self.form.text else {})
        return sample | self._numbers(0, 0.0) | {"caption": ""}

    def _numbers(self, label: int, weight: float) -> Sample:
        return ({"label": label} if self.form.labelled else {}) | {"index": -1, "weight": weight}

    def _samples(self, shards: Iterable[str]) -> Iterator[RawSample]:
        """Samples shard by shard: the next shard may begin with the key that the last one ended with."""
        for location in shards:
            self._barren += 1
            if self._barren > len(self.locations) + 1:
                return  # a whole epoch without a sample
            found = ShardFindings(location)
            try:
                with self.source.shards.storage.local(location).open("rb") as file:
                    for key, parts, label in TarSamples(file, self.form.members, found, self.form.labelled):
                        self._report(found)
                        self._barren = 0
                        text = parts.pop("text", None)
                        contents = {part: read(file, *place) for part, place in parts.items()}
                        if text is not None and (states := self.form.text) is not None:
                            contents["text"] = read(file, text[0], min(text[1], states.limit + 1))
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
        part, text = self.form.choose([place], train=True)[0], self.form.text
        for needed in (part, "text") if text is not None else (part,):
            if needed not in sample.parts:
                names = " or ".join(self.form.members[needed])
                raise DataFault("missing_member", f"{sample.where} lacks its {names}")
        if self.form.labelled and sample.label >= (allowed := self.source.num_classes):
            raise DataFault("bad_member", f"{sample.where} has class {sample.label}, but data.num_classes = {allowed}")
        try:
            tensors: Sample = dict(self.form.decode(sample.parts[part], place, train=True))
            if text is not None:
                tensors |= text.decode(sample.parts["text"])
        except Exception as error:
            raise DataFault("undecodable", f"{sample.where} cannot be decoded ({reason_of(error)})") from None
        caption = parse_caption(sample.parts.get("txt"), sample.parts.get("json")) or ""
        return tensors | self._numbers(sample.label, 1.0) | {"caption": caption}
