"""The text a tokenizer is trained on, drawn from the whole corpus by its slices: the same on any number of workers.

The sample is the texts of smallest hash that together reach its size (tokenizer.draw_sample). A slice returns its own
smallest ones, none above what the slices before have shown to be out of reach, and the sample is made of those.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.holdout import split_document
from data_pipeline.passes import examine
from data_pipeline.slices import SliceReader, Span
from data_pipeline.tokenising import Setup
from data_pipeline.tokenizer import sample_hash
from data_pipeline.workers import Report

NO_BOUND = 1 << 64


@dataclass
class Sample:
    """Texts of smallest hash; `size`: bytes of UTF-8 it is to reach."""

    size: int
    bound: int = NO_BOUND  # texts of this hash and above are out
    _heap: list[tuple[int, str, int]] = field(default_factory=list)  # (-hash, text, bytes): the largest on top
    _total: int = 0

    def add(self, digest: int, text: str, num_bytes: int) -> None:
        if digest >= self.bound:
            return
        heapq.heappush(self._heap, (-digest, text, num_bytes))
        self._total += num_bytes
        while self._total - self._heap[0][2] >= self.size:
            top = heapq.heappop(self._heap)
            self._total -= top[2]
            self.bound = min(self.bound, -top[0])

    def items(self) -> list[tuple[int, str]]:
        return [(-negative, text) for negative, text, _ in sorted(self._heap, reverse=True)]


def sample_slice(
    setup: tuple[Setup, int, int], task: tuple[Sequence[Span], int], report: Report
) -> tuple[bool, list[tuple[int, str]]]:
    """(whether any text is to train on, [(hash, text)]) of one slice. setup: and the sample's bytes and seed; task:
    spans and bound. Only a text small enough in hash is shown to the passes, whose decisions come later: what they
    would take out as a copy may be in the sample, once.
    """
    of_slices, size, seed = setup
    spans, bound = task
    reader = SliceReader(of_slices.files, spans, text_key=of_slices.text_key, on_bad=of_slices.on_bad)
    sample, found, reported = Sample(size, bound), False, 0
    for _, _, document in reader:
        if (read := reader.bytes_read) - reported > 1 << 18:
            report(read - reported)
            reported = read
        for held_out, part in split_document(document, of_slices.fraction, lone=of_slices.lone):
            if held_out:
                continue
            found = True
            content = part.text.encode()
            digest = sample_hash(content, seed)
            if digest < sample.bound and examine(document, of_slices.passes).drop is None:
                sample.add(digest, part.text, len(content))
    report(reader.bytes_read - reported)
    return found, sample.items()
