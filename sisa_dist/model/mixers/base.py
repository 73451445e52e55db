"""What a block, the model and the FLOP count ask of a mixer, and nothing of what is inside one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.rope import RopeTables


class Cache(Protocol):
    """What one layer keeps between the chunks of a generation."""

    @property
    def length(self) -> int:
        """Tokens seen."""
        ...

    def documents(self, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """doc_ids [B, length + t] of the tokens seen and of a chunk of t that is to come; None without documents."""
        ...


class Mixer(nn.Module, ABC):
    """The part of a block that moves information between positions: [B, T, d_model] → [B, T, d_model], causal.

    Written for whole heads and columns; parallel/plan.py says how its parameters are cut, and the same code then runs
    on fewer heads. `doc_ids` [B, T], non-decreasing: no position sees another document, and what a document gives is
    what it gives alone. With a cache the input continues what the cache has seen.

    In a layer whose `ffn` is ssm_gated the result is a pair, with C [B, H, T, d_s] behind it for the MLP's gate. A
    plain tuple, and no attribute: engines hang hooks on what a forward returns, and recomputation repeats it.
    """

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def new_cache() -> Cache: ...

    @staticmethod
    @abstractmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        """Of a forward, per token, averaged over a causal sequence of seq_len; matmuls only."""

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]: ...
