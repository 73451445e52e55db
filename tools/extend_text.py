"""What tools/extend_context.py trains on: ordinary text, and sentences to look up as evaluation.retrieval has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_base import find_tokenizer
from sisa_dist.config import Run, parse_config, replace_file
from sisa_dist.evaluation.retrieval_tasks import NOISE, TASKS

SAID = 24
DRAWN = 1  # the seed of what is trained on; evaluation has the run's
DOCUMENTS = {"short": 6000, "long": 600}


def write_text(run: Run, folder: Path, text: list[str]) -> None:
    """FOLDER/{text,short,long}, prepared with the tokenizer of the first, of the files `text`; what is there stays.

    Short prompts fit into a window of the first stage, long ones are from there to the last stage's.
    """
    first, last = run.stages[0].config, run.stages[-1].config
    trained, longest = first.training.seq_len, last.training.seq_len
    _prepare(run, folder / "text", input=text)
    model = find_tokenizer(folder / "text")
    assert model is not None
    tokenizer = Tokenizer.load(model)
    for name, (low, high) in {"short": (trained // 2, trained), "long": (trained, longest)}.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            replace_file(path, _documents(tokenizer, DOCUMENTS[name], low, high))
        _prepare(run, folder / name, input=str(path), tokenizer={"path": str(model)})


def _prepare(run: Run, folder: Path, **data: object) -> None:
    keys = {"folder": str(folder), "validation_fraction": 0.02, **data}
    tree = run.stages[0].config.model_dump() | {"name": folder.name, "output_dir": str(folder), "data": keys}
    prepare(parse_config(tree, source=f"the text of {folder}"))


def _documents(tokenizer: Tokenizer, count: int, shortest: int, longest: int) -> str:
    """JSON lines of the sentences and questions of evaluation.retrieval, of lengths drawn evenly by their logarithm.

    What is hidden stands not once but some SAID times in a document, in any order, between sentences that say nothing:
    there is more to learn from than from one question at the end.
    """
    rng = np.random.Generator(np.random.Philox(DRAWN))
    noise = [f"{sentence}." for sentence in NOISE.strip().rstrip(".").split(". ")]
    tokens = np.mean([len(tokenizer.encode(f" {sentence}")) for sentence in noise])
    lines = []
    for _ in range(count):
        question = TASKS["pairs"].ask(rng, 0.5, lambda text: True)
        facts, said = question.needles, int(rng.integers(SAID // 2, SAID + 1))
        asked = f"{question.query} {', '.join(question.answers)}"
        length = np.exp(rng.uniform(np.log(shortest), np.log(longest)))
        room = (
            length - len(tokenizer.encode(" ".join([question.before, asked]))) - len(tokenizer.encode(facts[0])) * said
        )
        sentences = [facts[int(rng.integers(len(facts)))] for _ in range(said)]
        sentences += [noise[n % len(noise)] for n in range(int(max(0, room) / tokens))]
        shuffled = [sentences[n] for n in rng.permutation(len(sentences))]
        # Every one is said before it is asked.
        lines.append(json.dumps({"text": " ".join([question.before, *facts, *shuffled, asked]).strip()}))
    return "\n".join(lines) + "\n"
