"""The corpus cut into slices, the unit of work of `sisa prepare`: planned from the files alone, read one at a time.

A slice is some whole small files, a stretch of bytes of a large .jsonl, row groups of a large .parquet, or a piece of a
streamed data set. Where they are cut depends on the files and never on how many workers there are. Damage to a file is
one line here; what one document has wrong comes from readers.py.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import IO, Literal, NamedTuple

from data_pipeline.building import Interrupted
from data_pipeline.inputs import InputFile, one_line, open_input
from data_pipeline.readers import (
    AGAIN,
    NO_TEXT,
    BadDocument,
    Document,
    Placed,
    open_parquet,
    read_hub,
    read_jsonl,
    read_packed_jsonl,
    read_parquet,
    read_python,
    read_tar,
    read_txt,
)
from sisa_dist.config import UserError

OnBad = Literal["stop", "skip"]
NOT_BAD = ("empty", NO_TEXT)  # counted whatever on_bad says
_EXAMPLES = 3  # lines that say what was skipped
_EXPANSION = {".jsonl.gz": 4, ".jsonl.zst": 4, ".parquet": 3}  # text in a compressed byte, roughly


class Span(NamedTuple):
    """A part of file number `file`: see the readers for what `start` and `stop` count; None: to the end."""

    file: int
    start: int = 0
    stop: int | None = None
    size: int = 0  # bytes as it lies there, about; 0 where nobody says

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop is None


def text_bytes(files: Sequence[InputFile]) -> int:
    """About how much text there is, from sizes alone."""
    return sum(file.size * _EXPANSION.get(file.kind, 1) for file in files)


def plan_slices(files: Sequence[InputFile], size: int) -> list[list[Span]]:
    """Slices of about `size` bytes as they lie there, in the order of the corpus."""
    slices: list[list[Span]] = []
    room = 0
    for number, file in enumerate(files):
        spans = _spans(number, file, size)
        if len(spans) == 1 and 0 < file.size <= room:
            slices[-1] += spans
            room -= file.size
        else:
            slices += [[span] for span in spans]
            room = size - file.size if len(spans) == 1 and file.size else 0
    return slices


def _spans(number: int, file: InputFile, size: int) -> list[Span]:
    if file.kind == "hf":
        edges = list(range(file.parts + 1))
    elif file.size <= 2 * size or not file.ranges:
        edges = []
    elif file.kind == ".jsonl":
        edges = [*range(0, file.size - size // 2, size), file.size]
    elif file.kind == ".parquet":
        edges = _row_groups(file, size)
    else:
        edges = []
    if len(edges) < 3:
        return [Span(number, size=file.size)]
    each = file.size // edges[-1]  # bytes of what the edges count
    return [Span(number, start, stop, (stop - start) * each) for start, stop in pairwise(edges)]


def _row_groups(file: InputFile, size: int) -> list[int]:
    """Where slices of a .parquet begin; none where it cannot be opened, which reading it will tell."""
    try:
        with open_input(file) as raw:
            groups = open_parquet(file, raw).num_row_groups
    except UserError:
        raise
    except Exception:
        return []
    step = max(1, groups * size // file.size)
    return [*range(0, groups, step), groups]


class SliceReader:
    """The documents of some spans, one after the other, empty ones left out, and a count of what was passed over.

    Raises UserError, one line, for what is missing, damaged or cut short, and unless `on_bad` is skip for a bad
    document and a file without text. A failing network is never skipped.
    """

    def __init__(
        self, files: Sequence[InputFile], spans: Sequence[Span], *, text_key: str, on_bad: OnBad = "stop"
    ) -> None:
        self._files, self._spans, self._text_key, self._on_bad = files, spans, text_key, on_bad
        self.skipped: Counter[str] = Counter()  # by reason
        self.examples: list[str] = []
        self.documents: Counter[int] = Counter()  # by number of the file, of those read in several slices
        self._done = 0
        self._open: tuple[IO[bytes], Span] | None = None

    @property
    def _num_bad(self) -> int:
        return sum(number for reason, number in self.skipped.items() if reason not in NOT_BAD)

    @property
    def bytes_read(self) -> int:
        """Of the spans' sizes."""
        if self._open is None or self._open[0].closed:
            return self._done
        stream, span = self._open
        return self._done + min(span.size, max(0, stream.tell() - span.start))

    def __iter__(self) -> Iterator[tuple[int, int, Document]]:
        """(number of the file, place in it, document)."""
        for span in self._spans:
            file, bad_before, found = self._files[span.file], self._num_bad, 0
            if not span.whole:
                self.documents[span.file] += 0
            for place, document in self._read(file, span):
                if document.text:
                    found += 1
                    yield span.file, place, document
                else:
                    self.skipped["empty"] += 1
            if not span.whole:
                self.documents[span.file] += found
            elif not found and file.kind != ".py" and self._num_bad == bad_before:
                self.bad(no_text(file))
            self._done += span.size

    def bad(self, error: BadDocument) -> None:
        """Raises `error`, or counts it."""
        if self._on_bad == "stop":
            raise error
        self.skipped[error.reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(error))

    def _passed(self, reason: str) -> None:
        assert reason in NOT_BAD
        self.skipped[reason] += 1

    def _read(self, file: InputFile, span: Span) -> Iterator[Placed]:
        try:
            if file.kind == "hf":
                yield from read_hub(file, span.start, span.stop, self._text_key, self.bad)
                return
            with open_input(file) as raw:
                if file.kind != ".parquet":  # which is not read from front to back
                    self._open = raw, span
                yield from self._read_open(file, raw, span)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:
            damage = _is_damage(error) or (file.url is None and isinstance(error, OSError) and error.errno is None)
            line = f"{file.where}: damaged, cut short or unreadable ({one_line(error)}): {AGAIN}"
            if damage:
                self.bad(BadDocument("damaged file", line))
            elif file.url is not None:
                raise Interrupted(
                    f"{file.where}: reading it failed ({one_line(error)}): run it again, it continues where it stopped"
                ) from None
            elif isinstance(error, OSError):
                raise UserError(line) from None
            else:
                raise  # a fault of this program
        finally:
            self._open = None

    def _read_open(self, file: InputFile, raw: IO[bytes], span: Span) -> Iterator[Placed]:
        key = self._text_key
        if file.kind in (".tar", ".parquet") and not file.ranges:
            raise UserError(
                f"{file.where}: its server gives no part of it alone, which a {file.kind} needs: fetch it and name the "
                "local file"
            )
        if file.kind == ".jsonl":
            yield from read_jsonl(file, raw, span.start, span.stop, key, self.bad)
        elif file.kind in (".jsonl.gz", ".jsonl.zst"):
            yield from read_packed_jsonl(file, raw, key, self.bad)
        elif file.kind == ".parquet":
            yield from read_parquet(file, raw, span.start, span.stop, key, self.bad)
        elif file.kind == ".tar":
            yield from read_tar(file, raw, key, self.bad, self._passed)
        elif file.kind == ".txt":
            yield from read_txt(file, raw, self.bad)
        else:
            assert file.kind == ".py"
            yield from read_python(file, raw, self.bad)


def no_text(file: InputFile) -> BadDocument:
    return BadDocument("file without text", f"{file.where}: holds no text: {AGAIN}")


def _is_damage(error: BaseException) -> bool:
    """Whether it is the content that is wrong, which reading again would not mend. pyarrow has plain OSErrors too."""
    kinds: tuple[type[BaseException], ...] = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, SyntaxError)
    return isinstance(error, kinds) or type(error).__module__.split(".")[0] == "pyarrow"
