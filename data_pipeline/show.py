"""`sisa data show`: a stretch of tokens as the text it is, with the ends of documents to be seen.

Every document is opened by a line that says which it is; on a terminal neighbours have different colours. What comes
out is what a model is fed: nothing is joined, trimmed or left out without a word. Characters that a terminal would obey
are written as pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from data_pipeline.lines import Run
from data_pipeline.order import Range, stored_order
from data_pipeline.places import Place
from data_pipeline.prepared import SPLITS, open_split, small_files
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.window import document_of
from sisa_dist.config import UserError

_COLOURS = ("green", "cyan", "yellow", "magenta")
_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
_PICTURES |= {code: "\ufffd" for code in range(0x80, 0xA0)}


class Piece(NamedTuple):
    """Consecutive tokens of one document, in one member. `label`: what is counted by whoever made it."""

    label: str
    ids: np.ndarray


def open_shown(
    folder: Place,
    split: str,
    *,
    document: int | None = None,
    member: int | None = None,
    window: int | None = None,
    seq_len: int | None = None,
    remote: RemoteSettings | None = None,
) -> tuple[Iterator[Piece], Tokenizer]:
    """One of document, member and window (of seq_len) of a split; of none of them document 0."""
    if split not in SPLITS:
        raise UserError(f"--split {split}: set it to {' or '.join(SPLITS)}")
    index = open_split(folder, split, remote=remote)
    if index is None:
        raise UserError(f"{folder}: has no split {split}: name a folder that `sisa prepare` or `sisa data` made")
    with small_files(folder, remote=remote) as local:
        tokenizer = Tokenizer.load(local)
    if tokenizer.sha256 != index.tokenizer_sha256:
        raise UserError(f"{folder}: its shards have another {tokenizer.path.name}: `sisa data verify` says more")
    if member is not None:
        return member_pieces(index, member), tokenizer
    if window is not None:
        if seq_len is None:
            raise UserError("--window counts windows of --seq-len tokens: set --seq-len")
        return window_pieces(index, window, seq_len), tokenizer
    return document_pieces(index, document or 0), tokenizer


def document_pieces(index: Index, number: int) -> Iterator[Piece]:
    """Document `number` of the split, in stored order, member by member. Raises UserError where there is none."""
    if not 0 <= number < index.documents:
        raise UserError(f"--document {number}: {index.folder} has documents 0 to {index.documents - 1}")
    ends = index.members["segments_end"].astype(np.int64)
    begun = ends - np.cumsum(index.members["continued"])  # documents begun up to and with each member
    member = int(np.searchsorted(begun, number, side="right"))
    skip = number - (int(begun[member - 1]) if member else 0) + int(index.members["continued"][member])
    lengths = index.segments(member)
    start = int(lengths[:skip].sum())
    stop = start + int(lengths[skip])
    while True:
        yield Piece(
            f"document {number}, member {member}, tokens {start} to {stop - 1}", _ids(index, member, start, stop)
        )
        after = member + 1
        if stop < index.tokens[member] or after == len(index.members) or not index.members["continued"][after]:
            return
        member, start = after, 0
        stop = int(index.segments(member)[0])


def member_pieces(index: Index, number: int) -> Iterator[Piece]:
    """Raises UserError where there is no such member."""
    if not 0 <= number < len(index.members):
        raise UserError(f"--member {number}: {index.folder} has members 0 to {len(index.members) - 1}")
    yield from range_pieces(index, [Range(number, 0, int(index.tokens[number]))])


def window_pieces(index: Index, number: int, seq_len: int) -> Iterator[Piece]:
    """Tokens number · seq_len on, seq_len + 1 of them, of the split as it is stored. UserError where there are none."""
    total, start = index.num_tokens, number * seq_len
    if not 0 <= start < total:
        raise UserError(
            f"--window {number}: {index.folder} has windows 0 to {(total - 1) // seq_len} of {seq_len} tokens"
        )
    yield from range_pieces(index, stored_order(index.tokens).locate(start, start + seq_len + 1))


def run_pieces(index: Index, runs: Sequence[Run]) -> Iterator[Piece]:
    """What a window of the loader is filled with: its runs one after another, each with its last label."""
    for run in runs:
        yield from range_pieces(index, run.ranges)


def range_pieces(index: Index, ranges: Sequence[Range]) -> Iterator[Piece]:
    """Cut where a document or a member ends."""
    numbers = document_of(index, ranges)
    at = 0
    for member, start, stop in ranges:
        documents = numbers[at : at + stop - start]
        cuts = np.flatnonzero(np.diff(documents)) + 1
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), stop - start], strict=True):
            again = at + a > 0 and numbers[at + a] == numbers[at + a - 1]
            label = f"document {_document(index, member, start + a)}{' goes on' if again else ''}"
            yield Piece(
                f"{label}, member {member}, tokens {start + a} to {start + b - 1}",
                _ids(index, member, start + a, start + b),
            )
        at += stop - start


def write_pieces(
    pieces: Iterator[Piece], tokenizer: Tokenizer, console: Console, *, ids: bool = False, most: int | None = None
) -> None:
    """`most`: tokens printed; how many were left out is said. `ids`: the numbers and pieces, in place of the text."""
    left, colour, before = most, -1, ""
    hidden = 0
    for piece in pieces:
        document = piece.label.split(",")[0].removesuffix(" goes on")
        colour, before = colour + (document != before), document
        style = _COLOURS[colour % len(_COLOURS)]
        shown = piece.ids if left is None else piece.ids[:left]
        hidden += len(piece.ids) - len(shown)
        left = None if left is None else left - len(shown)
        if not len(shown):
            continue
        console.print(Text(f"── {piece.label}", style=f"bold {style}"), soft_wrap=True)
        if ids:
            text = " ".join(f"{i}:{tokenizer.piece(int(i))!r}" for i in shown)
        else:
            text = tokenizer.decode(shown)
        console.print(Text(text.translate(_PICTURES), style=style), soft_wrap=True)
        if shown[-1] == tokenizer.eos_id:
            console.print(Text(f"── {tokenizer.piece(tokenizer.eos_id)}", style=f"bold {style}"), soft_wrap=True)
    if hidden:
        console.print(f"… {hidden:,} more tokens: --tokens shows more", soft_wrap=True, markup=False)


def _document(index: Index, member: int, place: int) -> int:
    """The document that token `place` of the member is of, counted over the split."""
    rows = int(index.members["segments_end"][member - 1]) if member else 0
    begun = rows - int(index.members["continued"][:member].sum())
    inside = int(np.searchsorted(np.cumsum(index.segments(member)), place, side="right"))
    return begun + inside - int(index.members["continued"][member])


def _ids(index: Index, member: int, start: int, stop: int) -> np.ndarray:
    return index.read_member(member)[start:stop]
