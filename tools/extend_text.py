"""What tools/extend_context.py trains on: ordinary text, and prompts of evaluation.retrieval with their answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_base import find_tokenizer
from sisa_dist.config import RetrievalConfig, Run, parse_config, replace_file
from sisa_dist.evaluation.retrieval import Retrieval

TASKS = ["passkey", "multikey", "multiquery"]
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
    """JSON lines of prompts with their answers, of lengths drawn evenly by their logarithm."""
    lengths = np.random.Generator(np.random.Philox(DRAWN)).uniform(np.log(shortest), np.log(longest - 1), count)
    drawn = [int(length) for length in np.exp(lengths)]
    made = Retrieval(RetrievalConfig(tasks=TASKS, lengths=[shortest]), tokenizer, seed=DRAWN)
    lines = []
    for number, length in enumerate(drawn):
        depth = (number * 0.6180339887) % 1  # even over any stretch of documents
        example = made.prompt(TASKS[number % len(TASKS)], length, depth, number).example
        lines.append(json.dumps({"text": tokenizer.decode([*example.tokens, example.labels[-1]])}))
    return "\n".join(lines) + "\n"
