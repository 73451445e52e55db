"""Which positions of its windows a process works on: here all of them.

Context parallelism puts a subclass in its place (parallel/context.py); the model cuts what goes in and joins what
comes out, and in between only scores, convolutions and recurrences (mixers/scans.py) look at positions held elsewhere.
doc_ids are handed on whole: they are small, and who sees whom is a matter of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Of every window the whole."""

    def window(self, length: int) -> int:
        """Tokens of the window of which this process has `length`."""
        return length

    def own(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """This process's positions of x, whose `dim` goes over all of them."""
        return x

    def whole(self, x_Bt: Tensor) -> Tensor:
        """[B, t, ...] of this process's positions, without a gradient → of all positions. Collective."""
        return x_Bt
