"""LAMBADA (Paperno et al. 2016), scored greedily as the SISA paper does: all tokens of the last word are the argmax.

Given the right tokens so far, all-argmax is the same event as greedy decoding producing the word, so one teacher-forced
forward a passage is enough. As in the paper (and lm-eval's lambada_openai) the last word is what follows the last
space, with that space, and no end-of-document token comes first. In 7 of the standard file's 5 153 passages a newline
stands before the last word; there, as there, the target is two words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.perplexity import exp
from sisa_dist.evaluation.scorer import IGNORE, Example, Scorer, encode_continuation, score_examples


def lambada(
    scorer: Scorer, tokenizer: Tokenizer, path: str | Path, *, seq_len: int, batch_size: int, quiet: bool = False
) -> dict[str, Any]:
    """Scores the passages of `path` (.jsonl with a `text` key). Collective. Raises UserError for the file.

    accuracy: share of passages whose target is all argmax. target_perplexity: exp of the mean over passages of
    −log p(target), per target and not per token, as lm-eval has it. passages, target_tokens: counts. cut: passages
    longer than seq_len tokens, which lost their beginning.
    """
    examples, cut = [], 0
    for number, passage in read_passages(path):
        example, was_cut = make_example(tokenizer, passage, seq_len=seq_len, where=f"{path}:{number}")
        examples.append(example)
        cut += was_cut
    hits, surprise, seen = 0.0, 0.0, 0.0
    for _, log_prob_T, is_argmax_T in score_examples(
        scorer, examples, batch_size=batch_size, what="LAMBADA", quiet=quiet
    ):
        hits += float(is_argmax_T.all())
        surprise -= float(log_prob_T.double().sum())
        seen += 1
    hits, surprise, seen = scorer.sum_over_dp([hits, surprise, seen])
    assert seen == len(examples)
    return {
        "accuracy": hits / seen,
        "target_perplexity": exp(surprise / seen),
        "passages": len(examples),
        "target_tokens": sum(label != IGNORE for example in examples for label in example.labels),
        "cut": cut,
    }


def read_passages(path: str | Path) -> list[tuple[int, str]]:
    """(line number, text) of a LAMBADA file's passages. Raises UserError that names file and line."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"evaluation.lambada: {path} cannot be read ({why}): name the LAMBADA .jsonl file") from None
    passages = []
    # Not splitlines(): that also splits at characters a JSON string may hold as they are (U+2028, U+0085).
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: no JSON object with `text`: name the LAMBADA .jsonl file") from None
        if not isinstance(text, str) or " " not in text.strip():
            raise UserError(f"{path}:{number}: a passage needs at least two words: mend or remove the line")
        passages.append((number, text.strip()))
    if not passages:
        raise UserError(f"evaluation.lambada: {path} is empty: name the LAMBADA .jsonl file")
    return passages


def make_example(tokenizer: Tokenizer, passage: str, *, seq_len: int, where: str) -> tuple[Example, bool]:
    """(the passage with labels on its last word alone, whether its beginning was cut).

    Raises UserError where the last word alone does not fit seq_len.
    """
    context, word = passage.rsplit(" ", 1)
    ids, start = encode_continuation(tokenizer, context, f" {word}")
    if start == 0:
        # Nothing of the context is left to predict from (a first piece that spans the boundary): a document's start is.
        ids, start = [tokenizer.eos_id, *ids], 1
    target = len(ids) - start
    if target > seq_len:
        raise UserError(f"{where}: the last word has {target} tokens, training.seq_len is {seq_len}: remove the line")
    was_cut = len(ids) - 1 > seq_len
    ids = ids[-(seq_len + 1) :]
    labels = [IGNORE] * (len(ids) - 1 - target) + ids[-target:]
    return Example(ids[:-1], labels), was_cut
