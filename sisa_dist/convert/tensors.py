"""Views of a TensorSource: a part of it, in another dtype, remembered by hash. Each reads one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.convert.recipe import Converted, Recipe, Recipes, TensorSource

MODEL, MOMENTS = "model.", ("exp_avg.", "exp_avg_sq.")  # how the framework's checkpoints name weights and moments


class Selected:
    """The tensors `names` of `source`, in that order."""

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        self.source = source
        self.specs = {name: source.specs[name] for name in names}

    def read(self, name: str) -> Tensor:
        assert name in self.specs, name
        return self.source.read(name)


class Cast:
    """`source` with each tensor in `dtype(name)`."""

    def __init__(self, source: TensorSource, dtype: Callable[[str], torch.dtype]) -> None:
        self.source = source
        self.specs = {name: spec.to(dtype(name)) for name, spec in source.specs.items()}

    def read(self, name: str) -> Tensor:
        return self.source.read(name).to(self.specs[name].dtype)


class With:
    """`source` and a few small tensors at hand, of other names."""

    def __init__(self, source: TensorSource, tensors: Mapping[str, Tensor]) -> None:
        assert not source.specs.keys() & tensors.keys()
        self.source, self._tensors = source, tensors
        self.specs = {**source.specs, **{name: tensor.to("meta") for name, tensor in tensors.items()}}

    def read(self, name: str) -> Tensor:
        return self._tensors[name] if name in self._tensors else self.source.read(name)


class Noted:
    """`source`, keeping a hash of every tensor read from it, so that what was written can be read back and compared.

    `seen(name, bytes)` is told of each read: a progress bar.
    """

    def __init__(self, source: TensorSource, *, seen: Callable[[str, int], None] = lambda name, size: None) -> None:
        self.source, self._seen = source, seen
        self.specs = source.specs
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        self.hashes[name] = fingerprint(tensor)
        self._seen(name, num_bytes(tensor))
        return tensor


def fingerprint(tensor: Tensor) -> str:
    """Of shape, dtype and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of at least one element."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def num_bytes(spec: Tensor) -> int:
    return spec.numel() * spec.element_size()


def check_written(meant: Mapping[str, str], found: TensorSource, *, what: str) -> None:
    """Reads all of `found`. Raises UserError where its tensors are not those whose hashes are `meant`."""
    if missing := sorted(meant.keys() - found.specs.keys()):
        raise UserError(f"{what}: {missing[0]} was written and is not there: the disk or this program is at fault")
    if added := sorted(found.specs.keys() - meant.keys()):
        raise UserError(f"{what}: {added[0]} was not written and is there: this program is at fault")
    for name, wanted in meant.items():
        if fingerprint(found.read(name)) != wanted:
            raise UserError(
                f"{what}: {name} reads back other than it was written: the disk or this program is at fault"
            )


def weights_of(source: TensorSource) -> Selected:
    return Selected(source, (name for name in source.specs if name.startswith(MODEL)))


def has_moments(source: TensorSource) -> bool:
    return any(name.startswith(MOMENTS) for name in source.specs)


def to_ours(recipes: Recipes) -> Recipes:
    """`imports` of an architecture, making `model.X` of foreign tensors."""
    return {MODEL + name: recipe for name, recipe in recipes.items()}


def from_ours(recipes: Recipes) -> Recipes:
    """`exports` of an architecture, making foreign tensors of `model.X`."""
    return {
        name: Recipe(tuple(MODEL + source for source in recipe.sources), recipe.make)
        for name, recipe in recipes.items()
    }


def origins(source: object, name: str) -> tuple[str, ...]:
    """The names, in the checkpoint at the bottom of these views, of what tensor `name` is made from."""
    if isinstance(source, Converted):
        needed = (origins(source.source, inner) for inner in source.recipes[name].sources)
        return tuple(dict.fromkeys(leaf for leaves in needed for leaf in leaves))
    if isinstance(source, Selected | Cast | Noted):
        return origins(source.source, name)
    return (name,)
