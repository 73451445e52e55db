"""Samples of SISA's scores in a forward: the inputs of each layer's score are looked at on their way in.

Nothing in a mixer knows of it, and without it nothing is paid. Layers of other mixers have none, nor has a score that
context parallelism has put in the place of SISA's, which sees only a part of the keys, nor a sigmoid's, which moves no
attention mass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sisa_dist.model.lm import LM
from sisa_dist.model.mixers.sisa import SisaScore
from sisa_dist.ops.sampled import ScoreSample, sampled_scores


def sampled_layers(model: LM) -> dict[int, SisaScore]:
    """The layers that can be sampled."""
    scores = ((layer, getattr(block.mixer, "score", None)) for layer, block in enumerate(model.blocks))
    return {layer: score for layer, score in scores if isinstance(score, SisaScore)}


@contextmanager
def sampling(model: LM, rows: Tensor) -> Iterator[dict[int, ScoreSample]]:
    """While it is open: what the first window of a forward gives at the queries `rows`, by layer."""
    found: dict[int, ScoreSample] = {}
    with ExitStack() as stack:
        for layer, score in sampled_layers(model).items():

            def look(_: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any], layer: int = layer) -> None:
                q, k, _v, C, B, log_alpha, theta = (x[:1] for x in inputs[:-1])
                doc_ids = options["doc_ids"]
                doc_ids = None if doc_ids is None else doc_ids[:1]
                here = rows.to(q.device)
                found[layer] = sampled_scores(q, k, C, B, log_alpha, theta, inputs[-1], rows=here, doc_ids=doc_ids)

            stack.callback(score.register_forward_pre_hook(look, with_kwargs=True).remove)
        yield found
