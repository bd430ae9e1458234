"""Fetch the shards that will be needed soon, in a process of its own beside the reading ones.

Not in threads: the reading processes are forked, and a fork of a process with busy threads can hang.
"""

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection

from mvsplit.data.faults import DataFault
from mvsplit.data.index import ShardIndex
from mvsplit.data.storage import CONNECTIONS, Storage


class Prefetcher:
    """Keeps the cache ahead of the stream.

    Whatever goes wrong here is not told: the reader that needs the shard meets it too, and tells it.
    """

    def __init__(self, storage: Storage, index: ShardIndex) -> None:
        context = multiprocessing.get_context("fork")
        wanted, self._wanted = context.Pipe(duplex=False)
        self._asked: set[int] = set()
        self._process = context.Process(target=_fetch, args=(storage, index, wanted, os.getpid()), daemon=True)
        self._process.start()

    def ask(self, shards: list[int]) -> None:
        """These shards are needed next, in this order; asked for once as long as they stay in the list."""
        with suppress(OSError):  # the process was killed: readers fetch what they need themselves
            for shard in shards:
                if shard not in self._asked:
                    self._wanted.send(shard)
        self._asked = set(shards)

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # a half-fetched shard has no name yet, and its lock goes with the process
        self._process.join()


def _fetch(storage: Storage, index: ShardIndex, wanted: Connection, parent: int) -> None:
    # The training process's handlers came along with the fork.
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to all processes of a job, whose readers still need this one
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fetch(number: int) -> None:
        shard = index.shards[number]
        with suppress(DataFault, ValueError):
            storage.local(f"{index.folder}/{shard.name}", shard.size, shard.sha256)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        while os.getppid() == parent:  # a killed parent cannot say goodbye
            if wanted.poll(timeout=2):
                pool.submit(fetch, wanted.recv())
        os._exit(0)
