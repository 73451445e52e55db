"""Ranges of files at URLs, through fsspec: retried with growing random pauses, each try within a time limit, counted.

It knows nothing of shards. What is permanently absent or refused is a UserError at once; everything else is worth
another try, because a busy server, a cut connection and a proxy's mistake all look different from one library to the
next.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.asyn import sync

from sisa_dist.config import UserError

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds; doubled from one to the next
_WHOLE_FILE = 10  # times the limit of a range: an index can be many times longer than a member
_TRY_AGAIN = (408, 425, 429)  # of the 4xx, those that pass
_EXTRAS = {"http": "http", "https": "http", "s3": "s3"}


@dataclass(frozen=True)
class RemoteSettings:
    """How shards at URLs are read: data.cache_folder and its neighbours in the config."""

    cache_folder: str | None = None  # None: nothing is kept on disk
    cache_gb: float = 20.0
    retries: int = 5  # after the first try
    timeout: float = 60.0  # seconds a try may take
    connections: int = 8  # requests of one process at a time


@dataclass
class Traffic:
    """What one process asked of the network and of its disk cache, for one data folder."""

    requests: int = 0
    bytes: int = 0  # of answers, also of those thrown away
    retries: int = 0
    cache_hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return {name: getattr(self, name) for name in ("requests", "bytes", "retries", "cache_hits")}


class Gone(UserError):
    """There is no such file, or no right to read it: S3 says no more where listing is not allowed."""


class Missing(Gone):
    """There is certainly no such file: its server says so."""


class Fetcher:
    """Reads URLs as `settings` say. `pause` waits; tests give another."""

    def __init__(self, settings: RemoteSettings, *, pause: Callable[[float], None] = time.sleep) -> None:
        self.settings, self.traffic, self._pause = settings, Traffic(), pause

    def read(self, url: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes start … stop-1 of the file at `url`, or all of it. Raises UserError where they cannot be had,
        Gone where there is no such file.

        More than was asked for, where the server knows no ranges; less, where the file ends first.
        """
        limit = self.settings.timeout * (1 if start is not None else _WHOLE_FILE)
        for attempt in range(self.settings.retries + 1):
            if attempt:
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1))
                self._pause(random.uniform(longest / 2, longest))  # apart: many ranks meet the same busy server
                self.traffic.add(retries=1)
            try:
                self.traffic.add(requests=1)
                payload = _read_once(url, start, stop, limit)
            except Exception as error:
                if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
                    raise Missing(
                        f"{url}: cannot be read (there is no such file): put it there, or mend the URL"
                    ) from None
                if isinstance(error, PermissionError) or _status(error) == 403:
                    raise Gone(
                        f"{url}: cannot be read (no such file, or no right to read it: {_line(error)}): put it there, "
                        "mend the URL, or see to your credentials"
                    ) from None
                if reason := _permanent(error, url):
                    raise UserError(f"{url}: cannot be read ({reason})") from None
                if not threading.main_thread().is_alive():  # the interpreter is leaving: nothing can be read any more
                    raise UserError(f"{url}: not read, the process ends") from None
                last = error
                log.warning("%s: try %d of %d: %s", url, attempt + 1, self.settings.retries + 1, _line(error))
                continue
            self.traffic.add(bytes=len(payload))
            return payload
        raise UserError(
            f"{url}: cannot be read in {self.settings.retries + 1} tries (the last: {_line(last)}): see to the server "
            "or the network, or raise data.retries or data.timeout"
        )


def _read_once(url: str, start: int | None, stop: int | None, limit: float) -> bytes:
    filesystem, inner = fsspec.core.url_to_fs(url, **_options(url.partition("://")[0]))
    if not filesystem.async_impl:
        return filesystem.cat_file(inner, start=start, end=stop)
    filesystem.retries = 1  # s3fs tries five times of its own, which would multiply with ours
    return sync(filesystem.loop, filesystem._cat_file, inner, start=start, end=stop, timeout=limit)


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("http", "https"):
        import aiohttp

        # Ranges are of the stored bytes, so no compression on the way; the limit of a try is Fetcher's.
        return {
            "client_kwargs": {
                "timeout": aiohttp.ClientTimeout(total=None),
                "headers": {"Accept-Encoding": "identity"},
                "trust_env": True,  # a proxy that the environment names
            }
        }
    if protocol == "s3":
        # A request that waits for one of botocore's ten connections would use up its time there.
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "max_pool_connections": 100}}
    return {}


def _status(error: Exception) -> int | None:
    """Of an answer over HTTP."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _permanent(error: Exception, url: str) -> str | None:
    """Why another try is in vain; None where it is not."""
    protocol = url.partition("://")[0]
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol)
        return f"{_line(error)}: pip install 'sisa-dist[{extra}]'" if extra else _line(error)
    status = _status(error)
    past_its_end = protocol == "s3" and getattr(error, "errno", None) == errno.EINVAL and "range" in str(error).lower()
    if status == 416 or past_its_end:
        return "it ends before the part that is asked for, cut short or replaced"
    if status is not None and 400 <= status < 500 and status not in _TRY_AGAIN:
        return f"status {status}: {_line(error)}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "ClientConnectorCertificateError" in kinds:
        return f"{_line(error)}: name its certificate's authority in SSL_CERT_FILE"
    if "NoCredentialsError" in kinds:
        return f"{_line(error)}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for public data FSSPEC_S3_ANON=true"
    # s3fs gives EINVAL for every request of which S3 says that it is wrong as such.
    if isinstance(error, ValueError) or "ProfileNotFound" in kinds or getattr(error, "errno", None) == errno.EINVAL:
        return _line(error)
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
