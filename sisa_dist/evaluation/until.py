"""Decoding until a stop string, many prompts at once, through `model.generate` and its cache.

What ends a text here is what an evaluation asks for: a string of its own, the end of the document, or a number of
tokens. Prompts of one batch have equal lengths, because a cache holds no padding: a step is exact, never masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.model import LM, generate

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first given counts
# Beam search and the like are not decoded here; at these values they ask for nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "top_k": 0, "use_cache": True}


@dataclass(frozen=True)
class Decoding:
    """How a text is continued. temperature 0 is greedy; the text ends before the first of `until`."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    @classmethod
    def read(cls, options: Mapping[str, Any], *, max_tokens: int) -> Decoding:
        """From lm-eval's `generation_kwargs`; `max_tokens` where they name none. Raises UserError for what it cannot.

        As there, do_sample false is greedy whatever the temperature, and left out it follows from the temperature.
        """
        rest = dict(options)
        until = rest.pop("until", None) or []
        limits = [rest.pop(name) for name in _MAX_TOKENS if name in rest]
        sample, temperature, top_p = (rest.pop(name, None) for name in ("do_sample", "temperature", "top_p"))
        for name, neutral in _NEUTRAL.items():
            if rest.get(name) in (None, neutral):
                rest.pop(name, None)
        if rest:
            name, value = next(iter(rest.items()))
            raise UserError(f"generation_kwargs: {name}={value} is not supported: remove it from the task")
        if sample is False:
            temperature = 0.0
        elif temperature is None:
            temperature = 1.0 if sample else 0.0
        return cls(
            until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            max_tokens=int(next((limit for limit in limits if limit is not None), max_tokens)),
            temperature=float(temperature),
            top_p=1.0 if top_p is None else float(top_p),
        )


def generate_texts(
    model: LM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding, *, batch_size: int
) -> Iterator[tuple[int, str]]:
    """Yields (prompt number, its continuation without the stop string), each once, in any order.

    Prompts are token ids, at least one each. Only those of equal length share a batch, so prompts of many lengths cost
    up to one batch a length. Sampling draws its seeds from torch's global generator.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    device = model.embed.weight.device
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        same_length = list(group)
        for start in range(0, len(same_length), batch_size):
            rows = same_length[start : start + batch_size]
            prompt_BT = torch.tensor([list(prompts[i]) for i in rows], device=device)
            yield from zip(rows, _generate(model, tokenizer, prompt_BT, decoding), strict=True)


def _generate(model: LM, tokenizer: Tokenizer, prompt_BT: torch.Tensor, decoding: Decoding) -> list[str]:
    made: list[list[int]] = [[] for _ in prompt_BT]
    texts = [""] * len(made)
    running = set(range(len(made)))
    seed = int(torch.randint(2**62, ())) if decoding.temperature else 0
    tokens = generate(
        model,
        prompt_BT,
        max_new_tokens=decoding.max_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=seed,
    )
    for token_B in tokens:
        for row, token in enumerate(token_B.tolist()):
            if row not in running:
                continue
            if token == tokenizer.eos_id:
                running.discard(row)
                continue
            # A model may have more ids than its tokenizer; those have no text.
            made[row] += [token] if token < tokenizer.vocab_size else []
            texts[row] = tokenizer.decode(made[row])
            if any(stop in texts[row] for stop in decoding.until):
                running.discard(row)
        if not running:
            break
    return [_cut(text, decoding.until) for text in texts]


def _cut(text: str, until: Sequence[str]) -> str:
    # One after the other, as lm-eval does: where stop strings overlap, the order of the list decides.
    for stop in until:
        text = text.split(stop)[0]
    return text
