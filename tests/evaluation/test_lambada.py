"""LAMBADA: which tokens are the last word, what counts as a hit, and one line for what is wrong with a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from evaluation_fakes import FakeScorer, WordTokenizer, hashed, on_ranks

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.lambada import lambada, make_example, read_passages

STANDARD = Path(__file__).parents[3] / "shared/data/lambada/lambada_test.jsonl"


def write(path: Path, passages: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages), encoding="utf-8")
    return path


class Letters:
    """One id a character, so that a word is several tokens."""

    eos_id, vocab_size = 0, 256

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_by_hand(tmp_path: Path) -> None:
    """A model that writes "…abcdef" alphabetically: right where the last word goes on so from the space."""

    def alphabet(prefix: list[int]) -> tuple[int, dict[int, float]]:
        best = {ord("."): ord(" "), ord(" "): ord("a")}.get(prefix[-1], prefix[-1] + 1)
        return best, {best: math.log(0.5)}

    path = write(tmp_path / "x.jsonl", ["Say it. abc", "Say it. abd", "Say it. a", "Say it a"])
    result = lambada(FakeScorer(alphabet), Letters(), path, seq_len=64, batch_size=3, quiet=True)  # type: ignore[arg-type]
    # "abd" misses its last letter; in "it a" the space is not predicted, and it belongs to the target.
    assert (result["accuracy"], result["passages"], result["cut"]) == (0.5, 4, 0)
    assert result["target_tokens"] == 4 + 4 + 2 + 2
    half = math.log(2)
    surprise = [4 * half, 3 * half + 8, 2 * half, half + 8]
    assert result["target_perplexity"] == pytest.approx(math.exp(sum(surprise) / 4))


def test_the_target_is_the_last_word_with_its_space(pieces: Tokenizer) -> None:
    example, cut = make_example(pieces, 'The wind went. "What is the hill,"', seq_len=64, where="here")
    ids = pieces.encode('The wind went. "What is the hill,"')
    target = [label for label in example.labels if label != -100]
    assert not cut and example.tokens == ids[:-1]
    assert example.labels == [-100] * (len(ids) - 1 - len(target)) + ids[-len(target) :]
    assert pieces.decode(target).strip() == 'hill,"'
    assert pieces.decode(ids[: -len(target)]) == 'The wind went. "What is the'


def test_the_last_word_follows_the_last_space_as_in_the_paper(words: WordTokenizer) -> None:
    example, _ = make_example(words, "some kind of\n\nPower", seq_len=64, where="here")  # type: ignore[arg-type]
    assert words.decode([label for label in example.labels if label != -100]) == " of\n\nPower"


def test_a_long_passage_loses_its_beginning(words: WordTokenizer) -> None:
    passage = " ".join("abcdefghij")
    whole, cut = make_example(words, passage, seq_len=9, where="here")  # type: ignore[arg-type]
    assert (len(whole.tokens), cut) == (9, False)
    short, cut = make_example(words, passage, seq_len=4, where="here")  # type: ignore[arg-type]
    assert cut and (short.tokens, short.labels) == (whole.tokens[-4:], whole.labels[-4:])
    assert words.decode(short.tokens) == " f g h i"


def test_without_context_ids_the_documents_start_is_the_context() -> None:
    class Joined(Letters):
        """The whole text is one piece, unless it is the context."""

        def encode(self, text: str) -> list[int]:
            return [7, 8] if text == "ab cd" else [5]

    example, _ = make_example(Joined(), "ab cd", seq_len=4, where="here")  # type: ignore[arg-type]
    assert (example.tokens, example.labels) == ([Joined.eos_id, 7], [7, 8])


def test_a_word_longer_than_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"here: the last word has 7 tokens, training.seq_len is 6"):
        make_example(Letters(), "see abcdef", seq_len=6, where="here")  # type: ignore[arg-type]


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_same_on_any_number_of_ranks(tmp_path: Path, words: WordTokenizer, dp_size: int) -> None:
    words.encode(" w1 w2 w3")  # ids 1 to 3, which `hashed` predicts
    passages = [" ".join("abcdefgh"[i % 3 : 3 + i % 5]) + f" w{i % 4}" for i in range(11)]
    path = write(tmp_path / "x.jsonl", passages)

    def run(scorer: FakeScorer) -> dict:
        return lambada(scorer, words, path, seq_len=5, batch_size=2, quiet=True)  # type: ignore[arg-type]

    alone = run(FakeScorer(hashed))
    assert 0 < alone["accuracy"] < 1 and alone["cut"] > 0
    results, scorers = on_ranks(dp_size, hashed, run)
    assert results == [alone] * dp_size
    assert len({len(scorer.shapes) for scorer in scorers}) == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a b"}\n{"txt": "a b"}\n', ":2: no JSON object with `text`"),
        ("not json\n", ":1: no JSON object"),
        ("[1]\n", ":1: no JSON object"),
        ('{"text": "alone"}\n', ":1: a passage needs at least two words"),
        ('{"text": " alone "}\n', ":1: a passage needs at least two words"),
        ('{"text": 3}\n', ":1: a passage needs"),
        ("\n\n", "is empty"),
        ("", "is empty"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_passages(path)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "binary"):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_passages(path)
        assert "\n" not in str(caught.value)


def test_a_line_separator_inside_a_text_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one\u2028two three"}\n', encoding="utf-8")
    assert read_passages(path) == [(1, "one\u2028two three")]


@pytest.mark.skipif(not STANDARD.is_file(), reason="the standard LAMBADA file is not on this machine")
def test_the_standard_file(pieces: Tokenizer) -> None:
    passages = read_passages(STANDARD)
    assert len(passages) == 5153
    assert sum("\n" in text.rsplit(" ", 1)[1] for _, text in passages) == 7
    for number, text in passages[::10]:
        example, cut = make_example(pieces, text, seq_len=4096, where=str(number))
        target = [label for label in example.labels if label != -100]
        assert not cut and example.tokens[1:] + target[-1:] == pieces.encode(text)[1:]
        last_word = text.rsplit(" ", 1)[1]
        if pieces.decode(pieces.encode(text)) == text:  # not changed by the model's normalisation
            assert pieces.decode(target).strip() == last_word
