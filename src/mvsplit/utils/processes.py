"""What processes that work for another one have in common."""

import multiprocessing
import os
import signal
import threading


def serve_parent() -> None:
    """In a process started by another: leave Ctrl-C to that one, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
