"""What a trace of a training step says about work beside the network: is the gathering of weights overlapped?"""

from collections.abc import Iterable
from typing import Any

Span = tuple[float, float]
GATHERING = ("allgather", "all_gather", "AllGather", "Memcpy", "chunk_cat", "split_with_sizes")
"""In names of kernels. One process alone gathers by copying."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that do not overlap, in order."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], stop)
        else:
            result.append((start, stop))
    return result


def common(ours: list[Span], theirs: list[Span]) -> float:
    """The length of what two lists of merged spans share."""
    total, i, j = 0.0, 0, 0
    while i < len(ours) and j < len(theirs):
        total += max(0.0, min(ours[i][1], theirs[j][1]) - max(ours[i][0], theirs[j][0]))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return total


def side_work(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of a chrome trace: the work of all streams but the busiest, and how much of it ran while that one worked.

    Returns:
        `main_ms`, `side_ms`, `gather_ms` (of the side's, what gathers weights), and `overlapped`, a share of `side_ms`,
        where there is any. Empty without a GPU.
    """
    streams: dict[Any, list[tuple[Span, str]]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event:
            span = float(event["ts"]), float(event["ts"]) + float(event["dur"])
            streams.setdefault(event["args"]["stream"], []).append((span, event["name"]))
    if not streams:
        return {}
    busy = {stream: merged(span for span, _ in work) for stream, work in streams.items()}
    main = max(busy, key=lambda stream: length(busy[stream]))
    others = [item for stream, work in streams.items() if stream != main for item in work]
    side = merged(span for span, _ in others)
    gather = merged(span for span, name in others if any(word in name for word in GATHERING))
    found = {"main_ms": length(busy[main]) / 1000, "side_ms": length(side) / 1000, "gather_ms": length(gather) / 1000}
    return found | ({"overlapped": common(side, busy[main]) / length(side)} if side else {})


def length(spans: list[Span]) -> float:
    return sum(stop - start for start, stop in spans)
