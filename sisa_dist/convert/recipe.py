"""How one tensor of a checkpoint is made from tensors of another: the unit of every conversion.

A conversion is a table of recipes, one per tensor it writes. Recipes run on meta tensors too, so shapes are checked
before anything is read, and `--dry-run` is the whole conversion without the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sisa_dist.config import UserError


class TensorSource(Protocol):
    """Tensors by name, read one at a time; nothing stays in memory behind a read."""

    @property
    def specs(self) -> Mapping[str, Tensor]:
        """Every tensor's shape and dtype, as meta tensors, in a stable order. Opens headers only."""

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, contiguous, in its own dtype. Raises UserError where it cannot be read."""


def identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Recipe:
    """`make(*sources)`: a pure function of tensors, on the CPU or meta. No sources: made from nothing."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = identity


Recipes = Mapping[str, Recipe]  # by the name of the tensor that is made


class Converted:
    """A source whose tensors are made from another's by recipes.

    Raises UserError where a recipe asks for a tensor the source lacks, and where a tensor of the source is used by no
    recipe and `dropped` does not name it: half a tensor lost in silence is the mistake this class exists to prevent.
    """

    def __init__(self, source: TensorSource, recipes: Recipes, *, dropped: frozenset[str] = frozenset()) -> None:
        self.source, self.recipes = source, recipes
        asked = {name for recipe in recipes.values() for name in recipe.sources}
        missing = sorted(asked - source.specs.keys())
        if missing:
            raise UserError(f"{len(missing)} tensors are missing, the first is {missing[0]}: is this the right model?")
        unused = sorted(source.specs.keys() - asked - dropped)
        if unused:
            raise UserError(
                f"{len(unused)} tensors have no place in the model, the first is {unused[0]}: is this the right model?"
            )
        self.specs = {
            name: recipe.make(*(source.specs[needed] for needed in recipe.sources)).to("meta")
            for name, recipe in recipes.items()
        }

    def read(self, name: str) -> Tensor:
        recipe = self.recipes[name]
        made = recipe.make(*(self.source.read(needed) for needed in recipe.sources)).contiguous()
        spec = self.specs[name]
        assert made.shape == spec.shape and made.dtype == spec.dtype, f"{name}: {made.shape} {made.dtype}"
        return made


def check_specs(found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], *, what: str) -> None:
    """Raises UserError naming the first tensor that is missing, left over or of another shape."""
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{what}: {name} is missing: is this the right model?")
        if found[name].shape != shape:
            raise UserError(f"{what}: {name} is {tuple(found[name].shape)}, the model has {tuple(shape)}")
    left = sorted(found.keys() - wanted.keys())
    if left:
        raise UserError(f"{what}: {left[0]} has no place in the model ({len(left)} such): is this the right model?")
