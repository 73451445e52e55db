"""The first half of `sisa prepare`: slices of the corpus to runs of token ids, each slice a job for any process.

A slice's documents are read, examined by the passes, put on the side of the split that their text says, and encoded.
What a slice left behind is known by SLICE.json, which appears last; a slice that has one is never done again.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.encoding import encode_documents
from data_pipeline.holdout import split_document, split_value
from data_pipeline.inputs import InputFile
from data_pipeline.passes import Drop, Pass, Verdict, examine
from data_pipeline.runs import Run, RunWriter, shuffle_key
from data_pipeline.slices import NOT_BAD, OnBad, SliceReader, Span
from data_pipeline.tokenizer import Tokenizer, token_dtype
from data_pipeline.tokenizer_card import Fertility
from data_pipeline.workers import Report

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Setup:
    """What every slice's job needs to know; sent to each worker once."""

    files: Sequence[InputFile]
    text_key: str
    on_bad: OnBad
    fraction: float
    lone: bool  # the corpus is a single document, of which the end is held out
    shuffle_seed: int
    passes: Sequence[Pass]
    folder: Path  # where slices' files go
    tokenizer: str
    num_threads: int  # of the tokenizer; -1: all
    buffer_bytes: int  # of ids held before a run is written


@dataclass(frozen=True)
class SliceNotes:
    """What SLICE.json says. runs: documents of each run, by split; files: documents of a file in several slices."""

    documents: int
    runs: dict[str, list[int]]
    skipped: dict[str, int]
    examples: list[str]
    files: dict[str, int]
    lowest: float  # of the split values
    fertility: dict[str, list[int]]  # of the held-out texts, by entry of data.input; before the passes' decisions
    sizes: dict[str, int]  # bytes of the other files of this slice

    @classmethod
    def load(cls, folder: Path, number: int) -> SliceNotes | None:
        """None where the slice is not done, or what it left is not there any more."""
        try:
            notes = cls(**json.loads((folder / f"{number:06d}.json").read_text(encoding="utf-8")))
            whole = all((folder / name).stat().st_size == size for name, size in notes.sizes.items())
        except (OSError, ValueError, TypeError):
            return None
        return notes if whole else None

    @property
    def bad(self) -> bool:
        return any(number for reason, number in self.skipped.items() if reason not in NOT_BAD)

    def run(self, folder: Path, number: int, split: str) -> Run:
        return Run(folder / f"{number:06d}.{split}", self.runs[split])


def tokenise_slice(setup: Setup, task: tuple[int, Sequence[Span]], report: Report) -> SliceNotes:
    """Reads and encodes slice `task` = (number, spans); see the module. Bytes of the input are reported."""
    number, spans = task
    reader = SliceReader(setup.files, spans, text_key=setup.text_key, on_bad=setup.on_bad)
    tokenizer = _load(setup.tokenizer)
    dtype, fertility = token_dtype(tokenizer.vocab_size), Fertility(tokenizer)
    writers = {
        split: RunWriter(setup.folder, f"{number:06d}.{split}", dtype, buffer_bytes=setup.buffer_bytes)
        for split in SPLITS[: 2 if setup.fraction else 1]
    }
    verdicts = _VerdictWriter(setup.folder / f"{number:06d}.verdicts") if setup.passes else None
    documents = reported = 0
    lowest = 1.0

    def texts() -> Iterator[tuple[tuple[str, int, int, int, str, int], str]]:
        nonlocal documents, reported, lowest
        for file, place, document in reader:
            index, documents = documents, documents + 1
            if (read := reader.bytes_read) - reported > 1 << 18:
                report(read - reported)
                reported = read
            if verdicts is not None:
                verdict = examine(document, setup.passes)
                verdicts.add(verdict)
                if verdict.drop is not None:
                    continue
            lowest = min(lowest, split_value(document.text))
            key = shuffle_key(setup.shuffle_seed, file, place)
            for held_out, part in split_document(document, setup.fraction, lone=setup.lone):
                words = len(part.text.split()) if held_out else 0
                entry = setup.files[file].entry
                yield (SPLITS[held_out], key, index, len(part.text.encode()), entry, words), part.text

    for (split, key, index, text_bytes, entry, words), ids in encode_documents(
        texts(), tokenizer, dtype, num_threads=setup.num_threads
    ):
        writers[split].add(key=key, number=index, text_bytes=text_bytes, ids=ids)
        if split == "validation":
            fertility.add(entry, ids, num_bytes=text_bytes, words=words)
    report(reader.bytes_read - reported)
    sizes: dict[str, int] = {}
    for writer in writers.values():
        sizes |= writer.close()
    if verdicts is not None:
        sizes |= verdicts.close()
    notes = SliceNotes(
        documents=documents,
        runs={split: writer.runs for split, writer in writers.items()},
        skipped=dict(sorted(reader.skipped.items())),
        examples=reader.examples,
        files={str(file): found for file, found in sorted(reader.documents.items())},
        lowest=lowest,
        fertility=fertility.sums(),
        sizes=sizes,
    )
    write_json(setup.folder / f"{number:06d}.json", vars(notes))
    return notes


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


@lru_cache(1)
def _load(path: str) -> Tokenizer:
    return Tokenizer.load(path)


class _VerdictWriter:
    """A row a document: characters, the signatures, and why it went (empty where it did not)."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial-{os.getpid()}")
        self._file = open(self._partial, "wb")  # noqa: SIM115, closed by close

    def add(self, verdict: Verdict) -> None:
        reason = verdict.drop.reason.encode() if verdict.drop is not None else b""
        parts = [*verdict.signatures, reason]
        head = struct.pack("<QI", verdict.characters, len(parts))
        self._file.write(head + b"".join(struct.pack("<I", len(part)) + part for part in parts))

    def close(self) -> dict[str, int]:
        self._file.close()
        os.replace(self._partial, self._path)
        return {self._path.name: self._path.stat().st_size}


def read_verdicts(folder: Path, number: int) -> Iterator[Verdict]:
    """Of every document of slice `number`, in the order it was read."""
    with open(folder / f"{number:06d}.verdicts", "rb") as file:
        while head := file.read(12):
            characters, count = struct.unpack("<QI", head)
            *signatures, reason = (file.read(struct.unpack("<I", file.read(4))[0]) for _ in range(count))
            yield Verdict(characters, tuple(signatures), Drop(reason.decode()) if reason else None)


def write_dropped(folder: Path, number: int, dropped: Sequence[bool]) -> Path:
    """A byte a document of slice `number`, 1 where it is taken out; what runs.py reads."""
    path = dropped_path(folder, number)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_bytes(np.array(dropped, np.uint8).tobytes())
    os.replace(partial, path)
    return path


def dropped_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.dropped"
