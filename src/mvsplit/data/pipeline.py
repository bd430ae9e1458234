"""Sets too large to index, read by webdataset's own pipeline: shards from front to back, a buffer to shuffle in.

What that costs is said at the start of a run (`COSTS`): no checksums, no counts, an order that depends on the number
of ranks and workers, and a resume that begins at a shard's start.
"""

import random
import subprocess
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from mvsplit.data.faults import DataFault, FaultPolicy, Finding
from mvsplit.data.formats import Format
from mvsplit.data.order import StreamOrder
from mvsplit.data.reader import Sample
from mvsplit.data.scan import split_name
from mvsplit.data.storage import Storage
from mvsplit.utils.errors import UserError

COSTS = (
    "data.reader=webdataset: the order of samples depends on the number of ranks and workers; a resume begins at a"
    " shard's start and may repeat or leave out samples; a shard cut short at a sample's end is not noticed"
)


class WebDatasetStream(IterableDataset[Sample]):
    """An endless stream of samples for one rank; each of its workers reads shards of its own.

    Shard number i of the endless order (a permutation per epoch, by seed) belongs to reader i mod R of the R readers
    of all ranks, so that none ever runs dry before the others.

    Args:
        locations: paths or addresses of the shards; `pipe:COMMAND` runs a shell (see `data.allow_pipe`).
        samples_per_shard: about how many each holds; places the stream after a resume.
        buffer: samples that each reader shuffles in. first_sample: asked at the start: samples read before, by all.
    """

    def __init__(
        self,
        locations: list[str],
        storage: Storage,
        form: Format,
        policy: FaultPolicy,
        seed: int,
        rank: int,
        world_size: int,
        samples_per_shard: int,
        buffer: int,
        first_sample: Callable[[], int],
    ) -> None:
        self.locations, self.storage, self.form, self.policy = locations, storage, form, policy
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.samples_per_shard, self.buffer, self.first_sample = samples_per_shard, buffer, first_sample
        self._findings: list[Finding] = []
        self._bad_shards = 0

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.world_size * workers
        done = self.first_sample() // (self.samples_per_shard * readers)  # whole shards, by each reader
        shards = self._shards(reader + done * readers, readers)
        samples = group_by_keys(tar_file_expander(self._opened(shards), handler=self._note), handler=self._note)
        shuffle = wds.filters.shuffle(
            self.buffer, initial=self.buffer, rng=random.Random(f"{self.seed} {done} {reader}")
        )
        for sample in shuffle(samples):
            if (decoded := self._decoded(sample)) is not None:
                self._bad_shards = 0
                findings, self._findings = self._findings, []
                yield decoded | {"findings": findings}

    def _shards(self, first: int, step: int) -> Iterator[str]:
        order = StreamOrder(len(self.locations), self.seed)
        while True:
            yield self.locations[order.take(first, 1)[0]]
            first += step

    def _opened(self, shards: Iterable[str]) -> Iterator[dict[str, Any]]:
        for location in shards:
            try:
                yield {"url": location, "stream": self._open(location)}
            except Exception as error:
                self._bad_shards += 1
                self._note(error, location)
                if self._bad_shards > len(self.locations):
                    raise UserError(f"{location}: {error}; none of the shards can be read") from error

    def _open(self, location: str) -> IO[bytes]:
        if location.startswith("pipe:"):
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

    def _decoded(self, sample: dict[str, Any]) -> Sample | None:
        where = f"{sample['__url__']}: sample '{split_name(sample['__key__'])[0]}'"
        part_of = {suffix: part for part, suffixes in self.form.members.items() for suffix in suffixes}
        data = next((sample[suffix] for suffix in sample if part_of.get(suffix) == "data"), None)
        label = sample.get("cls", b"").strip()
        if data is None or not label.isdigit() or len(label) > 9:
            kind, what = ("missing_member", "its data") if data is None else ("missing_label", "a class label")
            self._findings.append(Finding(kind, f"{where} lacks {what}"))  # type: ignore[arg-type]
            return None
        try:
            tensors = self.form.decode(data, 0, train=False)  # without flips, which go by the place in the stream
        except Exception as error:
            self._findings.append(Finding("undecodable", f"{where} does not decode ({error})"))
            return None
        return dict(tensors) | {"label": int(label), "index": -1, "weight": 1.0}
