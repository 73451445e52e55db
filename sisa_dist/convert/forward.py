"""The logits of a checkpoint without the model: each module's weights are read when it runs and dropped after it.

A parameter is used only in its owner's forward (that is what lets ZeRO-3 run these models), so hooks on the owners
are enough, and the model's own forward is what is checked, not a second one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.convert.recipe import TensorSource
from sisa_dist.convert.tensors import MODEL
from sisa_dist.model import build_model

_SEQUENCES, _LENGTH = 2, 96


def fixed_tokens(model: ModelConfig) -> Tensor:
    """[2, 96] int64: always the same ids of a vocabulary, spread over all of it, its last id among them."""
    # Weyl's sequence: the multiples of the golden ratio, mod 1, are spread evenly.
    position = torch.arange(1, _SEQUENCES * _LENGTH + 1, dtype=torch.float64)
    tokens_N = ((position * 0.6180339887498949) % 1.0 * model.vocab_size).long()
    tokens_N[-1] = model.vocab_size - 1
    return tokens_N.view(_SEQUENCES, _LENGTH)


@torch.no_grad()
def logits(source: TensorSource, model: ModelConfig, tokens_BT: Tensor) -> Tensor:
    """[B, T, vocab_size] fp32, computed in fp32 on the CPU. At most one module's weights are in memory at a time."""
    with torch.device("meta"):
        lm = build_model(model, attention=AttentionConfig()).eval()
    for name, module in lm.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if own:
            _stream(module, f"{MODEL}{name}.", own, source)
    if model.tie_embeddings:
        # The model hands the head its embedding's weight, which was dropped when the embedding had run.
        def lend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h_BTD, _, *rest = args
            return (h_BTD, _read(source, f"{MODEL}embed.weight"), *rest), kwargs

        lm.head.register_forward_pre_hook(lend, with_kwargs=True)
    found = lm(tokens_BT)
    assert isinstance(found, Tensor)
    return found


def _stream(module: nn.Module, prefix: str, own: dict[str, Any], source: TensorSource) -> None:
    def fetch(module: nn.Module, args: Any) -> None:
        for name in own:
            weight = _read(source, prefix + name)
            setattr(module, name, weight if name in module._buffers else nn.Parameter(weight, requires_grad=False))

    def drop(module: nn.Module, args: Any, result: Any) -> None:
        for name, empty in own.items():
            setattr(module, name, empty)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)


def _read(source: TensorSource, name: str) -> Tensor:
    return source.read(name).float()
