"""A server of a folder over HTTP in a process of its own, with ranges, that counts what it was asked and what it sent.

python tools/data_http.py FOLDER     prints its port; at the end of its input it prints the counts and ends
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Serving:
    """`counts` are there when the block is left: requests, bytes of shards, bytes of other files."""

    url: str
    counts: dict[str, int] = field(default_factory=dict)


@contextmanager
def counting_server(folder: Path) -> Iterator[Serving]:
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        serving = Serving(f"http://127.0.0.1:{int(process.stdout.readline())}")
        try:
            yield serving
        finally:
            serving.counts |= json.loads(process.communicate()[0])


def _serve(folder: Path) -> None:
    counts, lock = {"requests": 0, "shards": 0, "others": 0}, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self._send(404, b"no such file")
                return
            start, stop, status = 0, path.stat().st_size, 200
            if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                start, stop, status = int(asked[1]), min(stop, int(asked[2]) + 1), 206
            with open(path, "rb") as file:
                self._send(status, os.pread(file.fileno(), stop - start, start))

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with lock:
                counts["requests"] += 1
                counts["shards" if self.path.endswith(".tar") else "others"] += len(content)
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
