"""Kinds of damage in a data set, and the policy that decides what a run does about them.

A reader never raises for a sample that cannot be read: the batch keeps its size and carries a `Finding`, so that all
ranks see it at the same step and continue, or stop, together.
"""

import re
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
    "bad_header",     # bytes that are not a tar header where one must be
    "bad_member",     # a link or device, an unsafe name, too large, a class that is not a number
    "missing_member", # a sample without its image or latent
    "missing_label",
    "undecodable",    # the bytes are not an image or array, or only part of one
    "checksum",       # not the bytes that were indexed
    "missing_shard",
    "empty_shard",
    "replaced_shard", # not the shard that was indexed
    "network",        # all attempts failed
    "cache_full",
    "retried",        # a download that succeeded later: counted, but not a fault
]  # fmt: skip

MIN_SAMPLES = 1000
"""Samples to read before the share of damaged ones is checked."""


class DataFault(UserError):  # noqa: N818 (a fault of the data, not an error of the program)
    """One thing wrong with the data; the message names shard and sample."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind

    def __reduce__(self) -> Any:
        return type(self), (self.kind, str(self))  # across processes


class Finding(NamedTuple):
    """What a reader reports with a batch.

    Attributes:
        kind: of fault.
        message: one line that names shard and sample.
        hopeless: no substitute could be read either.
    """

    kind: Kind
    message: str
    hopeless: bool = False


def reason_of(error: Exception) -> str:
    """A decoder's message in one line, without the addresses of its objects."""
    return " ".join(re.sub(r"<\S+ object at 0x[0-9a-f]+>", "", str(error)).split())[:120]


@dataclass(frozen=True)
class FaultPolicy:
    """What a damaged sample means for the run.

    Args:
        action: `fatal` stops at the first one; `substitute` trains on another sample in its place, chosen by (seed,
            place in the stream), and leaves it out of validation.
        max_rate: with `substitute`, the share of samples that may be damaged; beyond it the run stops. Checked while
            indexing, and while reading after the first 1000 samples.
    """

    action: Literal["fatal", "substitute"] = "fatal"
    max_rate: Annotated[float, Ge(0), Le(1)] = 0.001

    def enforce(self, found: Iterable[Finding], damaged: int = 0, samples: float = 1, among: str = "") -> None:
        """Stop the run if it must not continue with these new findings.

        Args:
            damaged: number of samples found damaged so far, of `samples`.
            among: describes these in the message.

        Raises:
            UserError: one line with the first finding, or with the rate and the last one.
        """
        faults = [finding for finding in found if finding.kind != "retried"]
        for fault in faults:
            if self.action == "fatal":
                raise UserError(f"{fault.message} (data.faults.action=substitute reads other samples instead)")
            if fault.hopeless:
                raise UserError(f"{fault.message}; no substitute could be read")
        if faults and damaged > self.max_rate * samples:
            raise UserError(
                f"data.faults.max_rate = {self.max_rate}: {damaged} of {among or f'{samples} samples'} are damaged;"
                f" the last: {faults[-1].message}"
            )


@dataclass
class FaultCounts:
    """How often each kind was found among how many samples, over all ranks: the same on each."""

    counts: Counter[str] = field(default_factory=Counter)
    samples: int = 0

    @property
    def faults(self) -> int:
        return sum(n for kind, n in self.counts.items() if kind != "retried")

    @property
    def checkable(self) -> int:
        """Faults to compare with the policy's rate: none among the first samples."""
        return self.faults if self.samples >= MIN_SAMPLES else 0

    def add(self, found: list[Finding], samples: int, strategy: Strategy | None) -> list[Finding]:
        """Count and return the findings of all ranks, in the order of ranks (a collective call).

        Args:
            strategy: connects the ranks; None if there is only one.
        """
        world_size: int = getattr(strategy, "world_size", 1)
        if world_size > 1 and strategy.reduce_boolean_decision(bool(found), all=False):  # type: ignore[union-attr]
            gathered: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(gathered, found)
            found = [finding for part in gathered for finding in part]
        self.counts.update(f.kind for f in found)
        self.samples += samples * world_size
        return found
