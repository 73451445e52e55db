"""From data.passes to passes, and documents through them on any number of processes: the same ones stay.

`sisa prepare` has workers of its own and calls `examine` and `Decider` itself; this is the same by itself.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data_pipeline.passes.base import Counts, Decider, Pass, Verdict, examine
from data_pipeline.passes.contamination import Decontaminate
from data_pipeline.passes.exact import ExactDedup
from data_pipeline.passes.language import Language
from data_pipeline.passes.length import Length
from data_pipeline.passes.near import NearDedup
from data_pipeline.passes.quality import Quality
from data_pipeline.passes.repetition import Repetition
from data_pipeline.sources import Document
from sisa_dist.config import RunConfig, UserError
from sisa_dist.config.passes import PassesConfig

_BATCH_CHARACTERS = 1_000_000  # sent to a worker at once; a longer document goes alone
_BATCHES_A_WORKER = 3  # one computed, one waiting, one coming back


def evaluation_files(config: RunConfig) -> list[str]:
    """The files that data.passes.decontaminate compares with; none where it is not given."""
    settings = config.data.passes.decontaminate
    if settings is None:
        return []
    against = settings.against if settings.against is not None else config.evaluation.lambada
    if not against:
        raise UserError("data.passes.decontaminate: against what? set its against, or evaluation.lambada")
    return [against] if isinstance(against, str) else against


def build_passes(config: PassesConfig, *, evaluation_files: Sequence[str] = ()) -> list[Pass]:
    """The passes that `config` asks for, in the order they run: cheap ones first, comparisons of documents last.

    Reads the evaluation files. Raises UserError for what does not exist or is not installed.
    """
    made: list[Pass] = []
    if config.length is not None:
        made.append(Length(config.length))
    if config.language is not None:
        made.append(Language.of(config.language))
    if config.quality is not None:
        made.append(Quality(config.quality))
    if config.repetition is not None:
        made.append(Repetition(config.repetition))
    if config.decontaminate is not None:
        made.append(Decontaminate.of(config.decontaminate, evaluation_files))
    if config.exact_dedup is not None:
        made.append(ExactDedup(config.exact_dedup))
    if config.near_dedup is not None:
        made.append(NearDedup.of(config.near_dedup))
    return made


def run_passes(
    documents: Iterable[Document],
    passes: Sequence[Pass],
    *,
    workers: int = 0,
    scratch: Path | None = None,
    counts: Counts | None = None,
) -> Iterator[Document]:
    """The documents that every pass keeps, in order; `counts`, where given, is filled as they go.

    workers: processes for the pure parts, 0 for none. At most 3 batches of a million characters (or one longer
    document) a worker are held. What the decisions hold: exact.py, near.py; their files lie in `scratch`.
    """
    with Decider(passes, scratch=scratch) as decider:
        if counts is not None:
            counts.removed, decider.counts = decider.counts.removed, counts
        for document, verdict in _examined(documents, passes, workers):
            if decider.keep(verdict):
                yield document


def _examined(
    documents: Iterable[Document], passes: Sequence[Pass], workers: int
) -> Iterator[tuple[Document, Verdict]]:
    if workers == 0:
        for document in documents:
            yield document, examine(document, passes)
        return
    waiting: deque[tuple[list[Document], Future[list[Verdict]]]] = deque()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(list(passes),)) as pool:
        try:
            for batch in _batches(documents):
                waiting.append((batch, pool.submit(_examine_batch, batch)))
                if len(waiting) == _BATCHES_A_WORKER * workers:
                    yield from _next(waiting)
            while waiting:
                yield from _next(waiting)
        except BrokenProcessPool:
            raise UserError("a worker of data.passes died (out of memory?): give fewer workers, or 0") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[list[Document], Future[list[Verdict]]]]) -> Iterator[tuple[Document, Verdict]]:
    batch, future = waiting.popleft()
    yield from zip(batch, future.result(), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_passes: list[Pass] = []  # of a worker process, set once when it starts


def _start(passes: list[Pass]) -> None:
    _passes[:] = passes


def _examine_batch(batch: list[Document]) -> list[Verdict]:
    return [examine(document, _passes) for document in batch]
