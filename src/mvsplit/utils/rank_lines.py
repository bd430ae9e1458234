"""Lines between the processes of a run, apart from its collectives: who is there, and who ended the run.

Every rank keeps a TCP connection to rank 0, on a thread, so that neither a busy nor a hanging main thread matters.
Messages are lines of JSON: a beat with the step now and then, `failed`, `left`; from rank 0 also the `verdict`, who
failed first, and `end`. A connection that breaks off means a process that died, silence one that is stopped or cut
off. Then `end(status)` is called on the thread; it ends the process.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

LOST = 75
"""Exit status when another rank was lost (EX_TEMPFAIL: starting again may help)."""
GRACE_S = 10.0
"""How long a rank that failed has for its own message before the others end."""
LAST_S = 30.0
"""How long the others wait at their end for rank 0, which has most to do there: launchers end all after the first."""
UNWIND_S = 30.0
"""How long a rank that failed has before its own process is ended."""

Message = dict[str, Any]
End = Callable[[int], None]
"""Ends this process with the status; called on the thread of the line."""


def complain(message: str | None) -> None:
    """Tell the user, past the lock of `sys.stderr`, which a hanging main thread may hold."""
    if message is not None:
        os.write(2, f"error: {message}\n".encode())


@dataclass
class Member:
    """A process of the run; `step` is the latest that is known of it."""

    rank: int
    host: str = "host unknown"
    pid: int = 0
    step: int = 0
    silent: int = 0
    """Our own beats since it was last heard: time in which we ourselves were stopped does not count."""
    left: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    writer: asyncio.StreamWriter | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def tell(self, **message: Any) -> None:
        if self.writer is not None and not self.left:
            self.writer.write(json.dumps(message).encode() + b"\n")


async def _read(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at the end of the connection, or if what comes is no message of ours."""
    try:
        message = json.loads(await reader.readline())
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


class Line(threading.Thread):
    """One rank's end: what its main thread may ask.

    Args:
        me: this process. timeout_s: of silence, after which a rank is lost. end: ends the process, see above.
    """

    def __init__(self, me: Member, timeout_s: float, end: End) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.me, self.timeout_s, self.end = me, timeout_s, end
        self.beat_s = min(timeout_s / 5, 5.0)
        self.verdict: tuple[int, int] | None = None
        """The rank that ended the run, and with which exit status."""
        self.decided = threading.Event()
        self._loop = asyncio.new_event_loop()

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    def fail(self, status: int) -> bool:
        """Tell all that this rank ends with `status`; whether it is the first to, whose message is to be read."""
        return bool(self._ask(self._fail(status), default=True))

    def leave(self) -> None:
        """Say that the work of this rank is done: nobody need look after it any more."""
        if self.decided.is_set():
            self.join()  # does not return: the run failed elsewhere, and the thread ends this process
        self._ask(self._leave(), default=None, patience_s=LAST_S + 5)

    def _ask(self, question: Coroutine[Any, Any, Any], default: Any, patience_s: float = 5) -> Any:
        if not self.is_alive():
            question.close()
            return default
        try:
            return asyncio.run_coroutine_threadsafe(question, self._loop).result(patience_s)
        except TimeoutError:
            return default

    def _decide(self, rank: int, status: int) -> None:
        self.verdict = (rank, status)
        self.decided.set()
        if rank == self.me.rank:  # the main thread tells its error and ends; if it cannot, this does
            self._loop.call_later(UNWIND_S, self._unwound, status)

    def _unwound(self, status: int) -> None:
        complain(f"{self.me} failed, and did not end by itself")
        self.end(status)

    def _lost(self, member: Member, how: str) -> str:
        return f"{member} {how}, last seen in step {member.step}; this run ends, go on with ckpt_path=last"

    def _silence(self) -> str:
        return f"has not answered for {self.timeout_s:g} s: killed, stopped or cut off"

    @abstractmethod
    async def _main(self) -> None: ...

    @abstractmethod
    async def _fail(self, status: int) -> bool: ...

    @abstractmethod
    async def _leave(self) -> None: ...


GONE = "has gone: killed or cut off"


