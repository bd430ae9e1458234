"""Read single samples from indexed shards: `pread`, checksum, decode; a batch at a time, in PyTorch's loaders.

A sample that cannot be read never raises: the batch keeps its size and reports the fault (`data/faults.py`).
"""

import os
import signal
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from mvsplit.data.captions import CaptionStates, cut_to_longest
from mvsplit.data.faults import DataFault, FaultPolicy, Finding, reason_of
from mvsplit.data.formats import Batch, Format
from mvsplit.data.index import Index, Row
from mvsplit.data.order import SHARD_BITS
from mvsplit.data.remote import is_remote
from mvsplit.data.storage import Storage
from mvsplit.data.tars import MAX_MEMBER, parse_caption
from mvsplit.utils.rng import Stream, bits

Sample = dict[str, Any]
DTYPES = {int: torch.int64, float: torch.float64}
MAX_OPEN = 64
"""Files that a reader keeps open."""
MAX_SUBSTITUTES = 16
"""Number of substitutes tried for a damaged sample."""
NO_TRAINER: Any = SimpleNamespace(
    global_step=0,
    max_steps=sys.maxsize,
    accumulate_grad_batches=1,
    world_size=1,
    global_rank=0,
    local_rank=0,
    is_global_zero=True,
    strategy=SimpleNamespace(broadcast=lambda value: value, root_device=torch.device("cpu")),
)
"""Stands in for the trainer where there is none: the stream begins at its first step and has no end."""


def collate(samples: list[Sample]) -> Batch:
    """A batch: stacked tensors, captions as a list, and the samples' findings in one list."""
    cut_to_longest(samples)  # here: what is cut need not be copied between processes
    findings = [finding for sample in samples for finding in sample.pop("findings")]
    dtypes = {name: DTYPES[type(value)] for name, value in samples[0].items() if type(value) in DTYPES}
    rest = [{name: value for name, value in sample.items() if name not in dtypes} for sample in samples]
    # The numbers share one storage: a worker needs a file descriptor for each storage that it passes on.
    columns = [torch.tensor([s[name] for s in samples], dtype=dtype) for name, dtype in dtypes.items()]
    rows = torch.stack([column.view(torch.int64) for column in columns])
    numbers = {name: row.view(dtype) for row, (name, dtype) in zip(rows, dtypes.items(), strict=True)}
    return default_collate(rest) | numbers | {"findings": findings}


