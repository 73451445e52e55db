"""What is hidden in a long text and asked at its end, drawn from a generator alone.

    niah               one of the SISA paper's five sentences (niah.py), continued as there but to the whole value
    pairs              eight pairs of letters, the second of one is asked: a token after a token, which models of a
                       million parameters learn to look up (Olsson et al. 2022, arXiv 2209.11895)
    passkey            Mohtashami & Jaggi 2023 (arXiv 2305.16300)
    multikey           four numbers under four names, one is asked           after RULER, Hsieh et al. 2024
    multiquery         four numbers, all are asked                           (arXiv 2404.06654), in words of our own;
    variable_tracking  two chains of assignments; the names in one of them   base models are asked, so no instructions

Answers are in a fixed order that the question names, so each has one right continuation given those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sisa_dist.config import UserError
from sisa_dist.evaluation.niah import FILLER, NEEDLES

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEYS = 4  # of multikey and multiquery
PAIRS = 8  # of pairs
CHAINS, HOPS = 2, 4  # of variable_tracking: HOPS + 1 names in each chain
_NOUNS = (
    "anchor apple arrow basket bell bottle bridge button candle carpet castle chair clock cloud coin "
    "copper crown door drum engine feather field forest garden glove hammer harbour helmet island kettle "
    "ladder lamp lantern lemon letter mirror mountain needle orchard paper pencil pillow pocket river "
    "saddle shovel silver spoon stone tower tunnel valley violin wagon whistle window"
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COMMON = "abcdefilmnoprstu"  # in large and small, with the space before: one token of a vocabulary of a thousand
_DRAWS = 10_000

Absent = Callable[[str], bool]  # whether the filler holds no such text


@dataclass(frozen=True)
class Question:
    """`needles` stand in the filler at `at`, 0 to 1, those at one place in their order. `answers` follow `query`."""

    before: str
    needles: tuple[str, ...]
    at: tuple[float, ...]
    query: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """`chance`: the score of a model that knows the form of an answer but not the text. `noise`: the default filler.

    A task that is not `by_depth` spreads its needles over the whole text.
    """

    ask: Callable[[np.random.Generator, float, Absent], Question]
    by_depth: bool
    chance: float
    noise: str = NOISE


def _niah(rng: np.random.Generator, depth: float, absent: Absent) -> Question:
    usable = [needle for needle in NEEDLES if absent(needle[0])]
    if not usable:
        raise UserError("evaluation.retrieval.filler: it holds every needle of niah: leave niah out, or use other text")
    key, value = usable[int(rng.integers(len(usable)))]
    return Question("", (f"{key} {value}.",), (depth,), key, (value,))


def _pairs(rng: np.random.Generator, depth: float, absent: Absent) -> Question:
    usable = [letter for letter in COMMON.upper() if absent(f" {letter} ")]
    if len(usable) < PAIRS:
        raise UserError(
            "evaluation.retrieval.filler: nearly every letter is a word of it: leave pairs out, or use other text"
        )
    first = rng.permutation(usable)[:PAIRS].tolist()
    second = rng.choice(list(COMMON), PAIRS).tolist()
    needles = tuple(f"{a} {b}." for a, b in zip(first, second, strict=True))
    return Question("", needles, (depth, *rng.random(PAIRS - 1).tolist()), first[0], (second[0],))


def _passkey(rng: np.random.Generator, depth: float, absent: Absent) -> Question:
    (number,) = _numbers(rng, 1, absent)
    before = "There is an important pass key hidden inside a lot of irrelevant text. Find it and memorise it."
    needle = f"The pass key is {number}. Remember it. {number} is the pass key."
    return Question(before, (needle,), (depth,), "What is the pass key? The pass key is", (number,))


def _named(rng: np.random.Generator, absent: Absent) -> tuple[list[str], list[str], tuple[str, ...]]:
    """KEYS names, a number for each, and the sentences that say so."""
    names = rng.choice(_NOUNS.split(), KEYS, replace=False).tolist()
    numbers = _numbers(rng, KEYS, absent)
    pairs = zip(names, numbers, strict=True)
    return names, numbers, tuple(f"The magic number of the {name} is {number}." for name, number in pairs)


_MEMORISE = "Some magic numbers are hidden inside the following text. Memorise them."


def _multikey(rng: np.random.Generator, depth: float, absent: Absent) -> Question:
    names, numbers, needles = _named(rng, absent)
    at = (depth, *rng.random(KEYS - 1).tolist())
    name = names[0]
    query = f"What is the magic number of the {name}? The magic number of the {name} is"
    return Question(_MEMORISE, needles, at, query, (numbers[0],))


def _multiquery(rng: np.random.Generator, depth: float, absent: Absent) -> Question:
    names, numbers, needles = _named(rng, absent)
    asked = [f"the {name}" for name in names]
    listed = f"{', '.join(asked[:-1])} and {asked[-1]}"
    query = f"What are the magic numbers of {listed}, in this order? They are"
    return Question(_MEMORISE, needles, tuple(rng.random(KEYS).tolist()), query, tuple(numbers))


def _variable_tracking(rng: np.random.Generator, depth: float, absent: Absent) -> Question:
    numbers = _numbers(rng, CHAINS, absent)
    free: Absent = lambda text: text != "VAR" and absent(text)  # noqa: E731
    names = _distinct(rng, CHAINS * (HOPS + 1), free, lambda: "".join(rng.choice(list(_LETTERS), 3)))
    needles: list[str] = []
    at: list[float] = []
    for chain, number in enumerate(numbers):
        mine = names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        values = [number, *(f"VAR {name}" for name in mine[:-1])]
        needles += [f"VAR {name} = {value}." for name, value in zip(mine, values, strict=True)]
        at += sorted(rng.random(HOPS + 1).tolist())  # a name is set before it is read
    before = "Keep track of the variables that are set inside the following text."
    query = f"Which variables have the value {numbers[0]}, in the order in which they were set? They are"
    return Question(before, tuple(needles), tuple(at), query, tuple(names[: HOPS + 1]))


def _numbers(rng: np.random.Generator, count: int, absent: Absent) -> list[str]:
    return _distinct(rng, count, absent, lambda: str(rng.integers(10_000, 100_000)))


def _distinct(rng: np.random.Generator, count: int, absent: Absent, draw: Callable[[], str]) -> list[str]:
    """`count` different draws that the filler does not hold."""
    found: list[str] = []
    for _ in range(_DRAWS):
        if len(found) == count:
            return found
        text = draw()
        if text not in found and absent(text):
            found.append(text)
    raise UserError(
        f"evaluation.retrieval.filler: it holds nearly all that could be hidden in it, such as {text}: use other text"
    )


TASKS = {
    "niah": Task(_niah, True, 1 / len(NEEDLES), FILLER),
    "pairs": Task(_pairs, True, 1 / len(COMMON)),
    "passkey": Task(_passkey, True, 1 / 90_000),
    "multikey": Task(_multikey, True, 1 / 90_000),
    "multiquery": Task(_multiquery, False, 1 / 90_000),
    "variable_tracking": Task(_variable_tracking, False, 26.0**-3),
}
