"""Text survives the tokenizer exactly, training is repeatable, and what cannot work says what would."""

from __future__ import annotations

import functools
import random
import re
import tempfile
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import Tokenizer, draw_sample, token_dtype, train_tokenizer
from samples import make_text
from sisa_dist.config import UserError

TEXTS = [make_text(i) for i in range(60)]
HARD = [
    "",
    " ",
    "\t",
    "\n",
    "  a  ",
    "def f(x):\n\tif x:\n\t\treturn  1\n\n\n\n\n        # é\n",
    "a\r\nb\rc\u2028d\x0b\x0c",
    "\x00a\x00\x01\x7f",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 é \u200b\ufeff",
    "</s><s><unk><0x41>",
    "\u2581",
    "a\u2581b c\u2581\u2581 \u2581",
    "\u2585 \u3000\u00a0x",
    "1234567890.00",
    "x" * 20_000,
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(TEXTS, path, vocab_size=320, model_type=request.param)  # as much as unigram finds here


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts_come_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_id, tokenizer.bos_id, 0} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(text: str) -> None:
    tokenizer = any_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@functools.cache
def any_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(TEXTS, Path(folder) / "t.model", vocab_size=420)


def test_batch_equals_one_by_one_and_documents_do_not_leak(tokenizer: Tokenizer) -> None:
    texts = HARD + TEXTS
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_code_is_not_spelt_space_by_space(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n        ")) == 2
    assert len(tokenizer.encode("\n\n\n")) == 1 and len(tokenizer.encode("\t\t")) == 1


def test_training_is_repeatable_and_needs_no_order(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    one = train_tokenizer(TEXTS, tmp_path / "a.model", vocab_size=400, sample_bytes=20_000, seed=3)
    two = train_tokenizer(shuffled, tmp_path / "b.model", vocab_size=400, sample_bytes=20_000, seed=3)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert one.sha256 == two.sha256 and one.vocab_size == 400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_sample_is_bounded_and_varies_with_the_seed() -> None:
    size = len(TEXTS[0].encode())
    drawn = draw_sample(TEXTS, 5 * size, seed=0)
    assert 5 * size <= sum(len(text.encode()) for text in drawn) < 8 * size
    assert drawn != draw_sample(TEXTS, 5 * size, seed=1)
    assert sorted(draw_sample(TEXTS, 10**9, seed=0)) == sorted(TEXTS)


def test_long_lines_reach_the_trainer(tmp_path: Path) -> None:
    """SentencePiece drops lines above its limit: a corpus of one long line would train on nothing."""
    line = " ".join(make_text(i).replace("\n", " ") for i in range(200))
    assert len(line) > 100_000
    tokenizer = train_tokenizer([line], tmp_path / "t.model", vocab_size=400)
    assert len(tokenizer.encode(" return import")) == 2


def test_too_little_text_names_the_vocabulary_that_works(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is too large for") as caught:
        train_tokenizer(TEXTS[:2], tmp_path / "t.model", vocab_size=5000)
    most = re.search(r"at most (\d+)", str(caught.value))
    assert most and train_tokenizer(TEXTS[:2], tmp_path / "t.model", vocab_size=int(most[1])).vocab_size == int(most[1])
    with pytest.raises(UserError, match="at least") as caught:
        train_tokenizer(TEXTS, tmp_path / "u.model", vocab_size=100)
    least = re.search(r"at least (\d+)", str(caught.value))
    assert least and train_tokenizer(TEXTS, tmp_path / "u.model", vocab_size=int(least[1])).vocab_size == int(least[1])
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([" \n"], tmp_path / "t.model", vocab_size=400)


def test_foreign_models_are_checked(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))

    def foreign(name: str, **options: object) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "lines.txt"),
            model_prefix=str(tmp_path / name),
            vocab_size=90,
            minloglevel=2,
            **options,
        )
        return tmp_path / f"{name}.model"

    usual = Tokenizer.load(foreign("usual", hard_vocab_limit=False), max_vocab_size=4096)
    assert usual.decode(usual.encode("return value")) == "return value"
    with pytest.raises(UserError, match=f"set model.vocab_size to {usual.vocab_size}"):
        Tokenizer.load(usual.path, max_vocab_size=usual.vocab_size - 1)
    with pytest.raises(UserError, match="no eos"):
        Tokenizer.load(foreign("bare", eos_id=-1, hard_vocab_limit=False))
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "lines.txt")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path / "nowhere.model")
    with pytest.raises(ValueError, match="outside"):
        usual.decode([usual.vocab_size])


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(65_536).str == "<u2" and token_dtype(65_537).str == "<u4"