class ShardReader(Dataset[Sample]):
    """Map-style view of an index; items are requested as (place in the stream, sample number).

    Items: what the format decodes, `label` if the format needs classes, `index` (number of the sample that was read),
    `position` (place in the stream), `caption` if the set has captions, `weight` (1; 0 for damaged samples of
    validation and places beyond its first pass), `findings`.

    Args:
        train: False reads each sample once, as validation does: without augmentation, and a damaged one has weight 0
            instead of a substitute.
        seed: of the choice of substitutes.
        text: the captions' states that items have too (`data/captions.py`).
    """

    def __init__(
        self,
        index: Index,
        storage: Storage,
        form: Format,
        policy: FaultPolicy,
        train: bool,
        seed: int = 0,
        text: CaptionStates | None = None,
    ) -> None:
        self.index, self.storage, self.form, self.policy = index, storage, form, policy
        self.train, self.seed, self.text = train, seed, text
        self._captions = "caption" if {"txt", "json"} & index.parts else None
        self._files: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict()}  # file descriptors are not valid in other processes

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Sample]:
        """The samples of a batch."""
        parts = self.form.choose([position for position, _ in items], self.train)
        return [self._sample(position, number, part) for (position, number), part in zip(items, parts, strict=True)]

    def _sample(self, position: int, number: int, part: str) -> Sample:
        findings: list[Finding] = []
        first = number
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                sample = self.read(position, number, part)
                break
            except DataFault as fault:
                last = attempt == MAX_SUBSTITUTES
                if attempt == 0 or last:  # counted per place of the stream, not per try
                    findings.append(Finding(fault.kind, str(fault), hopeless=last))
                if self.policy.action == "fatal" or not self.train or last:
                    sample = self.form.blank() | (self.text.blank() if self.text else {})
                    sample |= {"index": first, "position": position, "weight": 0.0}
                    sample |= {"label": 0} if self.form.labelled else {}
                    sample |= {self._captions: ""} if self._captions else {}
                    break
                draw = bits(self.seed, Stream.SUBSTITUTE, torch.tensor([position]), attempt + 1)[0, attempt]
                number = self.index.substitute(first, attempt + 1, int(draw))
        findings += [Finding("retried", line) for line in self.storage.retried]
        self.storage.retried.clear()
        return sample | {"findings": findings}

    def read(self, position: int, number: int, part: str = "data") -> Sample:
        """One sample, without substitutes.

        Raises:
            DataFault: naming shard and sample.
        """
        data = self.raw(number, part)
        caption = {self._captions: self.caption(number) or ""} if self._captions else {}
        states = self.raw(number, "text", self.text.limit) if self.text else b""
        try:
            sample: Sample = dict(self.form.decode(data, position, self.train)) | caption
            if self.text is not None:
                sample |= self.text.decode(states)
        except Exception as error:  # decoders fail in many ways, all caused by the data
            raise self._fault("undecodable", number, f"cannot be decoded ({reason_of(error)})") from None
        first_pass = self.train or position < len(self.index)
        sample |= {"index": number, "position": position, "weight": float(first_pass)}
        return sample | ({"label": self.index.row(number).label} if self.form.labelled else {})

    def caption(self, number: int) -> str | None:
        """The caption of sample `number`; None if it has none.

        Raises:
            DataFault: if it cannot be read.
        """
        row = self.index.row(number)
        txt, json = (self.raw(number, part) if row.place(part)[1] >= 0 else None for part in ("txt", "json"))
        return parse_caption(txt, json)

    def raw(self, number: int, part: str = "data", limit: int = MAX_MEMBER) -> bytes:
        """The bytes, at most `limit`, of one member of sample `number`.

        Raises:
            DataFault: if they are not those that were indexed, or cannot be read.
        """
        row = self.index.row(number)
        offset, size = row.place(part)
        if size < 0:
            raise self._fault("missing_member", number, f"has no member for '{part}'")
        if size > limit:
            raise self._fault("bad_member", number, f"has {size} bytes for '{part}'; at most {limit} are allowed")
        for attempt in (1, 2):
            file = self._open(row)
            try:
                data = os.pread(file, size, offset)
            except (OSError, OverflowError, MemoryError) as error:
                raise self._fault("truncated", number, f"cannot be read ({error})") from None
            if zlib.crc32(data) == row.crc32(part):
                return data
            same_size = bool(row.shard.files) or os.fstat(file).st_size == row.shard.size
            if attempt == 1:  # reopen the file once: a cached shard may have been downloaded again meanwhile
                os.close(self._files.pop(row.location))
                self.storage.discard_damaged(row.location, row.shard.sha256)
        if len(data) < size:
            raise self._fault("truncated", number, "extends beyond the end of the shard")
        if not same_size:
            raise self._fault("replaced_shard", number, "is lost: its shard has changed since it was indexed")
        raise self._fault("checksum", number, "fails its checksum")

    def _open(self, row: Row) -> int:
        if row.location in self._files:
            self._files.move_to_end(row.location)
            return self._files[row.location]
        for attempt in (1, 2):  # another process may remove it from the cache between the two lines
            path = self.storage.local(row.location, row.shard.size, row.shard.sha256)
            try:
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in a shard's place must not block
                break
            except OSError as error:
                if attempt == 2 or not is_remote(row.location):
                    raise DataFault("missing_shard", f"{row.location}: {error.strerror}") from None
        self._files[row.location] = file
        while len(self._files) > MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _fault(self, kind: Any, number: int, what: str) -> DataFault:
        row = self.index.row(number)
        key = self.index.key(self.storage, number).rpartition(":")[2]
        where = f"{row.location}: sample {number & ((1 << SHARD_BITS) - 1)} ('{key}') at byte {row.place('data')[0]}"
        return DataFault(kind, f"{where} {what}")


class StreamLoader(DataLoader):
    """A loader whose place is the trainer's step count: it has no state of its own to save."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StreamBatches.first_step` returns the place."""


class LateLoader:
    """A loader that is created when it is first iterated over; until then its length is not known."""

    def __init__(self, make: Callable[[], DataLoader]) -> None:
        self._make = make
        self._made: DataLoader | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._made = self._made or self._make()
        return iter(self._made)

    def __len__(self) -> int:
        if self._made is None:
            raise TypeError("the set has not been indexed yet")
        return len(self._made)


def start_worker(worker: int, parent: int) -> None:
    """Prepare a worker process. A signal to all processes of a job must not end it: training still needs its batches.

    It ends with the training process, its parent; a second signal, such as the loader's own, ends it at once.
    """
    if os.getppid() != parent:  # it ended before: PyTorch's own check does not notice that
        os._exit(1)
    signals = 0

    def count(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, count)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def loader_options(data: Any) -> dict[str, Any]:
    """Arguments of PyTorch's loader for the samples of a data module."""
    # Only for copies to a GPU: page-locked memory needs a CUDA context, which a CPU run must not create.
    copied = data.trainer is not None and data.trainer.strategy.root_device.type == "cuda"
    return {
        "num_workers": data.num_workers,
        "pin_memory": data.pin_memory and copied,
        "persistent_workers": data.num_workers > 0,
        "collate_fn": collate,
        "worker_init_fn": partial(start_worker, parent=os.getpid()),
    }
