"""Retrieval over lengths and depths: prompts are what they say, have one right answer, and readers find it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from evaluation_fakes import FakeScorer, Predict, hashed, on_ranks

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import RetrievalConfig, UserError
from sisa_dist.evaluation.haystack import SHIFT
from sisa_dist.evaluation.heat_map import draw_retrieval
from sisa_dist.evaluation.niah import NEEDLES
from sisa_dist.evaluation.retrieval import Retrieval
from sisa_dist.evaluation.retrieval_tasks import TASKS

NUMBER = re.compile(r"\d{5}")
TEXT = (
    "It rained all night, and in the morning the road was gone. Nobody knew why! Who would ask? The answer is lost.\n"
)


class Letters:
    """One id a character."""

    eos_id, vocab_size = 0, 256

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def made(tokenizer: Any = None, *, seed: int = 1, **asked: Any) -> Retrieval:
    return Retrieval(RetrievalConfig(**{"lengths": [800], "items": 2} | asked), tokenizer or Letters(), seed=seed)


def split(text: str) -> tuple[str, str, str]:
    """(task, what it asks about, what has been answered so far)."""
    for task, pattern in {
        "passkey": r"What is (the pass key)\? The pass key is([ \d]*)$",
        "multikey": r"What is the magic number of the \w+\? The magic number of the (\w+) is([ \d]*)$",
        "multiquery": r"What are the magic numbers of (.+), in this order\? They are([ ,\d]*)$",
        "variable_tracking": r"Which variables have the value (\d+), in the order .* set\? They are([ ,A-Z]*)$",
        "niah": f"({'|'.join(key for key, _ in NEEDLES)})( ?[A-Z]*)$",
        "pairs": r" ([A-Z])( ?)$",
    }.items():
        if found := re.search(pattern, text):
            return task, found[1], found[2]
    raise AssertionError(text[-200:])


def read(text: str) -> list[str]:
    """What the text says, found by other means than it was made; fails where it says two things."""
    task, asked, said = split(text)
    body = text[: len(text) - len(said)]

    def only(found: list[str]) -> str:
        assert len(set(found)) <= 1, found
        return found[0] if found else "?"

    if task == "niah":
        return [only(re.findall(f"{asked} ([A-Z]+)\\.", body))]
    if task == "pairs":
        return [only(re.findall(f"(?:^| ){asked} ([a-z])\\.", body))]
    if task == "passkey":
        return [only(NUMBER.findall(body))]
    if task == "multikey":
        return [only(re.findall(f"number of the {asked} is (\\d+)\\.", body))]
    if task == "multiquery":
        names = [name.removeprefix("the ") for name in re.split(", | and ", asked)]
        return [only(re.findall(f"number of the {name} is (\\d+)\\.", body)) for name in names]
    held: dict[str, str] = {}
    for name, other, number in re.findall(r"VAR ([A-Z]{3}) = (?:VAR ([A-Z]{3})|(\d{5}))\.", body):
        held[name] = number or held.get(other, "?")
    return [name for name, number in held.items() if number == asked]


def says(answers: Callable[[str], list[str]], *, sees: int = 10**9) -> Predict:
    """A model that reads the last `sees` characters and answers, a character at a time."""

    def predict(prefix: list[int]) -> tuple[int, dict[int, float]]:
        text = Letters().decode(prefix)[-sees:]
        said = split(text)[2]
        whole = " " + ", ".join(answers(text)) + "?"
        return ord(whole[len(said)] if whole.startswith(said) else "?"), {}

    return predict


def test_a_reader_scores_one_everywhere_and_a_short_sighted_one_does_not() -> None:
    asked = made(lengths=[1600, 800], depths=[1.0, 0.0])
    found = asked.score(FakeScorer(says(read)), batch_tokens=3000)
    assert found["lengths"] == [800, 1600] and found["depths"] == [0.0, 1.0] and found["effective_length"] == 1600
    assert found["tasks"].keys() == TASKS.keys() and found["score_by_length"] == [1.0, 1.0]
    for name, task in found["tasks"].items():
        assert task["score_by_length"] == [1.0, 1.0] and task["effective_length"] == 1600
        assert task.get("score") == ([[1.0, 1.0], [1.0, 1.0]] if TASKS[name].by_depth else None)
    near = asked.score(FakeScorer(says(read, sees=900)), batch_tokens=3000)
    assert near["score_by_length"][0] == 1.0 > near["score_by_length"][1] and near["effective_length"] == 800
    for name in ("niah", "passkey", "multikey"):  # at 1600 the text's beginning is out of sight, its end is not
        assert near["tasks"][name]["score"] == [[1.0, 1.0], [0.0, 1.0]]


def test_several_answers_count_one_by_one() -> None:
    """Half of what is asked is half a point, given the right answers before it."""
    asked = made(tasks=["multiquery"], items=4, depths=[0.5])
    odd = says(lambda text: [a if n % 2 else "00000" for n, a in enumerate(read(text))])

    def predict(prefix: list[int]) -> tuple[int, dict[int, float]]:
        answered = split(Letters().decode(prefix))[2].count(",")
        return says(read)(prefix) if answered % 2 else odd(prefix)

    assert asked.score(FakeScorer(predict), batch_tokens=800)["score_by_length"] == [0.5]


def test_guesses_score_chance() -> None:
    def guess(text: str) -> list[str]:
        """Of the right form, without reading; a hash of what is asked and of the text's beginning is the die."""
        task, _, said = split(text)
        die = hashed([ord(c) for c in text[: len(text) - len(said)]])[1][5]
        return {"niah": [NEEDLES[int(-8 * die) % 5][1]], "pairs": ["e"]}.get(task, ["12345"] * len(read(text)))

    found = made(items=40, lengths=[800], depths=[0.5]).score(FakeScorer(says(guess)), batch_tokens=800)
    for task in found["tasks"].values():
        (score,) = task["score_by_length"]
        assert abs(score - task["chance"]) <= 3 * (task["chance"] / 40) ** 0.5 + 0.004
    # Of the four numbers in the text one is right.
    some = says(lambda text: NUMBER.findall(text)[1:2])
    (score,) = made(tasks=["multikey"], items=60, depths=[0.5]).score(FakeScorer(some), batch_tokens=800)[
        "score_by_length"
    ]
    assert 0.1 < score < 0.4


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{n}. {TEXT}" for n in range(30)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("real_text", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_length_depth_and_answers_are_exact(pieces: Tokenizer, task: str, real_text: bool, book: str) -> None:
    asked = made(pieces, tasks=[task], lengths=[500, 700], filler=[book] if real_text else None)
    for length in (500, 700):
        for number, depth in enumerate((0.0, 0.3, 0.5, 1.0)):
            one = asked.prompt(task, length, depth, number)
            tokens, labels = one.example.tokens, one.example.labels
            assert len(tokens) == len(labels) == length
            if TASKS[task].by_depth:
                assert abs(one.depths[0] - depth) <= SHIFT + 1 / length and (one.depths[0] == depth or 0 < depth < 1)
            assert all(0.0 <= at <= 1.0 for at in one.depths)
            # What is read is what is labelled, one token later, and nothing else is.
            whole = [*tokens, labels[-1]]
            answered = [i for answer in one.answers for i in answer]
            assert [i for i, label in enumerate(labels) if label != -100] == answered and answered[-1] == length - 1
            assert all(labels[i] == whole[i + 1] for i in answered)
            text = " ".join(pieces.decode(whole).split())
            right = [pieces.decode([labels[i] for i in answer]).strip(" ,") for answer in one.answers]
            question = text[: text.rindex(right[0])].rstrip()
            assert read(question) == right
            for answer in right if task in ("multikey", "multiquery") else ():
                assert question.count(answer) == 1  # nowhere but in its needle
            assert ("It rained" in text) == real_text


