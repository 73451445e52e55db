"""Where text comes from, as one deterministic list of documents: the names the house uses, and a plain loop.

inputs.py lists the files, slices.py and readers.py read them; `sisa prepare` reads slices in workers and does not use
the loop here. Nothing is filtered, deduplicated, tokenised or split.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.inputs import KINDS, STDLIB, InputFile, list_files
from data_pipeline.readers import Document
from data_pipeline.slices import SliceReader, Span

__all__ = ["KINDS", "STDLIB", "Corpus", "Document", "InputFile", "iter_documents", "list_files"]


class Corpus:
    """The documents of `inputs`, in the same order every time, with the bytes read so far for a progress bar.

    inputs: one or more of a file, a folder (searched whole, dot files skipped), a glob, a URL (http, s3 and whatever
    fsspec knows), a data set of the Hugging Face hub (hub.py) or "python-stdlib". A file reached twice is read once. A
    .txt file is one document; of a .jsonl (.gz, .zst) and a .parquet the value at `text_key` of every row (and `id`,
    where there is one); of a WebDataset .tar every sample's .txt, or else its .json's `text_key`.
    Empty texts inside a file are skipped, a file without any text is a UserError, and so is one that is missing,
    damaged, cut short, not UTF-8 or without the key: the message names file and line.
    """

    def __init__(self, inputs: str | list[str], text_key: str = "text") -> None:
        self.files = list_files(inputs)
        self.total_bytes = sum(file.size for file in self.files)
        self._text_key = text_key
        self._reader: SliceReader | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files on disk consumed by the iteration now under way (of `total_bytes`)."""
        return self._reader.bytes_read if self._reader is not None else 0

    def __iter__(self) -> Iterator[Document]:
        spans = [Span(number, size=file.size) for number, file in enumerate(self.files)]
        self._reader = SliceReader(self.files, spans, text_key=self._text_key)
        for _, _, document in self._reader:
            yield document


def iter_documents(inputs: str | list[str], text_key: str = "text") -> Iterator[Document]:
    """The documents of `inputs`; see Corpus."""
    return iter(Corpus(inputs, text_key))
