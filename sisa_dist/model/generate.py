"""Autoregressive decoding with a cache: greedy, or sampled by temperature and nucleus (top-p)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sisa_dist.model.lm import LM


@torch.inference_mode()
def generate(
    model: LM,
    prompt_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yields one token id per row, [B] int64, max_new_tokens times. prompt [B, T ≥ 1] int64.

    temperature 0 is greedy. Sampling draws from one CPU generator seeded with `seed`, so a run repeats on any device.
    top_p keeps the smallest set of tokens whose probability reaches it (Holtzman et al. 2020). RoPE scaling that goes
    by length takes that of prompt and max_new_tokens together, so that all keys and queries turn alike.
    """
    if prompt_BT.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token, for example the tokenizer's eos_id")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be ≥ 0 and top_p {top_p} in (0, 1]")
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache()
    tokens_BT, total = prompt_BT, prompt_BT.shape[1] + max_new_tokens
    for _ in range(max_new_tokens):
        logits_BV = model(tokens_BT, cache=cache, last_only=True, total_length=total)[:, -1]
        next_B = logits_BV.argmax(-1) if temperature == 0 else _sample(logits_BV / temperature, top_p, generator)
        yield next_B
        tokens_BT = next_B[:, None]


def _sample(logits_BV: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    probability_BV = logits_BV.double().softmax(-1).cpu()
    if top_p < 1:
        sorted_BV, order_BV = probability_BV.sort(descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # mass ahead of a token: the first always stays
        sorted_BV[before_BV >= top_p] = 0.0
        probability_BV = torch.zeros_like(sorted_BV).scatter_(1, order_BV, sorted_BV)
    return torch.multinomial(probability_BV, 1, generator=generator)[:, 0].to(logits_BV.device)