def test_needles_stand_between_sentences_where_they_can(book: str) -> None:
    asked = made(tasks=["passkey"], lengths=[8000], filler=book)
    texts = [Letters().decode(asked.prompt("passkey", 8000, 0.5, n).example.tokens) for n in range(10)]
    assert all(re.search(r"[.!?\n] ?The pass key is \d{5}\. Remember", text.replace(" The", " The")) for text in texts)
    assert len({text[100:200] for text in texts}) > 3  # read from different sentences on


def test_prompts_depend_on_seed_and_cell_alone() -> None:
    def prompts(seed: int, **asked: Any) -> list[Any]:
        return [made(seed=seed, **asked).prompt(task, 800, 0.5, n) for task in TASKS for n in range(3)]

    assert prompts(1) == prompts(1, lengths=[600, 800], depths=[0.5], items=7)
    assert all(a != b for a, b in pairwise(prompts(1)))
    assert prompts(1) != prompts(2) and prompts(2**64 - 1) != prompts(2**64 - 2)


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_same_on_any_number_of_ranks(dp_size: int) -> None:
    asked = made(tasks=["multikey", "multiquery"], lengths=[700, 900], depths=[0.0, 1.0], items=3)
    sometimes = lambda prefix: says(read)(prefix) if hashed(prefix[-40:])[0] > 1 else (0, {})  # noqa: E731

    def run(scorer: FakeScorer) -> dict[str, Any]:
        return asked.score(scorer, batch_tokens=1500)

    alone = run(FakeScorer(sometimes))
    results, scorers = on_ranks(dp_size, sometimes, run)
    assert results == [alone] * dp_size and 0 < alone["score_by_length"][0] < 1
    assert len({len(scorer.shapes) for scorer in scorers}) == 1
    assert {shape[0] * shape[1] <= 1500 for scorer in scorers for shape in scorer.shapes} == {True}


