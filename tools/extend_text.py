"""What tools/extend_context.py trains on: ordinary text, and sentences to look up as evaluation.retrieval has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_base import find_tokenizer
from sisa_dist.config import Run, parse_config, replace_file
from sisa_dist.evaluation.retrieval_tasks import COMMON, NOISE, TASKS

DRAWN = 1  # the seed of what is trained on; evaluation has the run's
DOCUMENTS = {"copies": 60_000, "short": 30_000, "long": 600}
COPIED, SHORTEST = 48, 24  # tokens
BASE = "base"  # the last stage of what is trained once for each system


def write_text(run: Run, folder: Path, text: list[str]) -> None:
    """FOLDER/{text,copies,short,long}, prepared with the tokenizer of the first, of the files `text`; what is there
    stays.

    Each document of `copies` is 6 to 16 letters, again and again: nearly every label can be looked up there, and there
    is little to look through. Short documents fit into a window of the stage `base`, long ones are from there to
    the last stage's.
    """
    first, last = run.named(BASE).config, run.stages[-1].config
    trained, longest = first.training.seq_len, last.training.seq_len
    _prepare(run, folder / "text", input=text)
    model = find_tokenizer(folder / "text")
    assert model is not None
    tokenizer = Tokenizer.load(model)
    texts = {
        "copies": _copies,
        "short": lambda count: _documents(tokenizer, count, SHORTEST, trained, trained),
        "long": lambda count: _documents(tokenizer, count, trained, longest, trained),
    }
    for name, write in texts.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            replace_file(path, write(DOCUMENTS[name]))
        _prepare(run, folder / name, input=str(path), tokenizer={"path": str(model)})


def _prepare(run: Run, folder: Path, **data: object) -> None:
    keys = {"folder": str(folder), "validation_fraction": 0.02, **data}
    tree = run.stages[0].config.model_dump() | {"name": folder.name, "output_dir": str(folder), "data": keys}
    prepare(parse_config(tree, source=f"the text of {folder}"))


def _copies(count: int) -> str:
    rng = np.random.Generator(np.random.Philox(DRAWN))
    lines = []
    for _ in range(count):
        letters = rng.permutation(list(COMMON + COMMON.upper()))[: int(rng.integers(6, 17))]
        lines.append(json.dumps({"text": " ".join(np.resize(letters, COPIED))}))
    return "\n".join(lines) + "\n"


def _documents(tokenizer: Tokenizer, count: int, shortest: int, longest: int, densest: int) -> str:
    """JSON lines of the sentences and questions of evaluation.retrieval, of lengths drawn evenly by their logarithm.

    What is hidden stands not once but many times in a document, in any order, between sentences that say nothing: from
    hardly any to all of its tokens, `densest` at most, and from two different ones to all. There is more to learn from
    than from one question at the end.
    """
    rng = np.random.Generator(np.random.Philox(DRAWN))
    noise = [f"{sentence}." for sentence in NOISE.strip().rstrip(".").split(". ")]
    tokens = np.mean([len(tokenizer.encode(f" {sentence}")) for sentence in noise])
    lines = []
    for _ in range(count):
        question = TASKS["pairs"].ask(rng, 0.5, lambda text: True)
        facts = question.needles[: int(rng.integers(2, len(question.needles) + 1))]
        cost = len(tokenizer.encode(f" {facts[0]}"))
        room = np.exp(rng.uniform(np.log(shortest), np.log(longest))) - cost * (len(facts) + 1)
        said = int(max(2, rng.random() * min(room, densest) / cost))
        sentences = [facts[int(rng.integers(len(facts)))] for _ in range(said)]
        sentences += [noise[n % len(noise)] for n in range(int(max(0, room - cost * said) / tokens))]
        shuffled = [sentences[n] for n in rng.permutation(len(sentences))]
        # Every one is said before it is asked.
        lines.append(json.dumps({"text": " ".join([*facts, *shuffled, f"{question.query} {question.answers[0]}"])}))
    return "\n".join(lines) + "\n"
