"""What is shown is every token of what was asked for, cut where documents end, and obeyed by no terminal."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.index import Index
from data_pipeline.show import (
    Piece,
    document_pieces,
    member_pieces,
    open_shown,
    run_pieces,
    window_pieces,
    write_pieces,
)
from data_pipeline.source import Place, Source
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.window import read_window
from range_server import serve
from samples import EOS, documents_of, random_documents, write_split
from sisa_dist.config import UserError

DOCUMENTS = [*random_documents(0, 25), [], [5] * 31, [6]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_split(tmp_path_factory.mktemp("show") / "train", DOCUMENTS)


def joined(pieces: list[Piece]) -> list[int]:
    return np.concatenate([piece.ids for piece in pieces]).tolist()


def test_every_document_whole_and_alone(index: Index) -> None:
    for number, document in enumerate(DOCUMENTS):
        pieces = list(document_pieces(index, number))
        assert joined(pieces) == [*document, EOS]
        assert all(piece.label.startswith(f"document {number}, member ") for piece in pieces)
    with pytest.raises(UserError, match=r"--document 28: .* documents 0 to 27"):
        list(document_pieces(index, 28))


def test_members_and_windows_are_cut_where_documents_end(index: Index) -> None:
    flat = [i for document in DOCUMENTS for i in [*document, EOS]]
    numbers = [n for n, document in enumerate(DOCUMENTS) for _ in range(len(document) + 1)]
    for number in range(len(index.members)):
        pieces = list(member_pieces(index, number))
        assert joined(pieces) == index.read_member(number).tolist()
        at = int(index.tokens[:number].sum())
        for piece in pieces:
            assert set(numbers[at : at + len(piece.ids)]) == {int(piece.label.split()[1].rstrip(","))}
            at += len(piece.ids)
    for number in range(-(-len(flat) // 7)):
        assert joined(list(window_pieces(index, number, 7))) == flat[number * 7 : number * 7 + 8]
    for call, words in (
        (lambda: member_pieces(index, 10**6), "--member"),
        (lambda: window_pieces(index, 999, 7), "--win"),
    ):
        with pytest.raises(UserError, match=words):
            list(call())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_a_window_of_training_holds(index: Index, packing: str) -> None:
    source = Source("train", index, seed=3, seq_len=16, lanes=3, packing=packing)  # type: ignore[arg-type]
    served = source.places(np.arange(source.windows))
    for epoch, window in zip(served.epochs.tolist(), served.windows.tolist(), strict=True):
        runs = source.runs(Place("train", epoch, window))
        row = read_window(index, runs, 16, document_mask=False)
        shown = joined(list(run_pieces(index, runs)))
        # Each run's ids, with the label behind its last input: between runs that one is shown and not fed.
        fed = [i for run in runs for i in joined(list(run_pieces(index, [run])))[: run.inputs]]
        assert row.tokens[0].tolist()[: len(fed)] == fed and len(shown) - len(fed) <= len(runs)


def written(pieces: list[Piece], tokenizer: Tokenizer, *, terminal: bool = False, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, color_system="standard" if terminal else None, width=40)
    write_pieces(iter(pieces), tokenizer, console, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_text_comes_out_as_it_went_in(two_folders: tuple[Path, Path]) -> None:
    texts = documents_of(two_folders[0], "train")
    for number in (0, 7, len(texts) - 1):
        pieces, tokenizer = open_shown(two_folders[0], "train", document=number)
        found = list(pieces)
        plain = written(found, tokenizer)
        lines = plain.split("\n")
        body = "\n".join(line for line in lines if not line.startswith("── "))
        # A member can end inside a character, which then comes out as two marks: nothing else differs.
        assert "".join(body.split()).replace("\ufffd", "")[:50] == "".join(texts[number].split())[:50]
        assert "── </s>" in lines and "\x1b" not in plain
        assert tokenizer.decode(joined(found)[:-1]) == texts[number]


def test_colours_change_with_the_document_on_a_terminal_alone(two_folders: tuple[Path, Path]) -> None:
    train = Index.load(two_folders[0] / "train")
    tokenizer = Tokenizer.load(two_folders[0])
    member = next(m for m in range(len(train.members)) if len(train.segments(m)) >= 2)
    pieces = list(member_pieces(train, member))
    coloured = written(pieces, tokenizer, terminal=True)
    assert "\x1b[1;32m── document" in coloured and "\x1b[1;36m── document" in coloured
    assert "\x1b" not in written(pieces, tokenizer)


def test_no_text_commands_a_terminal(two_folders: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.load(two_folders[0])
    text = "a\x1b[2Jb\x07c\rd\x9be [bold]f[/] \t.\n"
    piece = Piece("document 0", np.array(tokenizer.encode(text)))
    plain = written([piece], tokenizer)
    assert not set(plain) & {"\x1b", "\x07", "\r", "\x9b"}
    assert "a␛[2Jb␇c␍d�e [bold]f[/]" in plain


def test_what_is_left_out_is_said_and_ids_can_be_had(two_folders: tuple[Path, Path]) -> None:
    pieces, tokenizer = open_shown(two_folders[0], "train", document=1)
    found = list(pieces)
    total = len(joined(found))
    assert f"… {total - 9:,} more tokens: --tokens shows more" in written(found, tokenizer, most=9)
    first = int(found[0].ids[0])
    assert f"{first}:{tokenizer.piece(first)!r} " in written(found, tokenizer, ids=True)


def test_what_is_not_there_is_one_line(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    for place, split, options, words in (
        (two_folders[0], "test", {}, "--split test: set it to train or validation"),
        (tmp_path, "train", {}, "has no split train"),
        (two_folders[0], "train", {"window": 3}, "set --seq-len"),
    ):
        with pytest.raises(UserError, match=words):
            open_shown(place, split, **options)  # type: ignore[arg-type]


def test_over_http(two_folders: tuple[Path, Path]) -> None:
    with serve(two_folders[0]) as served:
        there, _ = open_shown(served.url, "train", document=3)
        here, _ = open_shown(two_folders[0], "train", document=3)
        assert joined(list(there)) == joined(list(here))
