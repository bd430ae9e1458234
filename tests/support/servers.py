"""A real HTTP server on this machine that serves a folder and fails on demand."""

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """Serves `folder`. `faults[name]` lists what happens to the next requests for a file, one each:

    `503` or another status, `stall` (half the body, then silence), `cut` (half the body, then the line is closed),
    `cut without length` (and the client was not given its length), `drip` (a byte now and then), `drip headers`,
    `packed` (said to be gzip), `redirect ADDRESS`, `loop` (a redirect to itself); `other NAME` sends another file's
    content. `always[name]` does the same for every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.authorization: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *arguments: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.requests[name] += 1
        self.authorization.append(request.headers.get("Authorization"))
        fault = self.faults[name].pop(0) if self.faults[name] else self.always.get(name, "")
        path = self.folder / (fault.removeprefix("other ") if fault.startswith("other ") else name)
        if fault.isdigit() or not path.is_file():
            request.send_error(int(fault or 404))
            return
        if fault.startswith("redirect ") or fault == "loop":
            request.send_response(302)
            request.send_header("Location", f"/{name}" if fault == "loop" else fault.removeprefix("redirect "))
            request.end_headers()
            return
        body = path.read_bytes()
        request.send_response(200)
        if fault == "drip headers":
            request.flush_headers()
            with suppress(OSError):
                for _ in range(100):
                    request.wfile.write(b"X-A: b\r\n")
                    time.sleep(0.1)
            return
        if fault != "cut without length":
            request.send_header("Content-Length", str(len(body)))
        if fault == "packed":
            request.send_header("Content-Encoding", "gzip")
        request.end_headers()
        if fault == "drip":
            with suppress(OSError):
                for i in range(100):
                    request.wfile.write(body[i : i + 1])
                    time.sleep(0.05)
            return
        if fault in ("stall", "cut", "cut without length"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if fault == "stall":
                time.sleep(4)
            request.close_connection = True
            return
        request.wfile.write(body)


@contextmanager
def serve_gcs(bucket: str, objects: dict[str, Path]) -> Iterator[str]:
    """Google's storage protocol as far as listing, describing and reading objects go; yields its address."""
    about = {
        name: {"kind": "storage#object", "name": name, "bucket": bucket, "size": str(path.stat().st_size)}
        for name, path in objects.items()
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            route = self.path.partition("?")[0]
            name = route.rpartition("/o/")[2]
            if route.endswith("/o"):
                body = json.dumps({"kind": "storage#objects", "items": list(about.values())}).encode()
            elif name in objects:
                reads = "alt=media" in self.path
                body = objects[name].read_bytes() if reads else json.dumps(about[name]).encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    faulty = FaultyServer(folder)
    thread = threading.Thread(target=faulty.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        faulty.server.shutdown()
        faulty.server.server_close()
