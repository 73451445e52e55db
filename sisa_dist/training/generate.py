"""Text in, text out: a checkpoint's model and tokenizer around `model.generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint import load_model
from sisa_dist.config import UserError
from sisa_dist.model import generate


def stream_text(
    checkpoint: str | Path, *, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """Yields the continuation of `prompt` piece by piece; ends at the end-of-document token or after max_tokens.

    Checks its arguments and loads the model when called. Raises UserError.
    """
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p} is outside (0, 1]: set for example 0.95")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the shell handed over bytes that are no text
        raise UserError(f"--prompt: not UTF-8 at character {error.start}: give it in UTF-8") from None
    model, tokenizer = load_model(checkpoint)
    # A document starts after an end-of-document token in training, so a prompt does too.
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    made = generate(
        model, torch.tensor([ids]), max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    return _as_text(made, tokenizer, ids[1:])


def _as_text(tokens: Iterator[Tensor], tokenizer: Tokenizer, prompt_ids: list[int]) -> Iterator[str]:
    made: list[int] = []
    shown = prompt_text = tokenizer.decode(prompt_ids)
    for token in tokens:
        if int(token) == tokenizer.eos_id:
            return
        made.append(int(token))
        text = tokenizer.decode(prompt_ids + made)
        # A character may span several byte tokens: wait until it is whole.
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(prompt_text):
            continue
        yield text[len(shown) :]
        shown = text
