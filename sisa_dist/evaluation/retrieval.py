"""What a model finds again over lengths and depths: scores, and the longest length at which it still does.

Given the right answer so far, all-argmax is the same event as greedy decoding producing the answer, so one
teacher-forced forward a prompt is enough, under any engine and layout. Of several answers each counts by itself, as in
RULER, whose "effective length" is also ours: the longest with a score of at least a threshold.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import RetrievalConfig
from sisa_dist.evaluation.haystack import SPARE, Filler, Haystack, make_haystack
from sisa_dist.evaluation.retrieval_tasks import TASKS
from sisa_dist.evaluation.scorer import Scorer, score_examples


class Retrieval:
    """The prompts that `asked` names; each is drawn from (seed, task, length, depth, number) alone.

    Raises UserError where a filler cannot be read, or a length has no room.
    """

    def __init__(self, asked: RetrievalConfig, tokenizer: Tokenizer, *, seed: int) -> None:
        self.asked, self._tokenizer, self._seed = asked, tokenizer, seed
        self.lengths, self.depths = sorted(asked.lengths), sorted(asked.depths)
        given = None
        if asked.filler is not None:
            paths = [asked.filler] if isinstance(asked.filler, str) else asked.filler
            given = Filler.read(paths, tokenizer)
        self._fillers: dict[str, Filler] = {task: given or Filler(TASKS[task].noise, tokenizer) for task in asked.tasks}
        for task in asked.tasks:
            # Found now, not hours into a run; SPARE is for questions with more tokens than this one.
            self.prompt(task, self.lengths[0], self.depths[0], 0, spare=SPARE)

    def prompt(self, task: str, length: int, depth: float, number: int, *, spare: int = 0) -> Haystack:
        """Prompt `number` of a cell. `spare`: tokens that must be left over besides."""
        key = f"{task} {length} {depth!r} {number}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, drawn], dtype=np.uint64)))
        filler = self._fillers[task]
        question = TASKS[task].ask(rng, depth, filler.absent)
        return make_haystack(question, filler, self._tokenizer, length=length, rng=rng, spare=spare)

    def score(self, scorer: Scorer, *, batch_tokens: int, quiet: bool = True) -> dict[str, Any]:
        """Scores by task, length and depth, 0 to 1. Collective; the same on every rank.

        scores[task]: score_by_length, effective_length (None: no length reaches the threshold), chance, and where the
        task has a depth, score[length][depth]. score_by_length and effective_length beside them are of the tasks' mean.
        batch_tokens: tokens of a forward, if one prompt is not longer.
        """
        found: dict[str, Any] = {}
        for task in self.asked.tasks:
            grid = [self._cells(scorer, task, length, batch_tokens, quiet) for length in self.lengths]
            means = [sum(cells) / len(cells) for cells in grid]
            found[task] = {
                "score_by_length": means,
                "effective_length": self._effective(means),
                "chance": TASKS[task].chance,
            } | ({"score": grid} if TASKS[task].by_depth else {})
        by_task = [of["score_by_length"] for of in found.values()]
        means = [sum(scores) / len(scores) for scores in zip(*by_task, strict=True)]
        return {
            "lengths": self.lengths,
            "depths": self.depths,
            "items": self.asked.items,
            "threshold": self.asked.threshold,
            "score_by_length": means,
            "effective_length": self._effective(means),
            "tasks": found,
        }

    def _cells(self, scorer: Scorer, task: str, length: int, batch_tokens: int, quiet: bool) -> list[float]:
        """The score of each depth."""
        cells = [depth for depth in range(len(self.depths)) for _ in range(self.asked.items)]
        made = [self.prompt(task, length, self.depths[cell], number) for number, cell in enumerate(cells)]
        sums = [0.0] * len(self.depths)
        examples = [one.example for one in made]
        rows = max(1, batch_tokens // length)
        for i, _, is_argmax_T in score_examples(
            scorer, examples, batch_size=rows, what=f"{task}, {length} tokens", quiet=quiet
        ):
            right = [bool(is_argmax_T[answer.start : answer.stop].all()) for answer in made[i].answers]
            sums[cells[i]] += sum(right) / len(right)
        return [total / self.asked.items for total in scorer.sum_over_dp(sums)]

    def _effective(self, means: list[float]) -> int | None:
        good = [length for length, mean in zip(self.lengths, means, strict=True) if mean >= self.asked.threshold]
        return max(good, default=None)
