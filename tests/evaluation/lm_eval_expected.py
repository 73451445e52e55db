"""What lm-evaluation-harness should find on a checkpoint, worked out from plain logits, and tasks to ask it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.instance import Instance

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint import load_model
from sisa_dist.model import LM

SEQ_LEN = 64
LONG = (
    "    for name, value in sorted(values.items()):\n        print(name, value)\n" * 6
)  # more than 2 × SEQ_LEN tokens
CONTEXTS = ["def load(path):", "x", "import os\n", "return the sum of all", LONG, "    assert total > 0, "]


class Plain:
    """The expected: fp64 log-softmax of the plain model's logits, one unpadded sequence at a time."""

    def __init__(self, run: Path) -> None:
        self.model: LM
        self.tokenizer: Tokenizer
        self.model, self.tokenizer = load_model(run)
        self.eos = self.tokenizer.eos_id

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]))
        assert isinstance(logits, torch.Tensor)
        return logits[0].double().log_softmax(-1)

    def likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """At most SEQ_LEN tokens are seen, the last of them."""
        ids = (context + continuation)[-(SEQ_LEN + 1) :]
        log_probs = self.log_probs(ids[:-1])[-len(continuation) :]
        picked = log_probs[torch.arange(len(continuation)), torch.tensor(continuation)]
        return float(picked.sum()), log_probs.argmax(-1).tolist() == continuation

    def of_text(self, context: str, continuation: str) -> tuple[float, bool]:
        """Texts whose pieces do not span the boundary. The context's last spaces are the continuation's."""
        before = context.rstrip()
        start, end = self.tokenizer.encode(before), self.tokenizer.encode(context[len(before) :] + continuation)
        assert self.tokenizer.encode(context + continuation) == start + end
        return self.likelihood([self.eos, *start], end)

    def rolling(self, text: str) -> float:
        """Windows of SEQ_LEN tokens; the last is filled up with context."""
        ids = [self.eos, *self.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + SEQ_LEN, len(ids))
            begin = max(0, end - 1 - SEQ_LEN)
            total += self.likelihood(ids[begin:done], ids[done:end])[0]
            done = end
        return total

    def greedy(self, context: str, tokens: int) -> str:
        ids = [self.eos, *self.tokenizer.encode(context)][-(SEQ_LEN - tokens) :]
        made: list[int] = []
        for _ in range(tokens):
            made.append(int(self.log_probs(ids + made)[-1].argmax()))
            if made[-1] == self.eos:
                break
        return self.tokenizer.decode(made)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    body = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body), encoding="utf-8")
