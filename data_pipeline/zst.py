"""A .zst file as a stream that notices where it was cut short, which zstandard's own stream_reader does not."""

from __future__ import annotations

import io
from typing import IO, Any

from sisa_dist.config import UserError

_CHUNK = 1 << 16


class ZstReader(io.RawIOBase):
    """Decompresses `raw`, any number of frames one after the other. Raises EOFError at a cut or damage."""

    def __init__(self, raw: IO[bytes], where: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{where}: needs the `zstandard` library: pip install 'sisa-dist[corpus]'") from None
        self._raw, self._error = raw, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as long as `zstd --long=31` writes
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_CHUNK)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("ends inside a compressed frame")
                    return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
