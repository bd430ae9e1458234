"""Heartbeats between the ranks of a run, over the store of their process group: which rank ended the run, and why.

Each rank writes beats with its step to the store, on a thread, so that a busy or hanging main thread does not matter.
Rank 0 watches the beats of the others, and they watch rank 0's. The first verdict in the store counts for all: a rank
failed, is lost, or rank 0 has finished. Then a thread calls `end(status)`, which ends the process. If the process that
hosts the store dies, usually rank 0, the connections of the others break.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

LOST = 75
"""Exit status when another rank was lost (EX_TEMPFAIL: starting again may help)."""
GRACE_S = 10.0
"""How long the others wait for a rank that failed: it reports the error, and its launcher should see it end first."""
LAST_S = 30.0
"""How long the others wait for rank 0 at the end, where it has most to do: launchers end all ranks after the first."""
UNWIND_S = 30.0
"""How long a rank that failed has to end by itself."""
FOREVER = timedelta(days=20)
ANSWER_S = 3.0
"""How long the main thread waits for the store, whose host may hang."""
GONE = "is gone: killed or cut off"
FINISHED = -1
"""Instead of a rank in a verdict: the work is done."""


def print_error(message: str) -> None:
    """Write to the error output without the lock of `sys.stderr`, which a hanging main thread may hold."""
    os.write(2, f"error: {message}\n".encode())


@dataclass(frozen=True)
class Verdict:
    """What ended the run.

    Args:
        by: the rank that wrote it.
        rank: the rank that failed or was lost.
        status: exit status for all.
        step: the last known step of that rank.
    """

    by: int
    rank: int
    status: int = 0
    step: int = 0


class Heartbeat:
    """The beats of this rank, and its watch over others.

    Args:
        rank: of this process.
        world_size: number of ranks.
        timeout_s: silence after which a rank is lost. Time in which this process was stopped does not count.
        end: ends this process with a status.
        reports: whether this rank reports that rank 0 is lost, if the store is lost with it.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, end: Callable[[int], None], reports: bool) -> None:
        self.rank, self.timeout_s, self.end, self.reports = rank, timeout_s, end, reports
        self.beat_s = min(timeout_s / 5, 5.0)
        self.step = 0
        """This rank's step, set by its main thread."""
        self.advice: str | None = None
        """The end of the message about a lost rank, for work that is not training."""
        self.verdict: Verdict | None = None
        self.decided = threading.Event()
        self.gone = threading.Event()
        """The rank of the verdict has ended, or the store with it."""
        self._leaving = False
        store = PrefixStore("mvsplit/heartbeat", _get_default_store())
        # A connection for each thread: it is busy while an operation waits.
        self._beating, self._listening, self._proposing = store.clone(), store.clone(), store.clone()
        self._watched = range(1, world_size) if rank == 0 else range(1)
        store.set(f"name {rank}", f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})")
        store.set(f"beat {rank}", "0 0")
        store.wait([f"beat {other}" for other in self._watched])
        names = store.multi_get([f"name {other}" for other in self._watched])
        self._names = {other: name.decode() for other, name in zip(self._watched, names, strict=True)}
        self._beats = dict.fromkeys(self._watched, b"0 0")
        self._silent = dict.fromkeys(self._watched, 0)  # own beats since the last of another
        self._talkers = [threading.Thread(target=loop, daemon=True) for loop in (self._beat, self._listen)]
        for talker in self._talkers:
            talker.start()
        self._watcher = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._watcher.start()

    def fail(self, status: int) -> bool:
        """Write that this rank ends with `status`; returns whether it is the first, whose error should be reported."""
        first, _ = self._propose(Verdict(self.rank, self.rank, status, self.step))
        self._decide(first)
        if own := first.rank == self.rank == first.by:
            self._hang_up()
        return own

    def leave(self) -> None:
        """End the watch over this rank, whose work is done."""
        self._leaving = True
        self._ask(lambda: self._proposing.set(f"done {self.rank}", ""))
        if self.rank == 0:
            others, deadline = [f"done {other}" for other in self._watched], time.monotonic() + LAST_S
            while time.monotonic() < deadline and not self._ask(lambda: self._proposing.check(others)):
                if self.decided.wait(0.05):  # one of them may still fail
                    break
            else:
                self._decide(self._propose(Verdict(0, FINISHED))[0])
                time.sleep(0.1)  # until the others have read it: this process may host the store
        if self.decided.wait(LAST_S):
            self.join()
        self._hang_up()

    def join(self) -> None:
        """Wait for the thread that ends this process; returns only if the work is done."""
        self._watcher.join()

    def lose(self, rank: int, how: str) -> None:
        """End all ranks because one is lost, and report it."""
        if self.decided.is_set():
            return
        step = int(self._beats[rank].split()[1])
        lost = Verdict(self.rank, rank, LOST, step)
        first, answered = self._propose(lost)
        if first == lost and (answered or self.reports):
            after = self.advice or f"last seen in step {step}; resume with ckpt_path=last"
            print_error(f"{self._names[rank]} {how}, {after}")
        self._decide(first)

    def _propose(self, verdict: Verdict) -> tuple[Verdict, bool]:
        """Write a verdict unless there is one.

        Returns:
            The verdict that counts, and whether the store answered; if not, this process acts on its own verdict.
        """
        answer = self._ask(lambda: self._proposing.compare_set("verdict", "", json.dumps(asdict(verdict))))
        return (verdict, False) if answer is None else (Verdict(**json.loads(answer)), True)

    def _ask(self, operation: Callable[[], Any]) -> Any:
        """What the store answers; None if it does not."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(DistError):  # the connection is broken
                answers.append(operation())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return answers[0] if answers else None

    def _hang_up(self) -> None:
        """End the threads that talk to the store. One that still waited for it would abort the ending interpreter."""
        self._ask(lambda: self._proposing.set(f"end {self.rank}", ""))
        for talker in self._talkers:
            talker.join(ANSWER_S)

    def _decide(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self.decided.set()

    def _beat(self) -> None:
        """On a thread: write this rank's beats and read the others'."""
        count = 0
        with suppress(DistError):
            while not self.decided.is_set():
                count += 1
                self._beating.set(f"beat {self.rank}", f"{'left' if self._leaving else count} {self.step}")
                beats = self._beating.multi_get([f"beat {other}" for other in self._watched])
                for rank, beat in zip(self._watched, beats, strict=True):
                    if beat != self._beats[rank]:
                        self._beats[rank], self._silent[rank] = beat, 0
                self.decided.wait(self.beat_s)

    def _listen(self) -> None:
        """On a thread: wait for the verdict, or for the end of the process that hosts the store."""
        try:
            self._listening.wait(["verdict"], FOREVER)
            self._decide(Verdict(**json.loads(self._listening.get("verdict"))))
            self._listening.wait([f"end {self.rank}"], FOREVER)
        except DistError:
            if self._leaving:
                self._decide(Verdict(self.rank, FINISHED))
            elif self.rank > 0:
                self.lose(0, GONE)
            else:  # the host is a launcher: no rank knows which of the two is gone
                self.lose(1, f"or the launcher's store {GONE}")
        self.gone.set()

    def _watch(self) -> None:
        """On a thread: look for ranks that are silent, and end this process after a verdict."""
        while not self.decided.wait(self.beat_s):
            for rank in self._watched:
                self._silent[rank] += 1
                if self._silent[rank] * self.beat_s >= self.timeout_s and not self._beats[rank].startswith(b"left"):
                    self.lose(rank, f"has not answered for {self.timeout_s:g} s: killed, stopped or cut off")
        verdict = self.verdict
        assert verdict is not None
        if verdict.rank == FINISHED:
            return
        if verdict.rank == verdict.by == self.rank:  # the main thread reports its error and ends
            time.sleep(UNWIND_S)
            print_error(f"rank {self.rank} failed, but did not exit by itself")
        elif verdict.status == LOST:
            time.sleep(0.5 if self.rank == 0 else 0)  # until the others have read it
        else:
            self.gone.wait(GRACE_S)
            if self.rank == 0 and verdict.status < 128:  # a signal's status speaks for itself
                name = self._names[verdict.rank]
                print_error(f"{name} failed in step {verdict.step}, see its own message; ending this run")
        self.end(verdict.status)
