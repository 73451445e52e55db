"""BLiMP (Warstadt et al. 2020, arXiv 1912.00582): is the grammatical sentence of a pair the likelier one?

The log-probability is of the whole sentence, the first token given the end of a document, as in the paper's "full
sentence" scores. Nothing is divided by length: the pairs are minimal. A tie is a miss.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.scorer import Example, Scorer, score_examples

_REMEDY = "name the folder of BLiMP's .jsonl files, or its zip"


def blimp(
    scorer: Scorer,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    batch_size: int,
    seq_len: int,
    pairs: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Accuracy over the first `pairs` of each paradigm of `path` (None: all), and by paradigm. Collective.

    hits: 1 or 0 for every pair, paradigms by name. Raises UserError for the files, and for a sentence longer than
    seq_len tokens.
    """
    chosen = [(name, pair) for name, read in read_paradigms(path).items() for pair in read[:pairs]]
    examples = [make_example(tokenizer, sentence, seq_len=seq_len) for _, pair in chosen for sentence in pair]
    # Every rank fills in its own sentences; those of the others are 0 in the sum.
    sums = [0.0] * len(examples)
    for number, log_prob_T, _ in score_examples(scorer, examples, batch_size=batch_size, what="BLiMP", quiet=quiet):
        sums[number] = float(log_prob_T.double().sum())
    sums = scorer.sum_over_dp(sums)
    hits = [int(good > bad) for good, bad in zip(sums[::2], sums[1::2], strict=True)]
    by_name: dict[str, list[int]] = {}
    for (name, _), hit in zip(chosen, hits, strict=True):
        by_name.setdefault(name, []).append(hit)
    return {
        "accuracy": sum(hits) / len(hits),
        "pairs": len(hits),
        "by_paradigm": {name: sum(found) / len(found) for name, found in by_name.items()},
        "hits": hits,
    }


def make_example(tokenizer: Tokenizer, sentence: str, *, seq_len: int) -> Example:
    """Every token of the sentence is a label, the first behind the end of a document."""
    ids = tokenizer.encode(sentence)
    if len(ids) > seq_len:
        raise UserError(f"BLiMP: a sentence has {len(ids)} tokens, training.seq_len is {seq_len}: raise it")
    return Example([tokenizer.eos_id, *ids[:-1]], list(ids))


def read_paradigms(path: str | Path) -> dict[str, list[tuple[str, str]]]:
    """(good, bad) sentences by paradigm, which is the file's name, sorted. Raises UserError that names the file."""
    path = Path(path)
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        for name, content in sorted(_files(path)):
            pairs = []
            for number, line in enumerate(content.decode("utf-8").split("\n"), 1):
                if line.strip():
                    pairs.append(_pair(line, where=f"{path}: {name}.jsonl:{number}"))
            if pairs:
                found[name] = pairs
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({why}): {_REMEDY}") from None
    if not found:
        raise UserError(f"{path}: holds no BLiMP pairs: {_REMEDY}")
    return found


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name without suffix, content) of the .jsonl files."""
    if path.is_dir():
        yield from ((file.stem, file.read_bytes()) for file in path.rglob("*.jsonl"))
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            # A zip made on a Mac has a shadow of every file.
            if entry.endswith(".jsonl") and not entry.startswith("__MACOSX/"):
                yield Path(entry).stem, archive.read(entry)


def _pair(line: str, *, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        good, bad = record["sentence_good"], record["sentence_bad"]
    except (ValueError, KeyError, TypeError):
        good = bad = None
    if not (isinstance(good, str) and isinstance(bad, str) and good and bad):
        raise UserError(f"{where}: no JSON object with sentence_good and sentence_bad: {_REMEDY}")
    return good, bad
