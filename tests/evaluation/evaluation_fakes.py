"""Scorers and tokenizers whose answers are known by hand, and data ranks played by threads."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[list[int]], tuple[int, dict[int, float]]]


class FakeScorer:
    """`predict(prefix)` gives (argmax, log-probability by token); tokens it does not name have log-probability −8.

    Ranks that share a `barrier` must call score and sum_over_dp equally often, else BrokenBarrierError.
    """

    def __init__(self, predict: Predict, *, dp_rank: int = 0, dp_size: int = 1, team: Team | None = None) -> None:
        self.predict, self.dp_rank, self.dp_size = predict, dp_rank, dp_size
        self.team = team or Team(1)
        self.shapes: list[tuple[int, ...]] = []
        self.labelled = 0

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert tokens_BT.dtype == labels_BT.dtype == torch.int64 and tokens_BT.shape == labels_BT.shape
        assert tokens_BT.numel() > 0
        self.team.wait()
        self.shapes.append(tuple(tokens_BT.shape))
        log_prob_BT = torch.zeros(tokens_BT.shape)
        is_argmax_BT = torch.ones(tokens_BT.shape, dtype=torch.bool)
        for b, t in (labels_BT != -100).nonzero().tolist():
            best, log_probs = self.predict(tokens_BT[b, : t + 1].tolist())
            label = int(labels_BT[b, t])
            log_prob_BT[b, t] = log_probs.get(label, -8.0)
            is_argmax_BT[b, t] = label == best
            self.labelled += 1
        return log_prob_BT, is_argmax_BT

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return self.team.sum(values)


class Team:
    """Data ranks, one a thread. Unequal numbers of calls break the barrier after `patience` seconds."""

    def __init__(self, size: int, *, patience: float = 10.0) -> None:
        self._barrier = threading.Barrier(size, timeout=patience)
        self._lock = threading.Lock()
        self._sums: list[list[float]] = []

    def wait(self) -> None:
        self._barrier.wait()

    def sum(self, values: list[float]) -> list[float]:
        with self._lock:
            self._sums.append(values)
        self.wait()
        total = [sum(column) for column in zip(*self._sums, strict=True)]
        if self._barrier.wait() == 0:
            self._sums = []
        self.wait()
        return total


def on_ranks(
    dp_size: int, predict: Predict, work: Callable[[FakeScorer], Any], *, patience: float = 10.0
) -> tuple[list[Any], list[FakeScorer]]:
    """`work` on every rank at once; its results and the scorers, by rank. Any rank's exception is raised."""
    team = Team(dp_size, patience=patience)
    scorers = [FakeScorer(predict, dp_rank=rank, dp_size=dp_size, team=team) for rank in range(dp_size)]
    results: list[Any] = [None] * dp_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(scorers[rank])
        except BaseException as error:
            results[rank] = error
            team._barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(dp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results, scorers


class WordTokenizer:
    """A piece is a word with the spaces before it, a mark, or a run of newlines; ids in order of appearance."""

    eos_id = 0
    _PIECE = re.compile(r" *\w+|[^\w\s]|\n+| +")

    def __init__(self) -> None:
        self._pieces = ["</s>"]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        found = self._PIECE.findall(text)
        assert "".join(found) == text
        for piece in found:
            if piece not in self._pieces:
                self._pieces.append(piece)
        return [self._pieces.index(piece) for piece in found]

    def decode(self, ids: list[int]) -> str:
        return "".join("" if i == self.eos_id else self._pieces[i] for i in ids)


def hashed(prefix: list[int]) -> tuple[int, dict[int, float]]:
    """A model that depends on every token of the prefix: argmax and log-probabilities look random but are fixed.

    Log-probabilities are multiples of 1/8, so that their sums are exact in any order.
    """
    state = 17
    for token in prefix:
        state = (state * 1_000_003 + token + 1) % 2_147_483_647
    return state % 3 + 1, {token: -((state + 7 * token) % 61) / 8 for token in range(64)}


def induction(prefix: list[int]) -> tuple[int, dict[int, float]]:
    """Predicts what followed the longest earlier stretch that equals the prefix's end (the later one of equals)."""
    best, length = 0, 0
    for end in range(1, len(prefix)):
        n = 0
        while n < end and prefix[end - 1 - n] == prefix[-1 - n]:
            n += 1
        if n >= max(1, length):
            best, length = prefix[end], n
    return best, {best: -0.125}
