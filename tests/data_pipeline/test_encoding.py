"""Long documents are encoded in pieces: the ids of the whole, or the whole where no place to cut is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import encoding
from data_pipeline.encoding import encode_documents
from data_pipeline.sources import Corpus
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from samples import make_text

DTYPE = np.dtype("<u2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer((make_text(i) for i in range(60)), path, vocab_size=420)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1000)


def encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    numbered: Iterator[tuple[int, str]] = iter(enumerate(texts))
    found = list(encode_documents(numbered, tokenizer, DTYPE, num_threads=1))
    assert [tag for tag, _ in found] == list(range(len(texts)))
    assert all(ids.dtype == DTYPE for _, ids in found)
    return [ids.tolist() for _, ids in found]


def test_pieces_give_the_ids_of_the_whole(tokenizer: Tokenizer, small: None) -> None:
    texts = [make_text(i, 10 * i) for i in range(60)] + ["", "\n" * 2000, " " * 2000, "\t\n  " * 700, "a \n b" * 900]
    texts += [document.text[:20_000] for document in list(Corpus("python-stdlib"))[::40]]
    assert max(map(len, texts)) > 10_000
    assert encoded(texts, tokenizer) == [tokenizer.encode(text) for text in texts]


def test_pieces_are_really_cut(tokenizer: Tokenizer, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    longest, true = [0], type(tokenizer).encode_batch

    def watch(self: Tokenizer, texts: Sequence[str], *, num_threads: int = -1) -> list[list[int]]:
        longest[0] = max(longest[0], *map(len, texts))
        return true(self, texts, num_threads=num_threads)

    monkeypatch.setattr(type(tokenizer), "encode_batch", watch)
    text = "".join(make_text(i) for i in range(30))
    assert encoded([text], tokenizer) == [true(tokenizer, [text])[0]]
    assert longest[0] <= 2 * encoding._CONTEXT < len(text) / 20


def test_a_text_without_a_place_is_encoded_whole(tokenizer: Tokenizer, small: None) -> None:
    text = "東京" * 2000
    assert encoded([text, "b"], tokenizer) == [tokenizer.encode(text), tokenizer.encode("b")]


def test_a_cut_that_changes_ids_is_not_made(tmp_path: Path, small: None) -> None:
    """A model that begins every text with a space of its own, as Llama's does, would put one at each cut."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([make_text(i) for i in range(60)]), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    foreign = Tokenizer.load(tmp_path / "tokenizer.model")
    text = make_text(5, 2000)
    assert encoded([text], foreign) == [foreign.encode(text)]
    at = text.index("\n", 400) + 1
    assert foreign.encode(text[:at]) + foreign.encode(text[at:]) != foreign.encode(text)
