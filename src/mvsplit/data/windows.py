"""Index the shards of a training set when they are first needed, so that training on a remote set starts at once."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from mvsplit.data.faults import DataFault, FaultPolicy, Finding
from mvsplit.data.index import Index, Part, Row, fingerprint, location_of, parts_in
from mvsplit.data.indexing import check_classes, check_damage
from mvsplit.data.order import SHARD_BITS
from mvsplit.data.shard_set import MAX_SAMPLES
from mvsplit.data.tar_scan import Shard
from mvsplit.utils.errors import UserError

MAX_PARTS = 256
"""Number of shards whose indices a process keeps in memory."""
UNREACHABLE = {"network", "cache_full", "missing_shard"}
ATTEMPTS_PER_SHARD = 4
"""Substitutes tried in a shard, before the next shard is tried."""


class WindowedIndex(Index):
    """Samples of shards that are indexed one after the other. Sample i of shard s has the number s · 2³² + i.

    Args:
        folder: path or address that the shards' names are relative to.
        names: of the shards.
        get: returns the entries of a shard, and indexes it if necessary.
        known: shards that are indexed already, by name.
        published: samples per shard by name, as far as the set's publisher lists them: for unreachable shards.

    Attributes:
        counts: samples of each shard, −1 while unknown.
        fingerprints: of each shard's samples, empty while unknown.
    """

    def __init__(
        self,
        folder: str,
        names: Sequence[str],
        get: Callable[[str], Part],
        known: dict[str, Part],
        published: dict[str, int],
        policy: FaultPolicy,
        num_classes: int,
    ) -> None:
        self.folder, self.names, self.published = folder, list(names), published
        self.policy, self.num_classes = policy, num_classes
        self.counts, self.fingerprints = [-1] * len(names), [""] * len(names)
        self._get, self._known = get, known
        self._recent: OrderedDict[int, Part] = OrderedDict()
        self._seen: dict[int, Shard] = {}  # by this process
        self.parts = set()
        self.fingerprint = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:16]  # of what is known now

    def part(self, number: int) -> Part:
        """The entries of shard `number`, which is indexed if necessary."""
        name = self.names[number]
        if name in self._known:
            return self._known[name]
        if number not in self._recent:
            part = self._get(name)
            if UNREACHABLE.intersection(finding.kind for finding in part[0].findings):
                return part  # the next call tries again
            self._recent[number] = part
            while len(self._recent) > MAX_PARTS:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]

    def known(self, shards: Sequence[int]) -> bool:
        """Whether the counts of these shards are known."""
        return all(self.counts[number] >= 0 for number in shards)

    def counts_of(self, shards: Sequence[int]) -> list[int]:
        """Samples of these shards; those that are not known yet are indexed."""
        self.open(number for number in shards if self.counts[number] < 0)
        return [self.counts[number] for number in shards]

    def open(self, shards: Iterable[int]) -> None:
        """Index these shards and check their contents.

        Raises:
            UserError: if the policy does not tolerate the damage of one, its classes are too high, or it is not the
                shard that a resumed run was trained on.
        """
        for number in shards:
            if number not in self._seen:
                self._open(number)

    def settle_parts(self, shards: Iterable[int]) -> None:
        """Use the parts of these shards, a run's first window, for all shards, unless a checkpoint has set them."""
        self.parts = self.parts or {name for number in shards for name in parts_in(self.part(number)[1])}

    def _open(self, number: int) -> None:
        name = self.names[number]
        shard, columns = self.part(number)
        found = fingerprint(columns)
        check_classes(columns["label"], self.num_classes, partial(location_of, self.folder, shard))
        if shard.samples > MAX_SAMPLES:
            raise UserError(f"{self.folder}/{name}: more than {MAX_SAMPLES} samples; use data.window=0 for such shards")
        self._seen[number] = shard
        seen = self.scanned
        unseen = (len(self.names) - len(seen)) / len(seen) * sum(shard.samples for shard in seen)
        if shard.findings or len(seen) == 1:
            check_damage(self.folder, seen, self.policy, unseen)
        if unreachable := [finding for finding in shard.findings if finding.kind in UNREACHABLE]:
            count = max(self.counts[number], self.published.get(name, -1))
            if count < 0 and unreachable[0].kind != "missing_shard":
                # Another rank may reach it, and how many samples it has must not depend on that.
                raise UserError(f"{unreachable[0].message}; its number of samples is not published either")
            self.counts[number] = max(0, count)
        elif self.fingerprints[number] not in ("", found):
            raise UserError(f"{self.folder}/{name}: not the shard that the checkpoint was trained on")
        else:
            self.counts[number], self.fingerprints[number] = shard.samples, found

    def __len__(self) -> int:
        if not self.known(range(len(self.names))):
            raise TypeError("the number of samples is known only when all shards have been indexed")
        return sum(self.counts)

    def row(self, number: int) -> Row:
        shard_number, place = divmod(number, 1 << SHARD_BITS)
        shard, columns = self.part(shard_number)
        if place >= shard.samples:
            what = f"{self.folder}/{shard.name}: contains {shard.samples} samples, none with number {place}"
            finding = next(iter(shard.findings), Finding("missing_member", what))
            raise DataFault(finding.kind, finding.message)
        return Row(shard, location_of(self.folder, shard, place), columns, place)

    def substitute(self, number: int, attempt: int, draw: int) -> int:
        shard = ((number >> SHARD_BITS) + attempt // ATTEMPTS_PER_SHARD) % len(self.names)
        return (shard << SHARD_BITS) + draw % max(1, self.part(shard)[0].samples)

    def shard(self, number: int) -> Shard:
        return self.part(number)[0]

    @property
    def scanned(self) -> Sequence[Shard]:
        return list(self._seen.values())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to find its place without indexing the shards before it."""
        return {"counts": self.counts, "fingerprints": self.fingerprints, "parts": sorted(self.parts)}

    def restore(self, state: Any) -> None:
        """Restore the counts from a checkpoint, which may come from anywhere.

        Raises:
            UserError: if they do not fit this set.
        """
        try:
            counts, fingerprints, parts = ([*state[key]] for key in ("counts", "fingerprints", "parts"))
            fits = len(counts) == len(fingerprints) == len(self.names)
            fits &= all(type(count) is int and -1 <= count <= MAX_SAMPLES for count in counts)
            fits &= all(isinstance(text, str) for text in fingerprints + parts)
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise UserError("ckpt_path: the checkpoint's data state does not match the set")
        self.counts, self.fingerprints, self.parts = counts, fingerprints, set(parts)
