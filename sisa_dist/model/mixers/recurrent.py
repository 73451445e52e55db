"""What the caches of recurrent mixers have in common: how many tokens they saw, and of which documents."""

from __future__ import annotations

from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops import held_and_coming


class RecurrentCache:
    """A state holds the last token's document alone, so where a chunk begins another, what is held is emptied.

    Of one size however long the text, but for the ids of packed documents.
    """

    def __init__(self) -> None:
        self.length = 0
        self._rows: int | None = None
        self._doc_ids_BT: Tensor | None = None

    def documents(self, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """As `held_and_coming` has it."""
        return held_and_coming(self._doc_ids_BT, doc_ids_Bt, length=self.length)

    def advance(self, chunk: Tensor, tokens: int, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """Counts a chunk [B, …] of so many tokens. Rows, bool [B], in which it does not go on with the document held;
        None where all do. Raises UserError where it is of another batch."""
        if self._rows not in (None, len(chunk)):
            raise UserError(f"cache: a chunk of {len(chunk)} rows does not continue {self._rows}: start a new cache")
        self._rows = len(chunk)
        held, self._doc_ids_BT = self._doc_ids_BT, self.documents(doc_ids_Bt)
        self.length += tokens
        return None if held is None or doc_ids_Bt is None else held[:, -1] != doc_ids_Bt[:, 0]


def emptied(x: Tensor | None, rows_B: Tensor | None) -> Tensor | None:
    """x [B, …] with zeros in these rows."""
    return x if x is None or rows_B is None else x.masked_fill(rows_B.view(-1, *(1,) * (x.ndim - 1)), 0.0)
