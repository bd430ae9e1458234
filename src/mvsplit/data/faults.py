"""What can be wrong with data, by kind, and what a run does about it.

A reader never raises for a sample that cannot be read: the batch keeps its size and carries a `Finding`, so that all
ranks see it at the same step and go on, or stop, together.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch.distributed
from annotated_types import Ge, Le
from lightning.pytorch.strategies import Strategy

from mvsplit.utils.errors import UserError

Kind = Literal[
    "truncated",      # the tar ends inside a header or a member, or without its end mark
    "bad_header",     # bytes that are no tar header where one must be
    "bad_member",     # a link or device, an unsafe name, too large, a class that is no number
    "missing_member", # a sample without its image or latent
    "missing_label",
    "undecodable",    # the bytes are no picture or array
    "zeroed",         # a JPEG with a page of zeros, or without its end: most decoders take it
    "checksum",       # not the bytes that were indexed
    "missing_shard",
    "empty_shard",
    "replaced_shard", # not the shard that was indexed
    "network",        # all retries failed
    "cache_full",
    "retried",        # a fetch that succeeded later: counted, no fault
]  # fmt: skip

JUDGED_AFTER = 1000
"""Samples read before the rate of faults is judged."""


class DataFault(UserError):  # noqa: N818 (a fault of the data, not an error of the program)
    """One thing wrong with the data; the message names shard and sample."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind

    def __reduce__(self) -> Any:
        return type(self), (self.kind, str(self))  # across processes


class Finding(NamedTuple):
    """What a reader hands on with a batch: a kind, the line that tells it, and whether nothing could stand in."""

    kind: Kind
    message: str
    hopeless: bool = False


@dataclass(frozen=True)
class FaultPolicy:
    """What a damaged sample means for the run.

    Args:
        action: `fatal` stops at the first one; `substitute` trains on another sample in its place, chosen by (seed,
            place in the stream), and leaves it out of validation.
        max_rate: with `substitute`, the share of samples that may be damaged; beyond it the run stops. Judged when the
            data are indexed, and while reading after the first 1000 samples.
    """

    action: Literal["fatal", "substitute"] = "fatal"
    max_rate: Annotated[float, Ge(0), Le(1)] = 0.001

    def judge(self, found: Iterable[Finding], faults: int, samples: int) -> None:
        """Stop the run if these new findings, or the faults so far among so many samples, are too much.

        Raises:
            UserError: one line with the first finding, or the last and the rate.
        """
        serious = [f for f in found if f.kind != "retried"]
        for finding in serious:
            if self.action == "fatal":
                raise UserError(f"{finding.message} (data.faults.action=substitute goes on with other samples)")
            if finding.hopeless:
                raise UserError(f"{finding.message}; nothing else could be read in its place")
        if serious and samples >= JUDGED_AFTER and faults > self.max_rate * samples:
            raise UserError(
                f"data.faults.max_rate = {self.max_rate}: {faults} of {samples} samples were damaged; "
                f"the last: {serious[-1].message}"
            )


@dataclass
class FaultCounts:
    """How often each kind was met among how many samples, over all ranks: the same on each."""

    counts: Counter[str] = field(default_factory=Counter)
    samples: int = 0

    @property
    def faults(self) -> int:
        return sum(n for kind, n in self.counts.items() if kind != "retried")

    def add(self, found: list[Finding], samples: int, strategy: Strategy | None) -> list[Finding]:
        """Count this rank's findings together with those of the others (a collective call).

        Args:
            samples: of this rank's batch. strategy: how ranks talk to each other; None if there is one.

        Returns:
            The findings of all ranks, in the order of ranks.
        """
        world_size: int = getattr(strategy, "world_size", 1)
        if world_size > 1 and strategy.reduce_boolean_decision(bool(found), all=False):  # type: ignore[union-attr]
            gathered: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(gathered, found)
            found = [finding for part in gathered for finding in part]
        self.counts.update(f.kind for f in found)
        self.samples += samples * world_size
        return found
