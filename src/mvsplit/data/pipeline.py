"""Sets too large to index, read by webdataset's own pipeline: shards from front to back, a buffer to shuffle in.

What that costs is said at the start of a run (`COSTS`): no checksums, no counts, an order that depends on the number
of ranks and workers, and a resume that begins at a shard's start.
"""

import random
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from mvsplit.data.faults import DataFault, FaultPolicy, Finding
from mvsplit.data.formats import Format
from mvsplit.data.order import StreamOrder
from mvsplit.data.reader import MAX_SUBSTITUTES, Sample, reason_of
from mvsplit.data.scan import member_problem, parse_json, parse_label, split_name
from mvsplit.data.storage import Storage

COSTS = (
    "data.reader=webdataset: the order of samples depends on the number of ranks and workers; a resume begins at a"
    " shard's start and may repeat or leave out samples; a shard cut short at a sample's end is not noticed"
)


class WebDatasetStream(IterableDataset[Sample]):
    """An endless stream of samples for one rank; each of its workers reads shards of its own.

    Shard number i of the endless order (a permutation per epoch, by seed) belongs to reader i mod R of the R readers
    of all ranks, so that none ever runs dry before the others.

    Args:
        locations: paths or addresses of the shards. piped: they are `pipe:COMMAND`, which the user has allowed to run
            in a shell.
        samples_per_shard: about how many each holds; places the stream after a resume.
        buffer: samples that each reader shuffles in. first_sample: asked at the start: samples read before, by all.
    """

    def __init__(
        self,
        locations: list[str],
        piped: bool,
        storage: Storage,
        form: Format,
        policy: FaultPolicy,
        seed: int,
        rank: int,
        world_size: int,
        num_classes: int,
        samples_per_shard: int,
        buffer: int,
        first_sample: Callable[[], int],
    ) -> None:
        self.locations, self.piped = locations, piped
        self.storage, self.form, self.policy = storage, form, policy
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.samples_per_shard, self.buffer, self.first_sample = samples_per_shard, buffer, first_sample
        self._findings: list[Finding] = []
        self.num_classes = num_classes
        self._barren = 0  # shards since the last sample

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.world_size * workers
        done = self.first_sample() // (self.samples_per_shard * readers)  # whole shards, by each reader
        shards = self._shards(reader + done * readers, readers)
        members = (member for shard in self._opened(shards) for member in self._members(**shard))
        samples = self._noticed(group_by_keys(members, handler=self._note))
        chance = random.Random(f"{self.seed} {done} {reader}")
        failed, place = 0, done * self.samples_per_shard * readers + reader
        for sample in wds.filters.shuffle(self.buffer, initial=self.buffer, rng=chance)(samples):
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
        reason = self._findings[-1].message if self._findings else f"{self.locations[0]}: holds no samples"
        hopeless = Finding("missing_shard", f"{reason}; none of the shards has samples", hopeless=True)
        yield self._blank() | {"findings": [*self._findings[-1:], hopeless]}

    def _blank(self) -> Sample:
        return dict(self.form.blank()) | {"label": 0, "index": -1, "weight": 0.0, "caption": ""}

    def _noticed(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            self._barren = 0
            yield sample

    def _shards(self, first: int, step: int) -> Iterator[str]:
        order = StreamOrder(len(self.locations), self.seed)
        while True:
            yield self.locations[order.take(first, 1)[0]]
            first += step

    def _opened(self, shards: Iterable[str]) -> Iterator[dict[str, Any]]:
        for location in shards:
            self._barren += 1
            if self._barren > len(self.locations) + 1:
                return  # a whole epoch without a sample
            try:
                yield {"url": location, "stream": self._open(location)}
            except Exception as error:
                self._note(error, location)

    def _members(self, url: str, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
        """A shard's members, as webdataset's own expander gives them, but neither unpacked nor of any size."""
        try:
            with stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined] # it would keep them all
                    if member.isdir():
                        continue
                    if problem := member_problem(member):
                        raise DataFault("bad_member", f"member {member.name[:80]!r} {problem}")
                    data = tar.extractfile(member)
                    assert data is not None
                    yield {"fname": member.name, "data": data.read(), "__url__": url}
        except Exception as error:  # what is left of the shard is lost; a sequential reader cannot do better
            self._note(error, url)

    def _open(self, location: str) -> IO[bytes]:
        if self.piped:
            process = subprocess.Popen(location.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE)
            assert process.stdout is not None
            return process.stdout
        return self.storage.local(location).open("rb")

    def _note(self, error: Exception, location: str = "") -> bool:
        """Webdataset's handler: go on, and let the next sample carry what happened."""
        where = location or str(getattr(error, "args", [""])[-1])
        kind = error.kind if isinstance(error, DataFault) else "truncated"
        kind = "missing_shard" if isinstance(error, FileNotFoundError) else kind
        self._findings.append(Finding(kind, f"{where}: {' '.join(str(error).split())[:160]}"))
        return True

    def _decoded(self, sample: dict[str, Any], place: int) -> Sample:
        where = f"{sample['__url__']}: sample '{split_name(sample['__key__'])[0]}'"
        suffixes = self.form.members[self.form.choose([place], train=True)[0]]
        data = next((sample[suffix] for suffix in suffixes if suffix in sample), None)
        if data is None:
            raise DataFault("missing_member", f"{where} lacks its {' or '.join(suffixes)}")
        try:
            about = parse_json(sample.get("json"))
            label = parse_label(sample.get("cls"), about)
            if label >= self.num_classes:
                raise DataFault("bad_member", f"has class {label}; data.num_classes = {self.num_classes}")
        except DataFault as fault:
            raise DataFault(fault.kind, f"{where} {fault}") from None
        try:
            tensors = self.form.decode(data, place, train=True)
        except Exception as error:
            raise DataFault("undecodable", f"{where} does not decode ({reason_of(error)})") from None
        caption = sample["txt"].decode(errors="replace") if "txt" in sample else str(about.get("caption", ""))
        return dict(tensors) | {"label": label, "index": -1, "weight": 1.0, "caption": caption}
