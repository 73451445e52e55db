"""How large a model is, and the d_ff that makes one as large as another. Shared by comparison, d_s grid and sweep."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sisa_dist.config import ModelConfig, RunConfig
from sisa_dist.model import build_model, num_parameters


def parameters(config: RunConfig) -> int:
    """Of a learned d_s those of the model that its budget leaves."""
    model = config.model
    if model.learned_d_s is not None and model.learned_d_s.budget is not None:
        d_s = round(model.learned_d_s.budget / 2) * 2
        model = ModelConfig(**(model.model_dump() | {"d_s": [d_s if has else 0 for has in model.layer_d_s]}))
    with torch.device("meta"):
        return num_parameters(build_model(model, attention=config.attention))


def solve_d_ff(with_d_ff: Callable[[int], RunConfig], target: int) -> int | None:
    """The d_ff whose model comes nearest to `target` parameters; below 1 where the rest alone is too large.

    None where no layer has an MLP. From two sizes, as parameters are linear in it: no mixer has to know its formula.
    """
    low, high = (parameters(with_d_ff(d_ff)) for d_ff in (8, 16))
    return None if high == low else 8 + round((target - low) * 8 / (high - low))
