"""A real S3 API on loopback (moto) with the faults that real ones have, on demand, and a log of what it was asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# What to answer to a GET instead, by its path (BUCKET/KEY) and its number among those for the path, from 0: a status
# line and S3's code for it; None to serve it.
Fault = Callable[[str, int], "tuple[str, str] | None"]


@dataclass
class S3:
    url: str  # of the API: for AWS_ENDPOINT_URL
    fault: Fault = lambda path, number: None
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # GETs: path, Range
    _lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve_s3() -> Iterator[S3]:
    """Skips the test where moto is not installed."""
    server = pytest.importorskip("moto.server", reason="needs moto: pip install '.[test]'")
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

    inner = server.DomainDispatcherApplication(server.create_backend_app)
    served = S3("")

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"].lstrip("/")
        fault = None
        if environ["REQUEST_METHOD"] == "GET":
            with served._lock:
                number = sum(path == asked for asked, _ in served.requests)
                served.requests.append((path, environ.get("HTTP_RANGE")))
            fault = served.fault(path, number)
        if fault is None:
            return inner(environ, start_response)
        status, code = fault
        body = f"<Error><Code>{code}</Code><Message>because of {code}</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    served.url = f"http://127.0.0.1:{running.port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        running.shutdown()
        running.server_close()


def upload(folder: Path, bucket: str) -> str:
    """Every file below `folder` into a bucket, made for it; its address."""
    import s3fs

    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir(bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{bucket}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{bucket}"
