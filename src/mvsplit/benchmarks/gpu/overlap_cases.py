"""Reads from a trace of a training step how far the gathering of weights overlaps with computation."""

from collections.abc import Iterable
from typing import Any

Span = tuple[float, float]
GATHERING = ("allgather", "all_gather", "AllGather", "Memcpy", "chunk_cat", "split_with_sizes")
"""Parts of kernel names. A single process gathers by copying."""


def covered(spans: Iterable[Span]) -> float:
    """The length of the union of spans."""
    total = end = 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def side_work(events: list[dict[str, Any]]) -> dict[str, float]:
    """The work of all streams but the busiest in a Chrome trace, and how far it overlaps with the busiest one.

    Returns:
        `main_ms`; `side_ms`; `gather_ms`, the part of `side_ms` that gathers weights; and `overlapped`, a share of
        `side_ms`, unless that is 0. Empty without a GPU.
    """
    streams: dict[Any, list[tuple[Span, str]]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event:
            span = float(event["ts"]), float(event["ts"]) + float(event["dur"])
            streams.setdefault(event["args"]["stream"], []).append((span, event["name"]))
    if not streams:
        return {}
    main = max(streams, key=lambda stream: covered(span for span, _ in streams[stream]))
    own = [span for span, _ in streams.pop(main)]
    others = [item for work in streams.values() for item in work]
    side = [span for span, _ in others]
    gather = [span for span, name in others if any(word in name for word in GATHERING)]
    found = {"main_ms": covered(own) / 1000, "side_ms": covered(side) / 1000, "gather_ms": covered(gather) / 1000}
    both = covered(side) + covered(own) - covered([*side, *own])
    return found | ({"overlapped": both / covered(side)} if side else {})
