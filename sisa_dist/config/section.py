"""What every block of the YAML has in common: it is closed, frozen and strict."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A block of the YAML. Unknown keys and wrong types are errors: a typo must never train a different model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
