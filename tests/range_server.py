"""A small HTTP server of a folder, with ranges, and with the faults that real ones have, on demand."""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What to do with a request, by its path (without the first slash) and its number among those for the path, from 0:
# None to serve it, a status to answer with, "cut" to stop in the middle, "garbage" for other bytes, "redirect" to
# moved/PATH (which is PATH), "hang up" to close the connection after the answer without saying so, seconds to wait.
Fault = Callable[[str, int], "int | float | str | None"]


@dataclass
class Served:
    """A running server: its address, and what it was asked."""

    url: str
    ranges: bool = True
    fault: Fault = lambda path, number: None
    requests: list[str] = field(default_factory=list)
    bytes: int = 0  # of bodies sent
    parallel: int = 0  # most requests under way at a time
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(folder: Path, *, tls: ssl.SSLContext | None = None) -> Iterator[Served]:
    served = Served("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            with served._lock:
                number = served.requests.count(path)
                served.requests.append(path)
                served._now += 1
                served.parallel = max(served.parallel, served._now)
            try:
                self._answer(path, served.fault(path, number))
            finally:
                with served._lock:
                    served._now -= 1

        def _answer(self, path: str, fault: int | float | str | None) -> None:
            if isinstance(fault, float):
                time.sleep(fault)
            if isinstance(fault, int):
                self._send(fault, b"an answer of no use")
                return
            if fault == "redirect":
                self.send_response(302)
                self.send_header("Location", f"/moved/{path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            file = folder / path.removeprefix("moved/")
            if not file.is_file():
                self._send(404, b"no such file")
                return
            content, status = file.read_bytes(), 200
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and served.ranges:
                content, status = content[int(asked[1]) : int(asked[2]) + 1], 206
            if fault == "garbage":
                content = bytes(byte ^ 1 for byte in content)
            self._send(status, content, cut=fault == "cut")
            self.close_connection |= fault == "hang up"

        def _send(self, status: int, content: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            content = content[: len(content) // 2] if cut else content
            with served._lock:
                served.bytes += len(content)
            self.wfile.write(content)
            self.close_connection = cut

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]  # a client that gave up
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    served.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
