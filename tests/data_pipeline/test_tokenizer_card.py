"""The card says what was measured on held-out text, and reads back; a damaged one is a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.holdout import split_value
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.tokenizer_card import Fertility, describe_card, read_card, write_card
from samples import make_text
from sisa_dist.config import RunConfig, UserError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer([make_text(i) for i in range(60)], tmp_path / "tokenizer.model", vocab_size=420)


def add(fertility: Fertility, tokenizer: Tokenizer, domain: str, text: str) -> None:
    fertility.add(domain, tokenizer.encode(text), num_bytes=len(text.encode()), words=len(text.split()))


def test_fertility_by_hand(tokenizer: Tokenizer) -> None:
    fertility = Fertility(tokenizer)
    add(fertility, tokenizer, "code", "return value")
    add(fertility, tokenizer, "code", " zqé")
    add(fertility, tokenizer, "empty", "")
    found = fertility.as_dict()
    pieces = [tokenizer.piece(i) for text in ("return value", " zqé") for i in tokenizer.encode(text)]
    by_bytes = sum(piece.startswith("<0x") for piece in pieces)
    assert by_bytes >= 2
    assert found["code"] == {
        "documents": 2,
        "bytes": 17,
        "tokens": len(pieces),
        "bytes_per_token": 17 / len(pieces),
        "tokens_per_word": len(pieces) / 3,
        "fallback_share": by_bytes / len(pieces),
    }
    assert found["empty"]["bytes_per_token"] == 0.0


def test_sums_of_parts_are_the_whole(tokenizer: Tokenizer) -> None:
    whole, merged = Fertility(tokenizer), Fertility(tokenizer)
    for part in range(3):
        one = Fertility(tokenizer)
        for i in range(4):
            for each in (whole, one):
                add(each, tokenizer, "ab"[i % 2], make_text(4 * part + i))
        merged.merge(json.loads(json.dumps(one.sums())))
    assert merged.sums() == whole.sums() and merged.as_dict() == whole.as_dict() and len(whole.sums()) == 2


def test_the_card_is_written_by_prepare_and_told(
    corpus_folder: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    entries = [f"{corpus_folder}/0*.txt", f"{corpus_folder}/1*.txt"]
    folder = prepare(make_config(entries), quiet=True)
    card, tokenizer = read_card(folder), Tokenizer.load(folder)
    assert card is not None and card["sha256"] == tokenizer.sha256 and list(card["held_out"]) == entries
    for entry, found in card["held_out"].items():
        texts = [path.read_text() for path in sorted(corpus_folder.glob(Path(entry).name))]
        held_out = [text for text in texts if split_value(text) < 0.1]
        assert held_out and found["documents"] == len(held_out)
        assert found["bytes"] == sum(len(text.encode()) for text in held_out)
        assert found["tokens"] == sum(map(len, tokenizer.encode_batch(held_out)))
    told = describe_card(card)
    assert "420 ids" in told and "model_type bpe" in told and f"{found['bytes_per_token']:.2f}" in told
    none = prepare(make_config(str(corpus_folder), folder="none", validation_fraction=0.0), quiet=True)
    bare = read_card(none)
    assert bare is not None and "none to measure it on" in describe_card(bare)
    assert read_card(tmp_path) is None


def test_a_damaged_card_is_a_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_card(tmp_path, tokenizer, Fertility(tokenizer), settings={})
    path = tmp_path / "tokenizer_card.json"
    card = json.loads(path.read_text())
    for content in ("{", "[]", "{}", json.dumps({**card, "held_out": {"a": 3}}), json.dumps({**card, "settings": 3})):
        path.write_text(content)
        with pytest.raises(UserError, match="damaged"):
            read_card(tmp_path)
    path.write_text(json.dumps({**card, "version": 9}))
    with pytest.raises(UserError, match="version 9"):
        read_card(tmp_path)
