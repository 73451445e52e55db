"""The `model.rope_scaling:` block: RoPE that reaches further than the model was trained. Keys as transformers has them.

What each kind computes: `sisa_dist.model.rope_scaling`. A change of base alone needs no block: set `model.rope_theta`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat
from pydantic import model_validator as _model_validator

from sisa_dist.config.section import Section

RopeType = Literal["linear", "ntk", "dynamic", "yarn", "llama3", "longrope"]

_ORIGINAL = "original_max_position_embeddings"
# Of each kind the keys it needs, and those it may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "ntk": (("factor",), ()),
    "dynamic": (("factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"), ()),
    "longrope": ((_ORIGINAL, "short_factor", "long_factor"), ("factor", "attention_factor")),
}


class RopeScalingConfig(Section):
    """How the frequencies of RoPE are stretched. It has no parameters: a stage may change it."""

    rope_type: RopeType
    factor: float | None = Field(default=None, ge=1.0)  # of the context: sequences this many times as long
    # Tokens of the sequences that the model was trained on before it was stretched
    original_max_position_embeddings: int | None = Field(default=None, ge=2)
    # On the turned channels of q and of k, so its square is on their part of the score; None: by the kind's formula
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None  # yarn: turns over the original length from which nothing is stretched; 32
    beta_slow: PositiveFloat | None = None  # and up to which all is; 1
    mscale: PositiveFloat | None = None  # yarn: attention_factor by DeepSeek's formula, of both
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool | None = None  # yarn: the two limits rounded to whole channels; None: true
    short_factor: list[PositiveFloat] | None = None  # longrope: of each pair, for sequences of the original length
    long_factor: list[PositiveFloat] | None = None  # and for longer ones
    low_freq_factor: PositiveFloat | None = None  # llama3: turns over the original length up to which all is stretched
    high_freq_factor: PositiveFloat | None = None  # and from which nothing is

    @property
    def goes_by_length(self) -> bool:
        """Whether the frequencies depend on how long the sequence at hand is."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def original_length(self) -> int:
        """Of a kind that needs it."""
        assert self.original_max_position_embeddings is not None
        return self.original_max_position_embeddings

    @property
    def keys(self) -> dict[str, object]:
        """What it says besides its type."""
        return self.model_dump(exclude={"rope_type"}, exclude_none=True)

    @_model_validator(mode="after")
    def _consistent(self) -> RopeScalingConfig:
        kind, (needed, optional) = self.rope_type, ROPE_TYPES[self.rope_type]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"{key} is missing and rope_type {kind} needs it: set it")
        for key in self.keys:
            if key not in needed + optional:
                raise ValueError(f"{key} has no effect with rope_type {kind}: remove it")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim have an effect only together: set both, or remove one")
        if self.attention_factor is not None and self.mscale is not None:
            raise ValueError("mscale has no effect beside attention_factor: remove mscale and mscale_all_dim")
        if kind == "longrope" and (self.factor is None) == (self.attention_factor is None):
            raise ValueError("longrope's factor only gives attention_factor by its formula: set exactly one of the two")
        idle = self.factor == 1.0 and (kind in ("linear", "ntk", "llama3") or self.attention_factor in (None, 1.0))
        if idle and not self.goes_by_length:
            raise ValueError(f"factor 1 changes nothing with rope_type {kind}: remove rope_scaling, or raise factor")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            a, b = getattr(self, low) or 1.0, getattr(self, high) or 32.0
            if a >= b:
                raise ValueError(f"{low} {a:g} is not below {high} {b:g}: set it lower")
        return self

    def check_channels(self, channels: int, theta: float) -> None:
        """Raises ValueError where heads of so many turned channels, with this base, cannot be scaled so."""
        if not channels:
            raise ValueError("rope_scaling is set and rotary_fraction 0 turns nothing: remove rope_scaling")
        if self.rope_type in ("ntk", "dynamic") and channels == 2:
            raise ValueError(f"rope_scaling {self.rope_type} spares the first of a head's pairs and there is but one")
        if self.rope_type == "yarn" and theta <= 1:
            raise ValueError(f"rope_theta {theta:g} makes no wavelengths that yarn can tell apart: set it above 1")
        for key in ("short_factor", "long_factor"):
            factors = getattr(self, key)
            if factors is not None and len(factors) != channels // 2:
                raise ValueError(
                    f"rope_scaling.{key} has {len(factors)} numbers and {channels // 2} pairs of a head turn: give one "
                    "for each"
                )
