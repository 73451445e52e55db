"""A model of learned d_s becomes one of fixed d_s, layer by layer, that computes the same function.

Pairs of channels whose gate is closed are cut out of W_B, W_C and W_θ; gates that stand between 0 and 1 go into W_B.
What is left is rounded up to the kernels' lattice with closed pairs, the nearest to opening, whose W_B is 0: they add
nothing to the score and can learn again. A layer without an open pair is plain attention. It holds before gates have
hardened too: the function is the one that evaluation computes.

What that saves may go back to the MLPs, as columns that W_down begins with 0 for, so that the function stays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.config.learned import LATTICE
from sisa_dist.convert.families import model_of
from sisa_dist.convert.recipe import Recipe, Recipes, TensorSource
from sisa_dist.convert.tensors import MODEL
from sisa_dist.model import build_model, num_parameters
from sisa_dist.model.gates import Gates
from sisa_dist.model.init import Normal, initial_value

_UNIT = 8  # the MLPs grow by multiples of it, so that what divided d_ff and 8 does so still


@dataclass(frozen=True)
class Kept:
    """Of one layer: the pairs that stay, in order, and what W_B is multiplied by for each."""

    pairs: list[int]
    scale: list[float]

    @property
    def d_s(self) -> int:
        return 2 * len(self.pairs)

    @property
    def open(self) -> int:
        """Channels per head that are not padding."""
        return 2 * sum(scale > 0 for scale in self.scale)


def kept_pairs(model: ModelConfig, source: TensorSource) -> dict[int, Kept]:
    """By layer that has d_s, from the gates of the checkpoint `source`. Raises UserError where there are none."""
    if model.learned_d_s is None:
        raise UserError(f"model.d_s is {model.d_s!r}, not learned: there are no gates to materialise")
    gates = Gates(model)
    gates.load_state_dict({name: source.read(f"{MODEL}gates.{name}") for name in gates.state_dict()})
    found: dict[int, Kept] = {}
    for layer, z_P, log_alpha_P in zip(gates.layers, gates.values(), gates.log_alpha.detach(), strict=True):
        count = int((z_P > 0).sum())
        wanted = -(-2 * count // LATTICE) * LATTICE // 2
        if model.layer_mixers[layer] != "sisa":
            wanted = max(wanted, LATTICE // 2)  # only sisa without its term is attention
        order = torch.where(z_P > 0, torch.inf, log_alpha_P).sort(descending=True, stable=True).indices
        pairs = sorted(order[:wanted].tolist())
        found[layer] = Kept(pairs, z_P[pairs].tolist())
    return found


def materialised(model: ModelConfig, kept: dict[int, Kept], *, to_mlp: bool) -> ModelConfig:
    """The model that `recipes` fills. Raises UserError where `to_mlp` and there is no MLP to widen."""
    d_s = [kept[layer].d_s if layer in kept else 0 for layer in range(model.n_layers)]
    mixers = [
        "attention" if layer in kept and not d_s[layer] else mixer for layer, mixer in enumerate(model.layer_mixers)
    ]
    said: dict[str, Any] = {"d_s": d_s if any(d_s) else None, "mixer": mixers if len(set(mixers)) > 1 else mixers[0]}
    if not any(d_s):
        said |= {"log_alpha_min": None, "sisa": None}  # of a term that no layer has
    smaller = _with(model, said)
    if not to_mlp:
        return smaller
    if not smaller.dense_d_ff:
        raise UserError("--to-mlp: no layer of the model has an MLP of its own to widen: leave it out")
    now, wider = (_parameters(_widened_by(smaller, more)) for more in (0, _UNIT))
    gates = len(kept) * model.learned_d_s.max // 2 if model.learned_d_s else 0
    saved = _parameters(model) - gates - now
    return _widened_by(smaller, max(0, saved // (wider - now)) * _UNIT)


def recipes(model: ModelConfig, kept: dict[int, Kept], *, to_mlp: bool, seed: int = 0) -> Recipes:
    """Every tensor of `materialised(model, kept)`, over the names of `model`. New rows of the MLPs are of this seed."""
    new = materialised(model, kept, to_mlp=to_mlp)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_model(new).state_dict().items()}
    made: dict[str, Recipe] = {}
    for name, shape in shapes.items():
        make = None
        if name.startswith("blocks."):
            _, number, inside = name.split(".", 2)
            layer = int(number)
            if layer in kept and inside in ("mixer.wb.weight", "mixer.wc.weight", "mixer.wtheta.weight"):
                make = _cut(model, kept[layer], inside)
            elif inside.startswith("mlp.") and new.d_ff != model.d_ff:
                make = functools.partial(_widened, name=name, shape=shape, std=model.init_std, seed=seed)
        made[name] = Recipe((name,)) if make is None else Recipe((name,), make)
    return made


def gone(model: ModelConfig, made: Recipes) -> frozenset[str]:
    """The tensors of `model` that no recipe reads: gates, and the whole term of a layer without an open pair."""
    read = {source for recipe in made.values() for source in recipe.sources}
    with torch.device("meta"):
        return frozenset(MODEL + name for name in build_model(model).state_dict() if name not in read)


def _cut(model: ModelConfig, kept: Kept, inside: str) -> Any:
    heads = model.n_heads if inside == "mixer.wc.weight" else model.kv_heads
    if inside == "mixer.wtheta.weight":
        return functools.partial(_rows, heads=heads, rows=kept.pairs)
    channels = [channel for pair in kept.pairs for channel in (2 * pair, 2 * pair + 1)]
    scale = [value for value in kept.scale for _ in range(2)] if inside == "mixer.wb.weight" else None
    return functools.partial(_rows, heads=heads, rows=channels, scale=scale)


def _rows(weight: Tensor, *, heads: int, rows: list[int], scale: list[float] | None = None) -> Tensor:
    """Of [H · n, D] the `rows` of every head, times `scale`."""
    found_HND = weight.unflatten(0, (heads, -1))[:, rows]
    if scale is not None:
        found_HND = found_HND * torch.tensor(scale, dtype=weight.dtype, device=weight.device)[:, None]
    return found_HND.flatten(0, 1)


def _widened(weight: Tensor, *, name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """Up to `shape`: what leads in is new and random, W_down and biases get zeros."""
    if weight.shape == shape:
        return weight
    dim = 1 if name.endswith("down.weight") else 0
    more = list(shape)
    more[dim] -= weight.shape[dim]
    if dim == 1 or len(shape) == 1:
        new = torch.zeros(more)
    else:
        new = initial_value(Normal(std), f"{name}, widened", torch.Size(more), seed=seed)
    return torch.cat((weight, new.to(weight)), dim)


def _widened_by(model: ModelConfig, more: int) -> ModelConfig:
    """Dense MLPs alone: experts, whose width may be d_ff too, keep theirs."""
    experts = {"moe": model.moe.model_dump() | {"d_ff": model.expert_d_ff}} if model.moe else {}
    return _with(model, {"d_ff": model.d_ff + more, **experts})


def _with(model: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    return model_of(model.model_dump() | changes, source="materialising")


def _parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return num_parameters(build_model(model))
