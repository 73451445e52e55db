"""Long prompts of an exact number of tokens: filler, needles at stated depths, a question and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.retrieval_tasks import Question
from sisa_dist.evaluation.scorer import IGNORE, Example

SHIFT = 0.02  # of the filler: a needle moves by at most so much to stand between two sentences
LEAST_FILLER = 16
SPARE = 32  # questions of one task differ by a few tokens
_CHARACTERS = 4_000_000  # of a filler's files that are read: a million tokens or so
_ENDS = (".", "!", "?", "\n", "。")


@dataclass(frozen=True)
class Haystack:
    """A prompt with its answers as labels. answers: the label positions of each; depths: of the needles in the filler,
    0 to 1, as they came to stand."""

    example: Example
    answers: list[range]
    depths: list[float]


class Filler:
    """Text as ids, read in a circle from the beginning of any of its sentences."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.text = text
        self._ids: NDArray[np.int64] = np.array(tokenizer.encode(text), dtype=np.int64)
        if not len(self._ids):
            raise UserError("evaluation.retrieval.filler: the files hold no text: name others, or set it to null")
        kinds, where = np.unique(self._ids, return_inverse=True)
        ends = [tokenizer.decode([int(i)]).rstrip(" \"'”)").endswith(_ENDS) for i in kinds]
        self._after_end = np.roll(np.array(ends)[where], 1)  # whether a sentence begins with this token

    @classmethod
    def read(cls, paths: Sequence[str], tokenizer: Tokenizer) -> Filler:
        """The beginnings of text files, one behind the other. Raises UserError that names the file."""
        texts: list[str] = []
        for path in paths:
            try:
                with Path(path).open(encoding="utf-8") as file:
                    texts.append(file.read(_CHARACTERS - sum(map(len, texts))))
            except (OSError, UnicodeDecodeError) as error:
                why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
                raise UserError(
                    f"evaluation.retrieval.filler: {path} cannot be read ({why}): name a text file"
                ) from None
        return cls("\n".join(texts), tokenizer)

    def absent(self, text: str) -> bool:
        return text not in self.text

    def piece(self, length: int, rng: np.random.Generator) -> tuple[list[int], NDArray[np.int64]]:
        """(`length` ids, the places where a sentence begins among them)."""
        starts = self._after_end.nonzero()[0]
        start = int(starts[rng.integers(len(starts))]) if len(starts) else 0
        at = (start + np.arange(length)) % len(self._ids)
        return self._ids[at].tolist(), self._after_end[at].nonzero()[0]


def make_haystack(
    question: Question,
    filler: Filler,
    tokenizer: Tokenizer,
    *,
    length: int,
    rng: np.random.Generator,
    spare: int = 0,
) -> Haystack:
    """The model reads exactly `length` tokens: everything but the last token of the last answer.

    A needle stands where its depth says, or between two sentences at most `SHIFT` of the filler away.
    Raises UserError where fewer than `LEAST_FILLER` + `spare` tokens of filler are left.
    """
    before = _before(question, tokenizer)
    needles, tail, spans = _encode(question, tokenizer)
    room = length + 1 - len(before) - sum(map(len, needles)) - len(tail)
    if room < LEAST_FILLER + spare:
        least = length - room + LEAST_FILLER + SPARE
        raise UserError(
            f"evaluation.retrieval.lengths: in {length} tokens there is no room for a question of {length - room} and "
            f"filler: set at least {least}, or leave the task out of evaluation.retrieval.tasks"
        )
    piece, sentences = filler.piece(room, rng)
    places = [_place(depth, room, sentences) for depth in question.at]
    ids, done = list(before), 0
    for number in sorted(range(len(needles)), key=lambda number: places[number]):
        ids += piece[done : places[number]] + needles[number]
        done = places[number]
    ids += piece[done:]
    # The label of position t is token t + 1.
    answers = [range(len(ids) + start - 1, len(ids) + stop - 1) for start, stop in spans]
    ids += tail
    assert len(ids) == length + 1
    labels = [IGNORE] * length
    for answer in answers:
        labels[answer.start : answer.stop] = ids[answer.start + 1 : answer.stop + 1]
    return Haystack(Example(ids[:-1], labels), answers, [place / max(1, room) for place in places])


def _place(depth: float, room: int, sentences: NDArray[np.int64]) -> int:
    wanted = round(depth * room)
    if wanted in (0, room) or not len(sentences):
        return wanted
    nearest = int(sentences[np.abs(sentences - wanted).argmin()])
    return nearest if abs(nearest - wanted) <= SHIFT * room else wanted


def _before(question: Question, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(f"{question.before} ") if question.before else []


def _encode(question: Question, tokenizer: Tokenizer) -> tuple[list[list[int]], list[int], list[tuple[int, int]]]:
    """(ids of each needle, ids of the query and its answers as one text, where in them each answer stands).

    An answer's ids are those that the text has beyond what it shares with the text up to there, as encode_continuation
    has it: a piece that joins the space before belongs to the answer, and one that joins the comma behind it too.
    """
    needles = [tokenizer.encode(f" {needle}") for needle in question.needles]
    so_far = f" {question.query}"
    whole = tokenizer.encode(f"{so_far} {', '.join(question.answers)}")
    spans: list[tuple[int, int]] = []
    for number, answer in enumerate(question.answers):
        so_far += "," * (number > 0)
        start = _common(tokenizer.encode(so_far), whole)
        so_far += f" {answer}"
        spans.append((start, max(start + 1, _common(tokenizer.encode(so_far), whole))))
    return needles, whole, spans


def _common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