class Hub(Line):
    """Rank 0's end: watches all the others and decides who failed first.

    Args:
        world_size: number of ranks. local: all of them are on this machine.
    """

    def __init__(self, me: Member, timeout_s: float, end: End, world_size: int, local: bool) -> None:
        super().__init__(me, timeout_s, end)
        self.others = [Member(rank) for rank in range(1, world_size)]
        self.token = secrets.token_hex(16)
        if local:
            self._socket = socket.create_server(("127.0.0.1", 0))
        elif socket.has_dualstack_ipv6():
            self._socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            self._socket = socket.create_server(("", 0), backlog=4096)
        self.port: int = self._socket.getsockname()[1]

    async def _main(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._socket)
        while not self.me.left:
            await asyncio.sleep(self.beat_s)
            for member in self.others:
                member.silent += 1
                member.tell(step=self.me.step)
                if member.silent * self.beat_s >= self.timeout_s and not member.left:
                    self._lose(member, self._silence())
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:  # anybody may connect
            hello = await asyncio.wait_for(_read(reader), self.timeout_s) or {}
        except TimeoutError:
            hello = {}
        if not secrets.compare_digest(str(hello.get("token")), self.token):
            writer.close()
            return
        member = self.others[hello["rank"] - 1]
        member.host, member.pid, member.writer = hello["host"], hello["pid"], writer
        while (message := await _read(reader)) is not None:
            member.silent = 0
            member.step = message.get("step", member.step)
            if "failed" in message:
                self._decide(member.rank, message["failed"])
            if "left" in message:
                member.left = True
        member.gone.set()
        if not member.left:
            self._lose(member, GONE)

    def _lose(self, member: Member, how: str) -> None:
        if self.verdict is None and not self.me.left:
            self._decide(member.rank, LOST)
            self._finish = asyncio.create_task(self._end_all(self._lost(member, how)))

    def _decide(self, rank: int, status: int) -> None:
        if self.verdict is not None:
            return
        super()._decide(rank, status)
        for member in self.others:
            member.tell(verdict=[rank, status])
        if rank != self.me.rank and status != LOST:
            self._finish = asyncio.create_task(self._end_after(self.others[rank - 1], status))

    async def _end_after(self, member: Member, status: int) -> None:
        with contextlib.suppress(TimeoutError):  # let it say why, and be the first that its launcher sees fail
            await asyncio.wait_for(member.gone.wait(), GRACE_S)
        # A signal's status speaks for itself.
        why = f"{member} failed in step {member.step}, as it says itself; this run ends" if status < 128 else None
        await self._end_all(why)

    async def _end_all(self, message: str | None) -> None:
        assert self.verdict is not None
        complain(message)
        for member in self.others:
            member.tell(end=True)
        await asyncio.sleep(0.1)  # for the sockets to take it
        self.end(self.verdict[1])

    async def _fail(self, status: int) -> bool:
        self._decide(self.me.rank, status)
        return self.verdict == (self.me.rank, status)

    async def _leave(self) -> None:
        for member in self.others:
            member.tell(left=True)
        await asyncio.sleep(0.1)
        self.me.left = True


class Spoke(Line):
    """Another rank's end: watches rank 0 and hears from it of the rest.

    Args:
        hub: rank 0. address: where its `Hub` listens. token: known to the ranks alone.
        speaks: whether this rank is the one to tell that rank 0 is lost.
    """

    def __init__(
        self,
        me: Member,
        timeout_s: float,
        end: End,
        hub: Member,
        address: tuple[str, int],
        token: str,
        speaks: bool,
    ) -> None:
        super().__init__(me, timeout_s, end)
        self.hub, self.address, self.token, self.speaks = hub, address, token, speaks

    async def _main(self) -> None:
        self._answered = asyncio.Event()
        try:
            reader, self.hub.writer = await asyncio.wait_for(asyncio.open_connection(*self.address), self.timeout_s)
        except (OSError, TimeoutError) as error:
            where = "{}:{}".format(*self.address)
            complain(f"{self.me} cannot reach rank 0 at {where} ({error}); callbacks.rank_watch=null does without")
            self.end(LOST)
        self.hub.tell(token=self.token, rank=self.me.rank, host=self.me.host, pid=self.me.pid)
        self._listening = asyncio.create_task(self._listen(reader))
        while not self._listening.done():
            self.hub.tell(step=self.me.step)
            self.hub.silent += 1
            if self.hub.silent * self.beat_s > self.timeout_s:
                self._end(self._silence())
            await asyncio.wait([self._listening], timeout=self.beat_s)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (message := await _read(reader)) is not None:
            self.hub.silent = 0
            self.hub.step = message.get("step", self.hub.step)
            if "verdict" in message:
                self._decide(*message["verdict"])
                self._answered.set()
                if self.verdict is not None and self.verdict[0] != self.me.rank:
                    self._loop.call_later(GRACE_S + 2 * self.beat_s, self._end, GONE)
            if "left" in message:
                self.hub.left = True
                return
            if "end" in message:
                break
        self._end(GONE)

    def _end(self, how: str) -> None:
        """What rank 0 told, or it is lost itself."""
        if self.verdict is None and not self.me.left:
            complain(self._lost(self.hub, how) if self.speaks else None)
            self.end(LOST)
        elif self.verdict is not None and self.verdict[0] != self.me.rank:
            self.end(self.verdict[1])

    async def _fail(self, status: int) -> bool:
        self.hub.tell(failed=status, step=self.me.step)
        try:
            await asyncio.wait_for(self._answered.wait(), 3)
        except TimeoutError:
            return True  # nobody to ask
        return self.verdict is not None and self.verdict[0] == self.me.rank

    async def _leave(self) -> None:
        self.hub.tell(left=True)
        self.me.left = True
        await asyncio.wait([self._listening], timeout=LAST_S)
