"""Read single samples out of indexed shards: `pread`, checksum, decode; a batch at a time.

A sample that cannot be read never raises: the batch keeps its size and says what happened (`data/faults.py`).
"""

import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from mvsplit.data.faults import DataFault, FaultPolicy, Finding
from mvsplit.data.formats import Format
from mvsplit.data.index import ShardIndex
from mvsplit.data.scan import parse_json
from mvsplit.data.storage import Storage, is_remote
from mvsplit.utils.rng import Stream, bits

Sample = dict[str, Any]
DTYPES = {int: torch.int64, float: torch.float64}
MAX_OPEN = 64
"""Files that a reader keeps open."""
MAX_SUBSTITUTES = 16
"""Others tried in the place of a damaged sample."""


def collate(samples: list[Sample]) -> dict[str, Any]:
    """A batch: stacked tensors, captions as a list, and the samples' findings in one list."""
    findings = [finding for sample in samples for finding in sample.pop("findings")]
    dtypes = {name: DTYPES[type(value)] for name, value in samples[0].items() if type(value) in DTYPES}
    rest = [{name: value for name, value in sample.items() if name not in dtypes} for sample in samples]
    # The numbers share one storage: a reading process hands over each storage by a file descriptor of its own.
    columns = [torch.tensor([s[name] for s in samples], dtype=dtype) for name, dtype in dtypes.items()]
    rows = torch.stack([column.view(torch.int64) for column in columns])
    numbers = {name: row.view(dtype) for row, (name, dtype) in zip(rows, dtypes.items(), strict=True)}
    return default_collate(rest) | numbers | {"findings": findings}


def reason_of(error: Exception) -> str:
    """A decoder's complaint in one line, without the addresses of its objects."""
    return " ".join(re.sub(r"<\S+ object at 0x[0-9a-f]+>", "", str(error)).split())[:120]


class ShardReader(Dataset[Sample]):
    """Map-style view of an index; items are asked for as (place in the stream, sample number).

    Items: what the format decodes, `label`, `index` (number of the sample that was read), `position` (place in the
    stream), `caption` if the set has captions, `weight` (1; 0 for damaged samples of validation and places beyond its
    first pass), `findings`.

    Args:
        train: False reads each sample once, as validation does: without augmentation, and a damaged one has weight 0
            instead of a substitute.
        seed: of the choice of substitutes.
    """

    def __init__(
        self, index: ShardIndex, storage: Storage, form: Format, policy: FaultPolicy, train: bool, seed: int = 0
    ) -> None:
        self.index, self.storage, self.form, self.policy = index, storage, form, policy
        self.train, self.seed = train, seed
        self._captions = "caption" if {"txt", "json"} & index.parts else None
        self._files: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict()}  # file descriptors do not travel to other processes

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
                    sample = self.form.blank() | {"label": 0, "index": first, "position": position, "weight": 0.0}
                    sample |= {self._captions: ""} if self._captions else {}
                    break
                draw = bits(self.seed, Stream.SUBSTITUTE, torch.tensor([position]), attempt + 1)[0, attempt]
                number = int(draw) % len(self.index)
        findings += [Finding("retried", line) for line in self.storage.retried]
        self.storage.retried.clear()
        return sample | {"findings": findings}

    def read(self, position: int, number: int, part: str = "data") -> Sample:
        """One sample, as it is.

        Raises:
            DataFault: naming shard and sample.
        """
        data = self.raw(number, part)
        caption = {self._captions: self._caption(number)} if self._captions else {}
        try:
            sample: Sample = dict(self.form.decode(data, position, self.train)) | caption
        except Exception as error:  # decoders fail in many ways, all of them the data's fault
            raise self._fault("undecodable", number, f"does not decode ({reason_of(error)})") from None
        first_pass = self.train or position < len(self.index)
        sample |= {
            "label": int(self.index.columns["label"][number]),
            "index": number,
            "position": position,
            "weight": float(first_pass),
        }
        return sample

    def _caption(self, number: int) -> str:
        for part in ("txt", "json"):
            if part in self.index.parts and self.index.columns[f"{part}.size"][number] >= 0:
                data = self.raw(number, part)
                return data.decode(errors="replace") if part == "txt" else str(parse_json(data).get("caption", ""))
        return ""

    def raw(self, number: int, part: str = "data") -> bytes:
        """The bytes of one member of sample `number`.

        Raises:
            DataFault: if they are not those that were indexed, or cannot be had.
        """
        columns = self.index.columns
        offset, size = int(columns[f"{part}.offset"][number]), int(columns[f"{part}.size"][number])
        if size < 0:
            raise self._fault("missing_member", number, f"has no member for '{part}'")
        for attempt in (1, 2):
            file = self._open(number)
            try:
                data = os.pread(file, size, offset)
            except (OSError, OverflowError, MemoryError) as error:
                raise self._fault("truncated", number, f"cannot be read ({error})") from None
            if zlib.crc32(data) == columns[f"{part}.crc32"][number]:
                return data
            shard = self.index.shards[int(self.index.shard_of[number])]
            same_size = bool(shard.files) or os.fstat(file).st_size == shard.size
            if attempt == 1:  # once more from a file opened anew: a cached shard may have been fetched again meanwhile
                location = self.index.location(number)
                os.close(self._files.pop(location))
                self.storage.discard_damaged(location, shard.sha256)
        if len(data) < size:
            raise self._fault("truncated", number, "lies beyond the end of the shard")
        if not same_size:
            raise self._fault("replaced_shard", number, "is gone: not the shard that was indexed")
        raise self._fault("checksum", number, "fails its checksum")

    def _open(self, number: int) -> int:
        location = self.index.location(number)
        if location in self._files:
            self._files.move_to_end(location)
            return self._files[location]
        shard = self.index.shards[int(self.index.shard_of[number])]
        for attempt in (1, 2):  # another process may make room in the cache between the two lines
            path = self.storage.local(location, shard.size, shard.sha256)
            try:
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in a shard's place must not hold us up
                break
            except OSError as error:
                if attempt == 2 or not is_remote(location):
                    raise DataFault("missing_shard", f"{location}: {error.strerror}") from None
        self._files[location] = file
        while len(self._files) > MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _fault(self, kind: Any, number: int, what: str) -> DataFault:
        offset = int(self.index.columns["data.offset"][number])
        key = self.index.key(self.storage, number).rpartition(":")[2]
        return DataFault(kind, f"{self.index.location(number)}: sample {number} ('{key}') at byte {offset} {what}")
