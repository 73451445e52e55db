"""Two checkpoints of any formats, tensor by tensor. A few million numbers are in memory beside the two tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sisa_dist.config import ModelConfig
from sisa_dist.convert.formats import ARCHITECTURES, detect, open_checkpoint
from sisa_dist.convert.recipe import TensorSource
from sisa_dist.convert.tensors import MODEL, MOMENTS
from sisa_dist.convert.transformers_folder import stored, type_of

_PIECE = 1 << 22  # numbers compared at once, in fp64
_VOCABULARY = tuple(prefix + name for prefix in (MODEL, *MOMENTS) for name in ("embed.weight", "head.weight"))
_NO_FUNCTION = {"vocab_multiple", "init_std"}  # keys of ModelConfig that leave the function of given weights alone


@dataclass
class Difference:
    """Of one tensor. Relative: to the larger of the two numbers. Equal numbers, NaN and NaN too, differ by 0."""

    name: str
    numbers: int = 0
    unequal: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    sum_abs: float = field(default=0.0, repr=False)
    sum_rel: float = field(default=0.0, repr=False)

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / max(1, self.numbers)

    @property
    def mean_rel(self) -> float:
        return self.sum_rel / max(1, self.numbers)

    def add(self, a: Tensor, b: Tensor) -> None:
        """a, b of one shape, any dtypes."""
        for start in range(0, a.numel(), _PIECE):
            x, y = (tensor.reshape(-1)[start : start + _PIECE].double() for tensor in (a, b))
            differ = (x != y) & ~(x.isnan() & y.isnan())
            x, y = x[differ], y[differ]
            # NaN on one side is as different as can be.
            absolute = (x - y).abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
            relative = (absolute / torch.maximum(x.abs(), y.abs())).nan_to_num_(nan=torch.inf, posinf=torch.inf)
            self.numbers += differ.numel()
            self.unequal += x.numel()
            if x.numel():
                self.max_abs = max(self.max_abs, absolute.max().item())
                self.max_rel = max(self.max_rel, relative.max().item())
                self.sum_abs += absolute.sum().item()
                self.sum_rel += relative.sum().item()


@dataclass(frozen=True)
class Side:
    """A checkpoint to compare. `model` None: an architecture without a mapping, under its own names."""

    path: Path
    source: TensorSource
    model: ModelConfig | None


def open_side(path: Path) -> Side:
    if detect(path) == "hf" and type_of(path) not in ARCHITECTURES:
        return Side(path, stored(path), None)
    opened = open_checkpoint(path)
    return Side(path, opened.source, opened.model)


def config_differences(a: Side, b: Side) -> list[str]:
    """Keys of the models that change what the weights compute, `key: value / value`."""
    if a.model is None or b.model is None:
        return []
    one, other = a.model.model_dump(), b.model.model_dump()
    return [
        f"model.{key}: {one[key]!r} / {other[key]!r}"
        for key in one
        if key not in _NO_FUNCTION and one[key] != other[key]
    ]


def left_over(a: Side, b: Side) -> tuple[list[str], list[str]]:
    """Names that only `a` has, and only `b`. Moments count where both have some."""
    names = [set(side.source.specs) for side in (a, b)]
    both = all(any(name.startswith(MOMENTS) for name in side) for side in names)
    one, other = ({name for name in side if both or not name.startswith(MOMENTS)} for side in names)
    return sorted(one - other), sorted(other - one)


def compare(a: Side, b: Side) -> Iterator[Difference | str]:
    """The difference of each tensor both have, in `a`'s order, or a line that says why it has none.

    Rows of the vocabulary's padding are told apart, as NAME[padding], where the models say how many there are.
    """
    for name, spec in a.source.specs.items():
        if name not in b.source.specs:
            continue
        shape, other = spec.shape, b.source.specs[name].shape
        rows = _real_rows(name, a, b)
        if rows is None and shape != other:
            yield f"{name}: shape {list(shape)} / {list(other)}"
            continue
        if rows is not None and (shape[1:] != other[1:] or min(shape[0], other[0]) < rows):
            yield f"{name}: shape {list(shape)} / {list(other)}"
            continue
        x, y = a.source.read(name), b.source.read(name)
        difference = Difference(name)
        difference.add(x[:rows], y[:rows])
        yield difference
        if rows is not None and max(shape[0], other[0]) > rows:
            # Where one has fewer of them, the rest of the other's is compared with nothing: with zero.
            padding = Difference(f"{name}[padding]")
            x, y = x[rows:], y[rows:]
            most = max(len(x), len(y))
            padding.add(*(torch.cat((t, t.new_zeros(most - len(t), *t.shape[1:]))) for t in (x, y)))
            yield padding


def _real_rows(name: str, a: Side, b: Side) -> int | None:
    """How many rows of `name` stand for tokens; None where it has no vocabulary or the two have different ones."""
    if a.model is None or b.model is None or name not in _VOCABULARY or a.model.vocab_size != b.model.vocab_size:
        return None
    return a.model.vocab_size
