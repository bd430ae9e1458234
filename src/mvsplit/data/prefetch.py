"""Fetch the shards that will be needed soon, in a process of its own beside the reading ones.

Not in threads: the reading processes are forked, and a fork of a process with busy threads can hang.
"""

import multiprocessing
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from mvsplit.data.faults import DataFault
from mvsplit.data.index import ShardIndex
from mvsplit.data.storage import Storage

CONNECTIONS = 4


class Prefetcher:
    """Keeps the cache ahead of the stream.

    Whatever goes wrong here is not told: the reader that needs the shard meets it too, and tells it.
    """

    def __init__(self, storage: Storage, index: ShardIndex) -> None:
        context = multiprocessing.get_context("fork")
        self._wanted: Any = context.Queue()
        self._asked: set[int] = set()
        self._process = context.Process(target=_fetch, args=(storage, index, self._wanted, os.getpid()), daemon=True)
        self._process.start()

    def ask(self, shards: list[int]) -> None:
        """These shards are needed next, in this order; asked for once as long as they stay in the list."""
        for shard in shards:
            if shard not in self._asked:
                self._wanted.put(shard)
        self._asked = set(shards)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _fetch(storage: Storage, index: ShardIndex, wanted: Any, parent: int) -> None:
    def fetch(number: int) -> None:
        shard = index.shards[number]
        with suppress(DataFault, ValueError):
            storage.local(f"{index.folder}/{shard.name}", shard.size, shard.sha256)

    with suppress(KeyboardInterrupt), ThreadPoolExecutor(CONNECTIONS) as pool:
        while os.getppid() == parent:  # a killed parent cannot say goodbye
            with suppress(queue.Empty):
                pool.submit(fetch, wanted.get(timeout=2))
        os._exit(0)