def test_a_filler_that_says_a_needles_key_does_not_spoil_it(book: str) -> None:
    """TEXT says "The answer is": that key is not asked."""
    asked = made(tasks=["niah"], filler=book)
    keys = {split(Letters().decode(asked.prompt("niah", 800, 0.5, n).example.tokens))[1] for n in range(40)}
    assert keys == {key for key, _ in NEEDLES} - {"The answer is"}


def test_refusals_are_one_line_that_says_what_to_do(tmp_path: Path, book: str) -> None:
    with pytest.raises(UserError, match=r"100 tokens there is no room .* set at least (\d+)") as caught:
        made(tasks=["passkey"], lengths=[4000, 100])
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    made(tasks=["passkey"], lengths=[least])
    with pytest.raises(UserError, match=f"set at least {least}"):
        made(tasks=["passkey"], lengths=[least - 1])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="hold no text"):
        made(filler=str(tmp_path / "empty.txt"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    for name, why in (("bytes", "not UTF-8"), ("absent", "No such file")):
        with pytest.raises(UserError, match=f"filler: .*{name} cannot be read .{why}.*: name a text file"):
            made(filler=[book, str(tmp_path / name)])
    (tmp_path / "keys.txt").write_text(" ".join(key for key, _ in NEEDLES), encoding="utf-8")
    with pytest.raises(UserError, match="holds every needle of niah"):
        made(filler=str(tmp_path / "keys.txt"))
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(10_000, 100_000))), encoding="utf-8")
    with pytest.raises(UserError, match="holds nearly all"):
        made(tasks=["passkey"], filler=str(tmp_path / "numbers.txt"))


def test_the_heat_map_is_drawn(tmp_path: Path) -> None:
    found = made(depths=[0.0, 1.0], items=1).score(FakeScorer(says(read)), batch_tokens=800)
    draw_retrieval(found, tmp_path / "map.png", title="step 1")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        draw_retrieval(found, tmp_path / "absent" / "map.png", title="step 1")
